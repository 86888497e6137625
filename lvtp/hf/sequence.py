"""Prompts as rows of tensors: which columns are tokens, and the same tokens laid out anew. No model."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# What padding holds in the [B, S] tensors a prompt may come with; input_ids gets the model's own padding token.
_PADDING = {"attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "position_ids": 0}
# Tensors whose sizes have nothing to do with the prompt's, even where they happen to agree.
_INDEPENDENT = ("negative_prompt_ids", "negative_prompt_attention_mask")


class Before(NamedTuple):
    """What stands in the key-value cache before a prompt."""

    tokens: Tensor  # int64 [B]: how many
    position: Tensor  # int64 [B]: of the token after them


def last_columns(call: dict[str, Any], count: int) -> dict[str, Any]:
    """The call with the last `count` columns alone of all that runs along the prompt."""
    cut = {name: call[name][..., -count:] for name in ("input_ids", *_PADDING) if call.get(name) is not None}
    if call.get("inputs_embeds") is not None:
        cut["inputs_embeds"] = call["inputs_embeds"][:, -count:]
    return call | cut


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


def spanned(real: Tensor) -> Tensor:
    """bool [B, S]: the columns from the first token of each row to its last, with the masked ones between them."""
    before, after = real.cumsum(dim=1), real.flip(1).cumsum(dim=1).flip(1)
    return (before > 0) & (after > 0)


def last_position(position_ids: Tensor, real: Tensor) -> Tensor:
    """int64 [B]: the highest position of the real tokens [B, S] on any axis; of 4 axes the first one is for masks."""
    axes = position_ids.expand(*position_ids.shape[:-2], *real.shape).reshape(-1, *real.shape)[-3:]
    return axes.masked_fill(~real.to(axes.device), -1).amax(dim=(0, 2))


def leading(real: Tensor) -> Tensor:
    """int64 [B]: the columns before the first token of each row."""
    return (real.cumsum(dim=1) == 0).sum(dim=1)


def numbered(columns: Tensor) -> Tensor:
    """int64 [B, S]: the columns that are True numbered from 0 in every row; the others have the number before them."""
    return (columns.long().cumsum(dim=1) - 1).clamp(min=0)


def new_columns(real: Tensor, stay: Tensor, *, left: bool, tight: bool) -> Tensor:
    """Where the tokens of a shortened batch lie: bool [B, S'], with as many columns in each row as `stay` [B, S].

    Padding after the last of the `real` tokens [B, S] stays as wide as it was, so that the last columns of the logits
    belong to the same tokens as before.

    Args:
        left: pad on the left alone, as `generate` needs.
        tight: nobody counts columns from the end: a batch that is padded on the right alone may be as narrow as its
            longest row.
    """
    lengths = stay.sum(dim=1, keepdim=True)  # [B, 1]
    after = leading(real.flip(1))[:, None] * (lengths > 0)
    if tight and bool(real[:, 0].all()):
        after = lengths.max() - lengths
    if left:
        after = torch.zeros_like(lengths)
    width = int((lengths + after).max())
    column = torch.arange(width, device=real.device)
    return (column >= width - after - lengths) & (column < width - after)


def columns_of(stay: Tensor, places: Tensor) -> Tensor:
    """int64 [B, S]: where each column went that stays, by row at `places` [B, S']; for the others, the last before."""
    return numbered(stay) + places.int().argmax(dim=1, keepdim=True)


def laid_out(call: dict[str, Any], taken: Tensor, places: Tensor, pad_token_id: int) -> dict[str, Any]:
    """The call with the `taken` tokens, bool [B, S], of every tensor along its prompts at `places`, bool [B', S'].

    Both in reading order, row after row. Raises ValueError for a tensor that runs along the prompts and is not known:
    it would silently stop fitting.
    """
    ids = call["input_ids"]
    fills = {"input_ids": pad_token_id, **_PADDING}
    changed = dict(call)
    for name, value in call.items():
        if not isinstance(value, Tensor) or name in _INDEPENDENT:
            continue
        along = value.shape == ids.shape or (name == "position_ids" and value.shape[1:] == ids.shape)  # [axes, B, S]
        if name in fills and along:
            new = value.new_full((*value.shape[:-2], *places.shape), fills[name])
            new[..., places.to(value.device)] = value[..., taken.to(value.device)]
            changed[name] = new
        elif name == "inputs_embeds":  # [B, S, D]
            changed[name] = value.new_zeros(*places.shape, value.shape[-1])
            changed[name][places.to(value.device)] = value[taken.to(value.device)]
        elif ids.shape[1] in value.shape[:2]:
            raise ValueError(
                f"{name} of shape {list(value.shape)} runs along the prompt, and pruning cannot shorten it; "
                f"it shortens {', '.join(fills)} of shape {list(ids.shape)}"
            )
    return changed
