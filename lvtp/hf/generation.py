"""What `generate` needs around a shortened prompt: length limits, the prompt in its output, and the turn after."""

import copy
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers.generation.utils
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from lvtp.hf.arguments import filled_cache, given, name_in, returned
from lvtp.hf.rewrite import Pruned
from lvtp.importance import HOOKING

# Told by the function that cuts encoded images into chunks.
CHUNKS_HOLD_IMAGES = hasattr(transformers.generation.utils, "_slice_mm_encoder_output")


def setting(model: PreTrainedModel, call: dict[str, Any], name: str):
    """A generation setting, with transformers' precedence: argument, `generation_config`, the model's own; or None."""
    sources = (call.get("generation_config"), model.generation_config)
    values = [call.get(name), *(getattr(source, name, None) for source in sources)]
    return next((value for value in values if value is not None), None)


def check_chunks(model: PreTrainedModel, call: dict[str, Any]) -> None:
    """Raises for a chunked prefill where transformers would leave the images out of it."""
    if setting(model, call, "prefill_chunk_size") is not None and not CHUNKS_HOLD_IMAGES:
        raise ValueError(
            "prefill_chunk_size must be left out when pixels are given: before 5.23, transformers drops the images "
            "from a chunked prefill"
        )


def check_limits(model: PreTrainedModel, call: dict[str, Any], prompt_length: int) -> None:
    """Raises for limits that leave no room, as `generate` would, but in the caller's numbers."""
    new, longest = setting(model, call, "max_new_tokens"), setting(model, call, "max_length")
    if new is None and longest and longest <= prompt_length:
        raise ValueError(
            f"max_length must be more than the {prompt_length} tokens of the prompt, which it counts, got {longest}; "
            "max_new_tokens counts the new ones alone"
        )
    longest = longest if new is None else prompt_length + new
    shortest = setting(model, call, "min_length")
    if longest and shortest and shortest > longest and setting(model, call, "min_new_tokens") is None:
        raise ValueError(
            f"min_length must be at most the {longest} tokens that the prompt and the new ones may have, got {shortest}"
        )


def lower_limits(model: PreTrainedModel, call: dict[str, Any], by: int) -> dict[str, Any]:
    """The call with `max_length` and `min_length`, which count the prompt, lowered by the tokens it lost."""
    call = dict(call)
    for limit, takes_precedence in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = setting(model, call, limit)
        if not value or setting(model, call, takes_precedence) is not None:
            continue
        lowered = max(value - by, 1)
        if call.get(limit) is None and call.get("generation_config") is not None:
            # An argument beside a generation_config is deprecated.
            call["generation_config"] = copy.deepcopy(call["generation_config"])
            setattr(call["generation_config"], limit, lowered)
        else:
            call[limit] = lowered
    return call


def restore_prompt(outputs: Tensor | ModelOutput, prompt: Tensor, pruned_length: int) -> Tensor | ModelOutput:
    """What `generate` returned, with the pruned prompt in its sequences [R, S' + new] replaced by `prompt` [B, S]."""
    sequences = outputs if isinstance(outputs, Tensor) else outputs.sequences
    prompts = prompt.repeat_interleave(sequences.shape[0] // prompt.shape[0], dim=0).to(sequences.device)
    sequences = torch.cat([prompts, sequences[:, pruned_length:]], dim=1)
    if isinstance(outputs, Tensor):
        return sequences
    outputs.sequences = sequences
    return outputs


@contextmanager
def always_masked(model: PreTrainedModel):
    """Gives every forward call of this thread a mask.

    `generate` drops one that is all ones; with the cache off, attention then reads the gaps of original positions as
    the starts of packed sequences.
    """

    thread = threading.get_ident()

    def add_mask(module, args, kwargs):
        if threading.get_ident() == thread and kwargs.get("attention_mask") is None:
            ids = kwargs.get("input_ids")
            like = kwargs["inputs_embeds"][..., 0] if ids is None else ids  # [B, S]
            kwargs["attention_mask"] = torch.ones_like(like, dtype=torch.long)
        return args, kwargs

    with HOOKING:
        hook = model.register_forward_pre_hook(add_mask, with_kwargs=True)
    try:
        yield
    finally:
        with HOOKING:
            hook.remove()


@dataclass(frozen=True)
class _CachedPrompt:
    """What is known about the prompt in a key-value cache."""

    # int64 [B]: how far positions run ahead of the tokens cached; 0 for compact ones. None: the prompt was not pruned.
    skipped: Tensor | None
    restored: bool  # whether the sequences returned beside the cache hold the unpruned prompt


_CACHED_PROMPTS: WeakKeyDictionary[Cache, _CachedPrompt] = WeakKeyDictionary()


def _cache_of(call: dict[str, Any], outputs: Tensor | ModelOutput) -> Cache | None:
    cache = given(call, "cache")
    return returned(outputs, "cache") if cache is None and isinstance(outputs, ModelOutput) else cache


def unpruned(original: Callable, call: dict[str, Any]) -> Tensor | ModelOutput:
    """Runs a `generate` that lost no tokens, and notes so of its cache, unless that holds a pruned prompt already."""
    outputs = original(**call)
    cache = _cache_of(call, outputs)
    if cache is not None:
        _CACHED_PROMPTS.setdefault(cache, _CachedPrompt(None, restored=False))
    return outputs


def remember_cache(call: dict[str, Any], outputs: Tensor | ModelOutput, pruned: Pruned, restored: bool) -> None:
    """Notes what the cache of a `generate` call holds, if the caller can get at it."""
    cache = _cache_of(call, outputs)
    if cache is None:
        return
    sequences = outputs if isinstance(outputs, Tensor) else outputs.sequences
    skipped = pruned.next_position - pruned.kept.sum(dim=1)  # [B]
    skipped = skipped.repeat_interleave(sequences.shape[0] // len(skipped))
    _CACHED_PROMPTS[cache] = _CachedPrompt(skipped, restored)


def forget_emptied(call: dict[str, Any]) -> None:
    """A cache that is reset holds no pruned prompt any more."""
    cache = given(call, "cache")
    if cache is not None and filled_cache(call) is None:
        _CACHED_PROMPTS.pop(cache, None)


def check_continued_prompt(call: dict[str, Any]) -> None:
    """Raises if the call continues a cache of pruned tokens with sequences that hold the unpruned prompt."""
    cache = filled_cache(call)
    if cache is not None and cache in _CACHED_PROMPTS and _CACHED_PROMPTS[cache].restored:
        raise ValueError(
            f"{name_in(call, 'cache')} holds a pruned prompt, but the sequences returned with it hold the original one,"
            " so they do not line up: generate the first turn with restore_prompt=False to continue from its cache"
        )


def continue_positions(
    call: dict[str, Any], whole: bool, removed: int, must_be_known: bool, from_latest: bool
) -> dict[str, Any]:
    """The call with the position ids of a later turn, where those that transformers counts may be wrong.

    Args:
        whole: `input_ids` may hold what is cached, too, as those of `generate` do.
        removed: columns that the latest prompt lost.
        must_be_known: raise ValueError for a cache that did not come from a pruned `generate`.
        from_latest: the model counts on from its latest prompt, which need not be the one in the cache.
    """
    cache = filled_cache(call)
    if cache is None or call.get("position_ids") is not None:
        return call
    known = _CACHED_PROMPTS.get(cache)
    prompt, mask = call.get("input_ids"), call.get("attention_mask")
    whole = whole and prompt is not None
    if prompt is None:
        prompt = call.get("inputs_embeds")
        if prompt is None:
            return call  # an error of the model's
        prompt = prompt[..., 0]  # [B, new]
    cached, new = cache.get_seq_length(), prompt.shape[1]
    length = new if whole and new > cached else cached + new
    widths = (new, cached + new) if whole else (length,)
    misfit = mask is not None and mask.dim() == 2 and mask.shape[1] not in widths
    pruned = known is not None and known.skipped is not None
    # transformers cuts a mask that is too long, and reads the wrong end of it.
    if misfit and (pruned or (known is None and mask.shape[1] - length == removed)):
        raise ValueError(
            f"attention_mask must have {length} columns, those of the pruned prompt in {name_in(call, 'cache')} and "
            f"of the tokens after it, got {mask.shape[1]}"
        )
    if known is None and must_be_known:
        raise ValueError(
            f"position_ids must be given with positions='original' and a {name_in(call, 'cache')} that did not come "
            "from a pruned generate: they go on from pruning.last.next_position"
        )
    if not pruned or not (from_latest or bool(known.skipped.any())):
        return call
    if prompt.shape[0] != known.skipped.shape[0]:
        raise ValueError(
            f"input_ids must hold the {known.skipped.shape[0]} rows of {name_in(call, 'cache')}, got {prompt.shape[0]}"
        )
    if mask is None:
        mask = prompt.new_ones((prompt.shape[0], length), dtype=torch.long)
    ahead = known.skipped.to(mask.device)[:, None]
    position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0) + ahead  # [B, cached + new]
    return {**call, "position_ids": position_ids[:, -prompt.shape[1] :]}
