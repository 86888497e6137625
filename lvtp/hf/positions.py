"""Which positions the tokens of a shortened prompt have."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.family import Family
from lvtp.hf.sequence import leading, numbered


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
    start: Tensor | None = None,
) -> Tensor:
    """The position of every column of the unpruned call: [B, S], or with axes before.

    Args:
        real: bool [B, S], what is not padding.
        kept: bool [B, S], what is left of it.
        positions: "compact" or "original".
        generating: whether `generate` is called, which numbers what the mask hides otherwise.
        are_packed: the rows are samples unpacked from one row, so that position ids given only tell where they start.
        start: int64 [B], the position of the token after those that are cached; None: nothing is.
    """
    given, whole = call.get("position_ids"), (kept == real).all(dim=1)  # [B]
    original = positions == "original"
    if given is not None and not (original or are_packed or bool(whole.all()) or _in_sequence(given, real)):
        raise ValueError(
            "position_ids must be left out with positions='compact', or number the tokens of every prompt through; "
            "positions='original' keeps them"
        )
    if start is not None and (given is None or not original):
        return _after_cached(model, family, call, real, kept, start, original, generating)
    if given is None and original and not bool(whole.all()):
        return family.original_positions(model, call, real, generating)
    if given is None:
        return family.compact_positions(model, call, real, kept, generating)
    if original or bool(whole.all()):
        return given
    return torch.where(whole[:, None].to(given.device), given, numbered(kept).to(given.device))


def _after_cached(
    model: PreTrainedModel,
    family: Family,
    call: dict[str, Any],
    real: Tensor,
    kept: Tensor,
    start: Tensor,
    original: bool,
    generating: bool,
) -> Tensor:
    """Positions of new tokens that go on from `start` [B]."""
    if original and not torch.equal(kept, real):
        numbers = family.original_positions(model, call, real, generating)
    else:
        numbers = family.compact_positions(model, call, real, kept, generating)
    if not (generating or family.continues_by_itself):
        start = start + leading(real)  # such a call numbers every column after the first token of the conversation
    return numbers + start.to(numbers.device)[:, None]


def position_after(
    family: Family, call: dict[str, Any], real: Tensor, next_position: Tensor, *, cached: int, generating: bool
) -> Tensor:
    """int64 [B]: where positions go on after all columns of a call, also those of padding.

    `generate` and models with several axes number tokens, other calls of a model columns.

    Args:
        call: as the model gets it, without what is cached.
        real: bool [B, S], what was not padding in the call that was made of it.
        next_position: int64 [B], the position after the last token.
        cached: columns in the cache before.
    """
    if generating or (family.continues_by_itself and call.get("mm_token_type_ids") is not None):
        return next_position
    if call.get("position_ids") is None:
        return torch.full_like(next_position, cached + call["input_ids"].shape[1])
    return next_position if family.continues_by_itself else next_position + leading(real.flip(1))


def _in_sequence(position_ids: Tensor, real: Tensor) -> bool:
    """Whether the real tokens of every row have numbers one after another."""
    if position_ids.shape != real.shape:
        return False
    ahead = position_ids.to(real.device) - numbered(real)
    first = ahead.gather(1, real.int().argmax(dim=1, keepdim=True))
    return bool(((ahead == first) | ~real).all())
