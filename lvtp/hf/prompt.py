"""Importance from the language model: the attention that the last token of the prompt pays to the visual tokens.

What ID-Selection takes where the vision tower has no CLS token. It depends on the question, so it takes a look into the
language model before the pruned prompt runs: the whole prompt goes through the first decoder layer and into the
attention of the second, once, and no further.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.attention import watched
from lvtp.importance import prompt_attention

LAYER = 2  # the papers count from 1
# What the language model reads of a call.
_READ = (
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
)


class _SeenEnough(Exception):
    """Ends the look into the language model."""


def check_decoder(model: PreTrainedModel) -> None:
    """Raises unless there is a second decoder layer whose attention can be watched."""
    layers = getattr(model.get_decoder(), "layers", ())
    if len(layers) < LAYER or not hasattr(getattr(layers[LAYER - 1], "self_attn", None), "config"):
        raise ValueError(
            f"score='prompt' needs a language model with at least {LAYER} decoder layers that have a self_attn, "
            f"{type(model).__name__} has {len(layers)} layers"
        )


def attention_of_the_last_token(
    model: PreTrainedModel, call: dict[str, Any], encoder_outputs: dict[str, ModelOutput], real: Tensor
) -> Tensor:
    """fp32 [B, S]: what the last real token of every unpruned prompt attends to, averaged over heads.

    Args:
        call: its arguments; pixels are not read.
        encoder_outputs: all visual tokens by modality. Not to be used again: models rewrite it in place.
        real: bool [B, S], the tokens that are not padding.
    """
    if call.get("labels") is not None:
        raise ValueError(
            "labels must be left out with score='prompt': the last token would be one of the answer, not of the prompt"
        )
    columns = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, columns, 0).amax(dim=1)  # [B]
    rows: list[Tensor] = []

    def look(query: Tensor, key: Tensor, keywords: dict) -> None:
        visible = real
        if keywords.get("sliding_window") is not None:
            visible = real & (columns > last[:, None] - keywords["sliding_window"])
        at = last.to(query.device)
        query = query[torch.arange(len(at), device=at.device), :, at]  # [B, H, d]
        rows.append(prompt_attention(query, key, visible.to(key.device), keywords.get("scaling")))
        raise _SeenEnough

    layer: nn.Module = model.get_decoder().layers[LAYER - 1].self_attn
    read = {name: call[name] for name in _READ if call.get(name) is not None}
    prompt = "input_ids" if call.get("inputs_embeds") is None else "inputs_embeds"
    read |= {prompt: call[prompt], "attention_mask": real.long(), "mm_encoder_outputs": encoder_outputs}
    with torch.no_grad(), watched(layer, look), suppress(_SeenEnough):
        model.base_model(**read, use_cache=False)
    return rows[0]
