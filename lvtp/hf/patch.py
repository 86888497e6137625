"""Pruning installed on one model: its calls and its `generate` are rewritten, and nothing is left behind after.

A forward hook alone would not do: `generate` encodes the images itself, before the first forward.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf import generation
from lvtp.hf.families import family_of, unwrapped
from lvtp.hf.options import Keep, Method, Options, Score
from lvtp.hf.rewrite import Pruned, has_pixels, rewrite


class Pruning:
    """Pruning active on one model, from `patch` or `prune`.

    Attributes:
        options: what was asked for.
        last: what the latest call with images kept; None before the first one.
    """

    def __init__(self, model: PreTrainedModel, options: Options):
        self.options = options
        self.last: Pruned | None = None
        self._removed = 0  # columns that the latest prompt lost
        base = unwrapped(model)
        self._family = family_of(base, options)
        self._model = ref(base)
        self._tuner_hook = None
        if base is not model and model.base_model is not base:
            # What a PeftModel has around the model; before PEFT 0.21 that calls `forward`, past the model's hooks.
            self._tuner_hook = model.base_model.register_forward_pre_hook(_before_tuner, with_kwargs=True)
        if base not in _INSTALLED:
            _INSTALLED[base] = _Installed(base)
        _INSTALLED[base].prunings.append(self)

    def remove(self) -> None:
        """Ends it; a second call does nothing. Several on one model may end in any order."""
        if self._tuner_hook is not None:
            self._tuner_hook.remove()
        model = self._model()
        installed = _INSTALLED.get(model) if model is not None else None
        if installed is not None and self in installed.prunings:
            installed.prunings.remove(self)
            if not installed.prunings:
                installed.uninstall(model)

    def _forward(self, model: PreTrainedModel, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments for `model.forward` instead of `call`."""
        generation.forget_emptied(call)
        if not has_pixels(self._family, call):
            return self._continued(call)
        return self._rewritten(model, call)

    def _rewritten(self, model: PreTrainedModel, call: dict[str, Any], **purpose) -> dict[str, Any]:
        given = "inputs_embeds" if call.get("input_ids") is None else "input_ids"
        before = call.get(given)
        call, self.last = rewrite(model, self._family, call, self.options, **purpose)
        self._removed = before.shape[1] - call[given].shape[1]
        return call

    def _continued(self, call: dict[str, Any], whole: bool = False) -> dict[str, Any]:
        """A call without images, which may go on from a cache."""
        by_itself = self._family.continues_by_itself
        ours = self._family.positions(self.options) == "original" and not by_itself
        return generation.continue_positions(
            call, whole, self._removed, must_be_known=ours and self._removed > 0, from_latest=by_itself
        )

    @torch.no_grad()
    def _generate(self, original: Callable, model: PreTrainedModel, call: dict[str, Any]):
        """What `model.generate` does instead of `original(**call)`."""
        positions = self._family.positions(self.options)
        generation.forget_emptied(call)
        if not has_pixels(self._family, call):
            generation.check_continued_prompt(call)
            return generation.unpruned(original, self._continued(call, whole=True))
        generation.check_chunks(model, call)
        given = "inputs_embeds" if call.get("input_ids") is None else "input_ids"
        prompt = call.get(given)
        call = self._rewritten(model, call, generating=True)
        if call[given] is prompt:  # everything was kept
            return generation.unpruned(original, call)

        pruned_length = call[given].shape[1]
        if self.options.restore_prompt:
            call = generation.lower_limits(model, call, by=prompt.shape[1] - pruned_length)
        with ExitStack() as stack:
            if positions == "original" and generation.setting(model, call, "use_cache") is False:
                stack.enter_context(generation.always_masked(model))
            outputs = original(**call)
        # The output of a prompt of embeddings holds the new tokens alone.
        restored = self.options.restore_prompt and given == "input_ids"
        generation.remember_cache(call, outputs, self.last, restored)
        if restored:
            outputs = generation.restore_prompt(outputs, prompt, pruned_length)
        return outputs


def patch(
    model: PreTrainedModel,
    method: Method = "id_selection",
    keep: Keep = 64,
    *,
    score: Score = "auto",
    positions: str = "auto",
    scope: str = "image",
    newline: str | None = None,
    restore_prompt: bool = True,
) -> Pruning:
    """Prunes every call of `model` until `.remove()` is called on what it returns.

    Args:
        model, method, keep, score, positions, scope, newline, restore_prompt: see `prune`.
    """
    return Pruning(model, Options(method, keep, score, positions, scope, newline, restore_prompt))


@contextmanager
def prune(
    model: PreTrainedModel,
    method: Method = "id_selection",
    keep: Keep = 64,
    *,
    score: Score = "auto",
    positions: str = "auto",
    scope: str = "image",
    newline: str | None = None,
    restore_prompt: bool = True,
) -> Iterator[Pruning]:
    """Prunes the visual tokens of every `model(...)` and `model.generate(...)` inside the context.

    The language model reads a shorter prompt: logits, loss and cache are those of the shorter one. Where several are
    nested on one model, the innermost counts. Calls without images, and all calls where `keep` covers every token, give
    what the unpruned model gives, bit for bit.

    Samples packed into one row, told by `position_ids` that start again, `cu_seq_lens_q` or `seq_idx`, are pruned as if
    each were alone, and none reads another; that row has no cache.

    Args:
        model: one of `lvtp.hf.supported()`, or a `PeftModel` around one.
        method: "id_selection", "prune_sid", or a selector of your own, called with features [n, N, D], importance
            fp32 [n, N] and k < N, which returns the indices of k different tokens of each, an integer tensor [n, k] in
            any order. It chooses; it cannot merge: one that returns features raises TypeError.
        keep: visual tokens kept of each image, an int of at least 1; or their share, a float in (0, 1]; or an
            `lvtp.Budget`, a total for all images of a prompt. Row separators are not counted.
        score: importance that the selector starts from: "cls", attention of the CLS token; "received", mean attention
            received; "auto", the first where the tower has a CLS token that the language model does not read, else the
            second; "prompt", attention that the last token of the prompt pays to the visual tokens in the second layer
            of the language model, at the cost of reading the whole prompt up to there; or a callable from the features
            that the selector compares [n, N, Dv] to importance [n, N]. ID-Selection takes "cls", and "prompt" where
            there is no CLS token; PruneSID's LLaVA code takes "cls", its Qwen code none at all, which is
            `method=lambda features, scores, k: lvtp.prune_sid(features, None, k)`.
        positions: "compact" numbers the tokens as if those that a prompt loses had never been there, "original" keeps
            their numbers in the unpruned prompt; a prompt that loses none has its own numbers either way.
            "auto" is the family's own choice: original where positions have three axes (Qwen-VL), else compact.
        scope: what `keep` counts over: "image", an image or a whole video; "frame", each frame of a video; "crop", each
            crop of an image, without unpadding and newlines, as the papers prune LLaVA-NeXT. What has no frames or
            crops counts as a whole. A tile of InternVL is an image, a crop and a frame.
        newline: which tokens that separate the rows of a grid of crops stay, where a family has them: "rows", those of
            rows with a token left (None means this one); "drop", none; "all". An image that keeps every token keeps
            them all.
        restore_prompt: `generate` returns the original prompt before the new tokens, and `max_length` counts it. To go
            on from a cache that `generate` filled, turn it off: the cache holds the pruned prompt. Stopping criteria,
            logits processors and streamers see the pruned prompt either way.

    Yields:
        A `Pruning`; its `last` says what the latest call kept.

    Raises:
        TypeError: `model` is of an unsupported class, or `method` returned something else than indices.
        ValueError: an argument here, or of a call inside, that pruning cannot serve; the message names it.
        RuntimeError: from the selector.
    """
    pruning = patch(
        model,
        method,
        keep,
        score=score,
        positions=positions,
        scope=scope,
        newline=newline,
        restore_prompt=restore_prompt,
    )
    try:
        yield pruning
    finally:
        pruning.remove()


class _Installed:
    """The forward hook and the `generate` of one model, shared by all its prunings; the last of `prunings` counts.

    Both find the prunings through the model they are called on, so a deep copy of a patched model is an unpatched one.
    """

    def __init__(self, model: PreTrainedModel):
        self.prunings: list[Pruning] = []
        # from_pretrained puts a `generate` of the checkpoint's own on the instance, if it has one.
        self._own_generate = model.__dict__.get("generate")
        self._hook = model.register_forward_pre_hook(_before_forward, with_kwargs=True, prepend=True)
        self._generate = _generate_of(type(model), self._own_generate)
        model.generate = MethodType(self._generate, model)

    def uninstall(self, model: PreTrainedModel) -> None:
        self._hook.remove()
        del _INSTALLED[model]
        # Somebody else may have wrapped ours meanwhile: then it stays, and passes every call on.
        if getattr(model.__dict__.get("generate"), "__func__", None) is self._generate:
            del model.generate
            if self._own_generate is not None:
                model.generate = self._own_generate


_INSTALLED: WeakKeyDictionary[PreTrainedModel, _Installed] = WeakKeyDictionary()


def _before_forward(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]):
    # The steps of generate bring positions and no pixels; they go straight through, which torch.compile can trace.
    if not args and kwargs.get("position_ids") is not None and not any(name.startswith("pixel") for name in kwargs):
        return None
    installed = _INSTALLED.get(model)
    if installed is None:
        return None
    return (), installed.prunings[-1]._forward(model, _named(type(model).forward, model, args, kwargs))


def _before_tuner(tuner: nn.Module, args: tuple, kwargs: dict[str, Any]):
    return _before_forward(tuner.model, args, kwargs)


def _generate_of(model_class: type[PreTrainedModel], own: Callable | None) -> Callable:
    # generate's signature is part of its interface: transformers and its users inspect it.
    @functools.wraps(model_class.generate)
    def generate(model: PreTrainedModel, *args, **kwargs):
        original = own or MethodType(model_class.generate, model)
        installed = _INSTALLED.get(model)
        if installed is None:
            return original(*args, **kwargs)
        call = _named(model_class.generate, model, args, kwargs)
        if call.get("input_ids") is None and call.get("inputs") is not None:
            call["input_ids"] = call.pop("inputs")
        return installed.prunings[-1]._generate(original, model, call)

    return generate


def _named(method: Callable, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    if not args:
        return dict(kwargs)
    signature = inspect.signature(method)
    named = dict(signature.bind_partial(model, *args, **kwargs).arguments)
    receiver, *_ = signature.parameters
    named.pop(receiver)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named
