"""Which positions the tokens of a shortened prompt have."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.family import Family
from lvtp.hf.sequence import numbered


def without_collated(family: Family, call: dict[str, Any], real: Tensor, are_packed: bool) -> dict[str, Any]:
    """The call without the position ids of a collator that packs samples, where they are not the model's.

    Without a mask, position ids [B, S] that number the tokens of every sample through tell where samples start. A model
    with positions on several axes would number images like text by them; a sample alone has its own.
    """
    given, collated = call.get("position_ids"), are_packed or call.get("attention_mask") is None
    if given is None or not (collated and family.spells_positions and call.get("mm_token_type_ids") is not None):
        return call
    if not _in_sequence(given, real):
        return call
    return {name: value for name, value in call.items() if name != "position_ids"}


def positions_of(
    model: PreTrainedModel,
    family: Family,
    call: dict[str, Any],
    real: Tensor,
    kept: Tensor,
    *,
    positions: str,
    generating: bool,
    are_packed: bool,
) -> Tensor:
    """The position of every column of the unpruned call: [B, S], or with axes before.

    Args:
        real: bool [B, S], what is not padding.
        kept: bool [B, S], what is left of it.
        positions: "compact" or "original".
        generating: whether `generate` is called, which numbers what the mask hides otherwise.
        are_packed: the rows are samples unpacked from one row, so that position ids given only tell where they start.
    """
    given, whole = call.get("position_ids"), (kept == real).all(dim=1)  # [B]
    original = positions == "original"
    if given is None and original and not bool(whole.all()):
        return family.original_positions(model, call, real, generating)
    if given is None:
        return family.compact_positions(model, call, real, kept, generating)
    if original or bool(whole.all()):
        return given
    if not (are_packed or _in_sequence(given, real)):
        raise ValueError(
            "position_ids must be left out with positions='compact', or number the tokens of every prompt through; "
            "positions='original' keeps them"
        )
    return torch.where(whole[:, None].to(given.device), given, numbered(kept).to(given.device))


def _in_sequence(position_ids: Tensor, real: Tensor) -> bool:
    """Whether the real tokens of every row have numbers one after another."""
    if position_ids.shape != real.shape:
        return False
    ahead = position_ids.to(real.device) - numbered(real)
    first = ahead.gather(1, real.int().argmax(dim=1, keepdim=True))
    return bool(((ahead == first) | ~real).all())
