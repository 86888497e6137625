"""Pruning of one model: what its calls and its `generate` do instead, and the functions that begin and end it."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator, ExitStack
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf import generation, training
from lvtp.hf.arguments import filled_cache
from lvtp.hf.families import family_of, tuner_around, unwrapped
from lvtp.hf.installed import before_tuner, install, uninstall
from lvtp.hf.options import Keep, Method, Options, Score
from lvtp.hf.rewrite import Pruned, check_unseen, has_pixels, rewrite
from lvtp.importance import HOOKING


class _Latest(NamedTuple):
    """What a call left behind for those after it."""

    pruned: Pruned | None
    removed: int  # columns that the latest prompt with images lost


class _Here(threading.local):
    """What concerns the calls of one thread alone."""

    latest: _Latest | None = None  # None: it has made no call
    generating: bool = False  # inside `generate`, which calls the model itself


class Pruning:
    """Pruning active on one model, from `patch` or `prune`.

    Attributes:
        options: what was asked for.
        thread: the one that began it.
    """

    def __init__(self, model: PreTrainedModel, options: Options):
        self.options = options
        self._latest = _Latest(None, removed=0)  # of any thread
        self._here = _Here()
        self.thread = threading.current_thread()
        base = unwrapped(model)
        self._family = family_of(base, options)
        self._model = ref(base)
        self._tuner_hook = None
        if (tuner := tuner_around(model)) is not None:
            # Before PEFT 0.21, that calls `forward`, past the model's hooks.
            with HOOKING:
                self._tuner_hook = tuner.register_forward_pre_hook(before_tuner, with_kwargs=True)
        install(base, self)

    def remove(self) -> None:
        """Ends it; a second call does nothing. Several on one model may end in any order."""
        with HOOKING:
            if self._tuner_hook is not None:
                self._tuner_hook.remove()
        model = self._model()
        if model is not None:
            uninstall(model, self)

    @property
    def last(self) -> Pruned | None:
        """What the latest prompt kept; None before the first one, and after one without images.

        It is the latest prompt of the thread that asks. A thread that has made no call is told the latest of any.
        """
        return (self._here.latest or self._latest).pruned

    def _note(self, pruned: Pruned | None, removed: int | None = None) -> None:
        removed = (self._here.latest or self._latest).removed if removed is None else removed
        self._here.latest = self._latest = _Latest(pruned, removed)

    def forward(self, model: PreTrainedModel, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments for `model.forward` instead of `call`."""
        generation.forget_emptied(call)
        if not has_pixels(self._family, call):
            self._without_pixels(model, call)
            return self._continued(call)
        call, pruned = self._rewritten(model, call)
        if pruned.columns is not None and call.get("labels") is not None and not torch.is_grad_enabled():
            training.warn_of_columns()
        return call

    def in_step(self, logits: Tensor | tuple, labels: Tensor) -> Tensor:
        """The logits of the latest `model(...)` in step with its labels; for Trainer's `preprocess_logits_for_metrics`.

        Args:
            logits: [B, S', ...], or a tuple that begins with them.
            labels: [B, S], or wider.

        Returns:
            [B, S, ...]: column i predicts label i + 1, as it does unpruned; where a token was dropped, it is that of
            the last one before it.
        """
        return training.in_step(logits, labels, None if self.last is None else self.last.columns)

    def _rewritten(self, model: PreTrainedModel, call: dict[str, Any], **purpose) -> tuple[dict[str, Any], Pruned]:
        given = "inputs_embeds" if call.get("input_ids") is None else "input_ids"
        before = call.get(given)
        call, pruned = rewrite(model, self._family, call, self.options, **purpose)
        self._note(pruned, removed=before.shape[1] - call[given].shape[1])
        return call, pruned

    def _without_pixels(self, model: PreTrainedModel, call: dict[str, Any]) -> Pruned | None:
        """Looks at a call that has nothing to encode; returns what it kept if it comes from `prepare`."""
        if self._here.generating or filled_cache(call) is not None:
            return None
        pruned = getattr(call.get("mm_encoder_outputs"), "pruned", None)
        self._note(pruned)
        check_unseen(model, self._family, call)
        return pruned

    def _continued(self, call: dict[str, Any], whole: bool = False) -> dict[str, Any]:
        """A call without images, which may go on from a cache."""
        by_itself = self._family.continues_by_itself
        ours = self._family.positions(self.options) == "original" and not by_itself
        removed = (self._here.latest or self._latest).removed
        return generation.continue_positions(
            call, whole, removed, must_be_known=ours and removed > 0, from_latest=by_itself
        )

    @torch.no_grad()
    def generate(self, original: Callable, model: PreTrainedModel, call: dict[str, Any]):
        """What `model.generate` does instead of `original(**call)`."""
        original = self._noted(original)
        positions = self._family.positions(self.options)
        generation.forget_emptied(call)
        if not has_pixels(self._family, call):
            generation.check_continued_prompt(call)
            prepared = self._without_pixels(model, call)
            if prepared is None:
                return generation.unpruned(original, self._continued(call, whole=True))
            outputs = original(**call)
            generation.remember_cache(call, outputs, prepared, restored=False)
            return outputs
        generation.check_chunks(model, call)
        given = "inputs_embeds" if call.get("input_ids") is None else "input_ids"
        prompt = call.get(given)
        if self.options.restore_prompt and prompt is not None:
            generation.check_limits(model, call, prompt.shape[1])
        call, pruned = self._rewritten(model, call, generating=True)
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
        generation.remember_cache(call, outputs, pruned, restored)
        if restored:
            outputs = generation.restore_prompt(outputs, prompt, pruned_length)
        return outputs

    def _noted(self, original: Callable) -> Callable:
        """`original`, and it is noted that what calls the model meanwhile is `generate`."""

        def generate(**call):
            before, self._here.generating = self._here.generating, True
            try:
                return original(**call)
            finally:
                self._here.generating = before

        return generate


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
) -> AbstractContextManager[Pruning]:
    """Prunes the visual tokens of every `model(...)` and `model.generate(...)` inside the context.

    The language model reads a shorter prompt: logits, loss and cache are those of the shorter one. Calls without
    images, and all calls where `keep` covers every token, give what the unpruned model gives, bit for bit.

    The loss is the mean over the labels that are left, also where a trainer gives `num_items_in_batch`, its count over
    all calls of a step: that is scaled by the share of this call's labels that is left, which gives the mean over the
    step where its calls keep equal shares (one call; or placeholders labelled -100), and else one in which every call
    weighs what it does unpruned. `Pruning.in_step` lines the logits up with the labels that a trainer has.

    Samples packed into one row, told by `position_ids` that start again, `cu_seq_lens_q` or `seq_idx`, are pruned as if
    each were alone, and none reads another; that row has no cache. Where positions have three axes, `position_ids` on
    one axis only tell where samples start.

    Args:
        model: one of `lvtp.hf.supported()`, or a `PeftModel`, what `torch.compile` returned or a pipeline around one.
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

    Any number of threads may call the model, and open contexts of their own on it: of several, the innermost that the
    calling thread opened counts. A thread that opened none, such as one started inside a context, prunes as the thread
    does that was the first to open one. What `prune` returns may be entered again. (`patch` is the same, from its call
    to `remove`.)

    Yields:
        A `Pruning`; its `last` says what the latest call kept.

    Raises:
        TypeError: `model` is of an unsupported class, or `method` returned something else than indices.
        ValueError: an argument here, or of a call inside, that pruning cannot serve; the message names it.
        RuntimeError: from the selector.
    """
    return _Prune(model, Options(method, keep, score, positions, scope, newline, restore_prompt))


class _Opened(threading.local):
    """The prunings that one thread entered and has not left."""

    def __init__(self):
        self.prunings: list[Pruning] = []


class _Prune(ContextDecorator):
    """What `prune` returns: it may be entered any number of times, also inside itself and from several threads."""

    def __init__(self, model: PreTrainedModel, options: Options):
        family_of(unwrapped(model), options)  # raises
        self._model, self._options, self._opened = model, options, _Opened()

    def __enter__(self) -> Pruning:
        self._opened.prunings.append(Pruning(self._model, self._options))
        return self._opened.prunings[-1]

    def __exit__(self, *exception) -> None:
        self._opened.prunings.pop().remove()
