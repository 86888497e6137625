"""What `generate` needs around a shortened prompt: length limits, and the original prompt for all that sees its ids."""

import copy
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers.generation.utils
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

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


@dataclass(frozen=True)
class Restored:
    """The original prompt in the place of the shortened one, in ids that `generate` hands out."""

    prompt: Tensor  # [B, S]
    shortened: Tensor  # [B, S']

    @property
    def pruned_length(self) -> int:
        return self.shortened.shape[1]

    def ids(self, ids: Tensor) -> Tensor:
        """[R, S' + new] -> [R, S + new], R a multiple of B."""
        prompts = self.prompt.repeat_interleave(len(ids) // len(self.prompt), dim=0).to(ids.device)
        return torch.cat([prompts, ids[:, self.pruned_length :]], dim=1)

    def outputs(self, outputs: Tensor | ModelOutput) -> Tensor | ModelOutput:
        """What `generate` returned."""
        if isinstance(outputs, Tensor):
            return self.ids(outputs)
        outputs.sequences = self.ids(outputs.sequences)
        return outputs

    def call(self, model: PreTrainedModel, call: dict[str, Any]) -> dict[str, Any]:
        """The call, in which all that the caller gave to look at the ids finds the original prompt in them.

        What transformers makes from its settings counts from the shortened prompt itself.
        """
        call, removed = dict(call), self.prompt.shape[1] - self.pruned_length
        for name, kind in (("stopping_criteria", StoppingCriteriaList), ("logits_processor", LogitsProcessorList)):
            if call.get(name):
                call[name] = kind(self._adapted(one, removed) for one in call[name])
        if call.get("streamer") is not None:
            call["streamer"] = _Streamer(call["streamer"], self)
        allowed = call.get("prefix_allowed_tokens_fn")
        if allowed is not None:
            beams = setting(model, call, "num_beams") or 1
            times = max(setting(model, call, "num_return_sequences") or 1, beams) // beams

            def allowed_after(group: int, ids: Tensor):
                # A group is a prompt, or before 5.24 one of the sequences sampled for it.
                prompts = self.shortened.to(ids.device)
                of = group if group < len(prompts) and torch.equal(ids[: self.pruned_length], prompts[group]) else None
                prompt = self.prompt[group // times if of is None else of].to(ids.device)
                return allowed(group, torch.cat([prompt, ids[self.pruned_length :]]))

            call["prefix_allowed_tokens_fn"] = allowed_after
        return call

    def _adapted(self, one: Callable, removed: int) -> Callable:
        """A stopping criterion or logits processor of the caller's."""
        if type(one).__module__ not in (StoppingCriteria.__module__, LogitsProcessor.__module__):
            return _Looking(one, self)
        # It replaces the one of its type that transformers would make, so its type has to stay.
        counter = _COUNTERS.get(type(one).__name__)
        if not counter or not getattr(one, counter, None):
            return one
        one = copy.copy(one)
        setattr(one, counter, max(getattr(one, counter) - removed, 0))
        return one


# What counts the columns of the prompt in transformers' own criteria and processors. The others look at new tokens, at
# the last ones, or for tokens that are in the shortened prompt, too.
_COUNTERS = {
    "MaxLengthCriteria": "max_length",
    "MinLengthLogitsProcessor": "min_length",
    "MinNewTokensLengthLogitsProcessor": "prompt_length_to_skip",
    "ForcedEOSTokenLogitsProcessor": "max_length",
    "SuppressTokensAtBeginLogitsProcessor": "begin_index",
    "ExponentialDecayLengthPenalty": "regulation_start",
    "RepetitionPenaltyLogitsProcessor": "prompt_ignore_length",
}


class _Looking:
    """A criterion or processor of the caller's, called with the original prompt; it has the attributes of that."""

    def __init__(self, called: Callable, restored: Restored):
        self._called, self._restored = called, restored

    def __call__(self, ids: Tensor, scores: Tensor):
        return self._called(self._restored.ids(ids), scores)

    def __getattr__(self, name: str):
        if name.startswith("_"):  # not there yet while it is copied
            raise AttributeError(name)
        return getattr(self._called, name)


class _Streamer:
    """A caller's streamer, which gets the original prompt and then the new tokens."""

    def __init__(self, streamer: Any, restored: Restored):
        self._streamer, self._restored = streamer, restored

    def put(self, ids: Tensor) -> None:
        if self._restored is not None:
            ids, self._restored = self._restored.ids(ids), None
        self._streamer.put(ids)

    def end(self) -> None:
        self._streamer.end()


@contextmanager
def always_masked(model: PreTrainedModel):
    """Gives every forward call of this thread a mask.

    `generate` drops one that is all ones; with the cache off, attention then reads the gaps of original positions as
    the starts of packed sequences.
    """

    thread = threading.get_ident()

    def add_mask(module, args, kwargs=None):
        if kwargs is None:  # another thread took its hook away meanwhile
            return None
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
