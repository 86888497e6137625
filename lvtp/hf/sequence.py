"""Shortening a padded batch of prompts: pure tensor functions, no model."""

from typing import Any

import torch
from torch import Tensor

# What padding holds in the [B, S] tensors a prompt may come with; input_ids gets the model's own padding token.
_PADDING = {"attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "position_ids": 0}
# Tensors whose sizes have nothing to do with the prompt's, even where they happen to agree.
_INDEPENDENT = ("negative_prompt_ids", "negative_prompt_attention_mask")


def real_tokens(call: dict[str, Any]) -> Tensor:
    """Which tokens of the prompt are not padding: bool [B, S], from the attention mask."""
    ids, mask = call["input_ids"], call.get("attention_mask")
    if mask is None:
        if ids.shape[0] > 1:
            raise ValueError(
                f"attention_mask must be given for a batch of {ids.shape[0]} prompts (padding cannot be told without)"
            )
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids {list(ids.shape)}, got {list(mask.shape)}")
    return mask.to(ids.device).bool()


def padding_side(real: Tensor) -> str:
    """The side the batch is padded on; "left", which generation needs, if it is not padded on the right."""
    return "right" if not bool(real[:, -1].all()) and bool(real[:, 0].all()) else "left"


def shorten(call: dict[str, Any], kept: Tensor, side: str, pad_token_id: int) -> dict[str, Any]:
    """The call with only the `kept` [B, S] tokens in every [B, S] tensor, padded again on `side` to [B, S'].

    Raises ValueError for a tensor that runs along the prompt and is not known: it would silently stop fitting.
    """
    ids = call["input_ids"]
    lengths = kept.sum(dim=1, keepdim=True)  # [B, 1]
    width = int(lengths.max())
    column = torch.arange(width, device=ids.device)
    filled = column < lengths if side == "right" else column >= width - lengths  # [B, S']

    fills = {"input_ids": pad_token_id, **_PADDING}
    shortened = dict(call)
    for name, value in call.items():
        if not isinstance(value, Tensor) or name in _INDEPENDENT:
            continue
        along = value.shape == ids.shape or (name == "position_ids" and value.shape[1:] == ids.shape)  # [axes, B, S]
        if name in fills and along:
            new = value.new_full((*value.shape[:-2], *filled.shape), fills[name])
            new[..., filled.to(value.device)] = value[..., kept.to(value.device)]
            shortened[name] = new
        elif name == "inputs_embeds":  # [B, S, D]
            shortened[name] = value.new_zeros(*filled.shape, value.shape[-1])
            shortened[name][filled.to(value.device)] = value[kept.to(value.device)]
        elif ids.shape[1] in value.shape[:2]:
            raise ValueError(
                f"{name} of shape {list(value.shape)} runs along the prompt, and pruning cannot shorten it; "
                f"it shortens {', '.join(fills)} of shape {list(ids.shape)}"
            )
    return shortened
