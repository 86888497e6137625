"""Turns that go on from a key-value cache: what it holds of the caller's sequence, and where positions go on.

A pruned prompt has fewer columns in the cache than in the sequence that `generate` returned beside it, where that holds
the original prompt. What is known of this lies on the cache itself, so a copy of the cache has it too.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from lvtp.hf.arguments import filled_cache, given, name_in, returned
from lvtp.hf.sequence import Before, last_columns, numbered

_ATTRIBUTE = "_lvtp_prompt"


@dataclass(frozen=True)
class CachedPrompt:
    """What the first P columns of a cache of R rows hold. Each column after them is one of the caller's, in order."""

    columns: Tensor  # int64 [R, P]: the column of the caller's sequence that stands there; -1: padding
    width: int  # columns of the caller's sequence that these are
    skipped: Tensor  # int64 [R]: how far the next position runs ahead of the number of tokens cached
    pruned: bool  # whether tokens are missing
    padded: bool  # whether any column is padding


@dataclass(frozen=True)
class Turn:
    """A call that goes on from C columns of a cache, which hold the first L columns of the caller's sequence."""

    call: dict[str, Any]  # its arguments as given
    new: dict[str, Any]  # the same with the N new tokens alone in all that runs along the prompt
    whole: bool  # whether the call holds the cached tokens, too
    columns: Tensor  # int64 [R, C]: as in `CachedPrompt`
    real: Tensor  # bool [R, C]: which columns of the cache are not padding
    covered: int  # L
    skipped: Tensor  # int64 [R]: as in `CachedPrompt`
    pruned: bool  # whether tokens are missing in the cache
    padded: bool  # whether any of its columns may be padding

    @property
    def before(self) -> Before:
        tokens = self.real.sum(dim=1)
        return Before(tokens, tokens + self.skipped)

    @property
    def moved(self) -> bool:
        """Whether transformers alone would go on at the wrong place."""
        return self.pruned or bool(self.skipped.any())

    def held(self) -> Tensor:
        """bool [R, L]: which columns of the caller's sequence are in the cache."""
        held = self.real.new_zeros(len(self.real), self.covered + 1)  # the last one takes what is padding
        return held.scatter(1, torch.where(self.real, self.columns, self.covered), True)[:, :-1]

    def kept(self, new: Tensor) -> Tensor:
        """Which tokens of the call are read: bool [R, L + N], or `new` [R, N] itself where it holds these alone."""
        return torch.cat([self.held(), new], dim=1) if self.whole else new

    def text(self, by_mask: bool) -> dict[str, Any]:
        """The new tokens of a turn without images, at their positions.

        Args:
            by_mask: number what the mask shows; else every column, as models do by themselves.
        """
        if self.new.get("position_ids") is not None:
            return self.new
        mask = mask_of(self.new)
        places = numbered(mask if by_mask else torch.ones_like(mask))
        return {**self.new, "position_ids": places + self.before.position[:, None]}

    def resumed(self, new: dict[str, Any], generating: bool, pad_token_id: int) -> dict[str, Any]:
        """The call to make, where `new` is what is left of the new tokens, N' columns.

        Args:
            generating: for `generate`, which cuts what it does not need; a call of the model takes N' columns.
            pad_token_id: what stands for padding among the cached tokens.
        """
        if not (generating or self.padded or new.get("attention_mask") is not None):
            return new  # a mask of ones would be read at every step, to find that it is not needed
        mask = mask_of(new)
        call = {**new, "attention_mask": torch.cat([self.real.to(mask), mask], dim=1)}
        if not generating:
            return call
        for name in ("position_ids", "token_type_ids", "mm_token_type_ids"):
            if call.get(name) is not None:
                call[name] = pad(call[name], (self.real.shape[1], 0))
        for name, padding in (("input_ids", pad_token_id), ("inputs_embeds", 0)):
            if self.whole and call.get(name) is not None:
                call[name] = torch.cat([_gathered(self.call[name], self.columns, padding), call[name]], dim=1)
        return call


def begin(
    call: dict[str, Any], *, generating: bool, pixels: bool, by_itself: bool, placeholders: list[int]
) -> Turn | None:
    """The turn that `call` begins; None if its cache is empty, or if transformers goes on from it alone.

    Args:
        generating: for `generate`, where the call may hold what is cached, too.
        pixels: whether there are images among the new tokens.
        by_itself: see `Family.continues_by_itself`.
        placeholders: the tokens in whose place images are put.

    Raises:
        ValueError: the call does not line up with the cache, or nothing is known of the positions in it.
    """
    cache, prompt = filled_cache(call), prompt_of(call)
    if cache is None or prompt is None:
        return None
    known = prompt_in(cache)
    pruned = known is not None and known.pruned
    if not (pixels or pruned or (known is not None and by_itself)):
        return None
    mask = call.get("attention_mask")
    if not pixels and mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return None  # who makes masks of another kind knows what is cached
    name, cached = name_in(call, "cache"), int(cache.get_seq_length())
    columns, covered = _columns(known, cached, prompt, name)
    whole = generating and _is_whole(call)
    new = prompt.shape[1] - covered if whole else prompt.shape[1]
    if new <= 0:
        raise ValueError(
            f"input_ids must hold new tokens after the {covered} in {name}, got {prompt.shape[1]}; to give new ones "
            f"alone, give an attention_mask of {covered + prompt.shape[1]} columns"
        )
    _check_mask(mask, covered + new, None if whole else cached + new, name)
    real = columns >= 0
    if mask is not None:
        held = _gathered(mask, columns, 0) if mask.shape[1] == covered + new else mask[:, :cached]
        real = real & held.to(real.device).bool()
    skipped = torch.zeros_like(columns[:, 0]) if known is None else known.skipped.to(real.device)
    if not (generating or by_itself):  # a call of the model alone numbers columns, those of padding, too
        skipped = skipped + (~real[:, 0 if known is None else known.columns.shape[1] :]).sum(dim=1)
    padded = mask is not None or (known is not None and known.padded)
    turn = Turn(call, last_columns(call, new), whole, columns, real, covered, skipped, pruned, padded)
    if whole and pruned:
        _check_prompt(turn, placeholders, name)
    if known is None and by_itself:
        _check_positions(turn, placeholders, name)
    return turn


def after(
    turn: Turn | None, kept: Tensor, read: Tensor, position: Tensor, *, pruned: bool, restored: bool
) -> CachedPrompt:
    """What a call leaves in its cache.

    Args:
        turn: what was in it before; None: nothing.
        kept: bool [R, N], which of the new tokens given are read.
        read: bool [R, N'], which of the columns that the model gets for them are not padding.
        position: int64 [R], of the token after them.
        pruned: whether new tokens are missing.
        restored: whether the sequence that the caller goes on with holds the missing tokens.
    """
    columns = torch.full_like(read, -1, dtype=torch.long)
    columns[read] = kept.nonzero()[:, 1].to(read.device) + (0 if turn is None else turn.covered)
    width = kept.shape[1]
    if turn is not None:
        columns = torch.cat([torch.where(turn.real, turn.columns, -1).to(read.device), columns], dim=1)
        width, pruned = turn.covered + width, pruned or turn.pruned
    real = columns >= 0
    if not restored:
        width = columns.shape[1]
        columns = torch.where(real, torch.arange(width, device=real.device), -1)
    return CachedPrompt(columns, width, position.to(real.device) - real.sum(dim=1), pruned, not bool(real.all()))


def prompt_in(cache: Cache) -> CachedPrompt | None:
    """What is known of the tokens in a cache."""
    return getattr(cache, _ATTRIBUTE, None)


def note(call: dict[str, Any], outputs: Any, prompt: CachedPrompt | None) -> None:
    """Notes what the cache of a call holds, if the caller can get at it."""
    if prompt is None:
        return
    cache = given(call, "cache")
    if cache is None and isinstance(outputs, ModelOutput):
        cache = returned(outputs, "cache")
    if cache is None:
        return
    sequences = outputs if isinstance(outputs, Tensor) else getattr(outputs, "sequences", None)  # of `generate`
    times = 1 if sequences is None else len(sequences) // len(prompt.skipped)
    columns, skipped = (value.repeat_interleave(times, dim=0) for value in (prompt.columns, prompt.skipped))
    setattr(cache, _ATTRIBUTE, replace(prompt, columns=columns, skipped=skipped))


def text_prompt(call: dict[str, Any], generating: bool) -> CachedPrompt | None:
    """What a call leaves in its empty cache that has no images; None if it cannot be told from its arguments."""
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    told = ids is not None and call.get("position_ids") is None and call.get("mm_encoder_outputs") is None
    if not told or (mask is None and len(ids) > 1) or (mask is not None and mask.shape != ids.shape):
        return None
    real = mask_of(call).bool()
    # `generate` numbers the tokens, a call of the model the columns.
    position = real.sum(dim=1) if generating else torch.full_like(ids[:, 0], ids.shape[1])
    return after(None, real, real, position, pruned=False, restored=False)


def note_text(call: dict[str, Any], outputs: Any) -> None:
    """Notes what a call of the model without images and positions leaves in its cache, if that was empty before."""
    cache = given(call, "cache")
    if cache is None and isinstance(outputs, ModelOutput):
        cache = returned(outputs, "cache")
    if not isinstance(cache, Cache) or prompt_in(cache) is not None:
        return
    prompt = text_prompt(call, generating=False)
    if prompt is not None and cache.get_seq_length() == prompt.width:
        note(call, outputs, prompt)


def forget_emptied(call: dict[str, Any]) -> None:
    """A cache that is reset holds no prompt any more."""
    cache = given(call, "cache")
    if prompt_in(cache) is not None and filled_cache(call) is None:
        delattr(cache, _ATTRIBUTE)


def prompt_of(call: dict[str, Any]) -> Tensor | None:
    """[B, S], or embeddings [B, S, D]."""
    return call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]


def mask_of(call: dict[str, Any]) -> Tensor:
    """int64 [B, S]"""
    mask, prompt = call.get("attention_mask"), prompt_of(call)
    return torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device) if mask is None else mask


def _columns(known: CachedPrompt | None, cached: int, prompt: Tensor, name: str) -> tuple[Tensor, int]:
    """The caller's column in each of the `cached` columns, int64 [R, C], and how many of the caller's these cover."""
    rows = len(prompt)
    if known is None:
        return torch.arange(cached, device=prompt.device).expand(rows, -1), cached
    if rows != len(known.columns):
        raise ValueError(f"input_ids must hold the {len(known.columns)} rows of {name}, got {rows}")
    read = known.columns.shape[1]
    if cached < read:
        raise ValueError(f"{name} must hold all {read} tokens of the prompt that filled it, got {cached}")
    covered = known.width + cached - read
    later = torch.arange(known.width, covered, device=prompt.device).expand(rows, -1)
    return torch.cat([known.columns.to(prompt.device), later], dim=1), covered


def _is_whole(call: dict[str, Any]) -> bool:
    """Whether the prompt of a `generate` holds what is cached, as transformers tells. One of embeddings always does."""
    mask, prompt = call.get("attention_mask"), prompt_of(call)
    return mask is None or mask.shape[1] == prompt.shape[1] or call.get("inputs_embeds") is not None


def _check_mask(mask: Tensor | None, width: int, pruned_width: int | None, name: str) -> None:
    """Raises for a mask that transformers would cut, and then read the wrong end of."""
    if mask is None:
        return
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if not isinstance(shape, list) or len(shape) != 2 or shape[1] not in (width, pruned_width):
        raise ValueError(
            f"attention_mask must have {width} columns, those of the prompt in {name} and of the tokens after it, "
            f"got {shape}"
        )


def _check_prompt(turn: Turn, placeholders: list[int], name: str) -> None:
    """Raises if the caller's sequence does not begin with the prompt in the cache, as far as can be told."""
    ids, mask = turn.call.get("input_ids"), turn.call.get("attention_mask")
    if ids is None:
        return
    missing = ~turn.held() if mask is None else ~turn.held() & mask[:, : turn.covered].to(ids.device).bool()
    missing = ids[:, : turn.covered][missing]
    if not bool(torch.isin(missing, torch.tensor(placeholders, device=ids.device)).all()):
        raise ValueError(
            f"input_ids must begin with the prompt whose visual tokens were pruned in {name}: text stands in the "
            "place of missing ones"
        )


def _check_positions(turn: Turn, placeholders: list[int], name: str) -> None:
    """Raises unless it is known how positions go on from a cache that was not filled by a call of the pruned model."""
    ids = turn.call.get("input_ids")
    text = turn.whole and ids is not None
    text = text and not bool(torch.isin(ids[:, : turn.covered], torch.tensor(placeholders, device=ids.device)).any())
    if turn.new.get("position_ids") is None and not text:
        raise ValueError(
            f"position_ids must be given for images after a {name} that was not filled by a call of the pruned model: "
            "nothing is known of the positions in it"
        )


def _gathered(value: Tensor, columns: Tensor, padding: int) -> Tensor:
    """The columns [R, C] of a tensor [R, S] or [R, S, D]; where they are -1, `padding`."""
    columns = columns.to(value.device)
    index = columns.clamp(min=0)
    if value.dim() == 3:
        index, columns = index[..., None].expand(-1, -1, value.shape[-1]), columns[..., None]
    return value.gather(1, index).masked_fill(columns < 0, padding)
