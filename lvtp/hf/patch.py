"""Pruning of one model: what its calls and its `generate` do instead, and the functions that begin and end it."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator, ExitStack
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf import generation, training, turns
from lvtp.hf.arguments import filled_cache
from lvtp.hf.families import family_of, tuner_around, unwrapped
from lvtp.hf.installed import before_tuner, install, uninstall
from lvtp.hf.options import Keep, Method, Options, Score
from lvtp.hf.rewrite import (
    Pruned,
    PrunedOutputs,
    check_unseen,
    has_pixels,
    pad_token_id,
    placeholder_id,
    rewrite,
)
from lvtp.hf.sequence import last_position
from lvtp.importance import HOOKING


class _Here(threading.local):
    """What concerns the calls of one thread alone."""

    called: bool = False  # whether it has made a call
    last: Pruned | None = None  # what its latest prompt kept
    generating: bool = False  # inside `generate`, which calls the model itself


class Pruning:
    """Pruning active on one model, from `patch` or `prune`.

    Attributes:
        options: what was asked for.
        thread: the one that began it.
    """

    def __init__(self, model: PreTrainedModel, options: Options):
        self.options = options
        self._last: Pruned | None = None  # of any thread
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
        return self._here.last if self._here.called else self._last

    def _note(self, pruned: Pruned | None) -> None:
        self._here.called, self._here.last, self._last = True, pruned, pruned

    def forward(self, model: PreTrainedModel, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments for `model.forward` instead of `call`."""
        if self._here.generating and not has_pixels(self._family, call):
            return call  # `generate` saw to everything
        turn = self._turn(model, call, generating=False)
        if has_pixels(self._family, call):
            call = self._rewritten(model, call, turn)
            if self.last.columns is not None and call.get("labels") is not None and not torch.is_grad_enabled():
                training.warn_of_columns()
            return call
        self._without_pixels(model, call)
        if turn is None:
            return call
        new = turn.text(by_mask=self._family.continues_by_itself)
        return turn.resumed(new, generating=False, pad_token_id=pad_token_id(model, self._family))

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

    @torch.compiler.disable
    def called(self, call: dict[str, Any], outputs: Any) -> None:
        """Notes what `call` of the model left in its cache, unless `generate` made it, after which that is noted."""
        if self._here.generating:
            return
        encoded = call.get("mm_encoder_outputs")
        if isinstance(encoded, PrunedOutputs):
            turns.note(call, outputs, encoded.prompt)
        elif call.get("position_ids") is None:
            turns.note_text(call, outputs)

    def _turn(self, model: PreTrainedModel, call: dict[str, Any], generating: bool) -> turns.Turn | None:
        turns.forget_emptied(call)
        return turns.begin(
            call,
            generating=generating,
            pixels=has_pixels(self._family, call),
            by_itself=self._family.continues_by_itself,
            placeholders=[placeholder_id(model, modality) for modality in self._family.modalities],
        )

    def _rewritten(
        self, model: PreTrainedModel, call: dict[str, Any], turn: turns.Turn | None, generating: bool = False
    ) -> dict[str, Any]:
        restored = self.options.restore_prompt
        call, pruned = rewrite(
            model, self._family, call, self.options, turn=turn, generating=generating, restored=restored
        )
        self._note(pruned)
        return call

    def _without_pixels(self, model: PreTrainedModel, call: dict[str, Any]) -> None:
        """Looks at a call that has nothing to encode."""
        if self._here.generating or filled_cache(call) is not None:
            return
        self._note(getattr(call.get("mm_encoder_outputs"), "pruned", None))  # it has one if it comes from `prepare`
        check_unseen(model, self._family, call)

    @torch.no_grad()
    def generate(self, original: Callable, model: PreTrainedModel, call: dict[str, Any]):
        """What `model.generate` does instead of `original(**call)`."""
        given, asked = "inputs_embeds" if call.get("input_ids") is None else "input_ids", call
        call, prompt = self._shortened(model, call)
        whole, restored = asked.get(given), None
        shortened = call.get(given) is not whole
        if shortened and self.options.restore_prompt:
            call = generation.lower_limits(model, call, by=whole.shape[1] - call[given].shape[1])
            if given == "input_ids":  # the output of a prompt of embeddings holds the new tokens alone
                restored = generation.Restored(whole, call[given])
                call = restored.call(model, call)
        with ExitStack() as stack:
            original_positions = self._family.positions(self.options) == "original"
            if shortened and original_positions and generation.setting(model, call, "use_cache") is False:
                stack.enter_context(generation.always_masked(model))
            outputs = self._noted(original)(**call)
        turns.note(call, outputs, prompt)
        return outputs if restored is None else restored.outputs(outputs)

    def _shortened(
        self, model: PreTrainedModel, call: dict[str, Any]
    ) -> tuple[dict[str, Any], turns.CachedPrompt | None]:
        """The call that `generate` makes instead, and what it leaves in its cache, if that is to be noted."""
        turn = self._turn(model, call, generating=True)
        if has_pixels(self._family, call):
            generation.check_chunks(model, call)
            new = self._rewritten(model, call, turn, generating=True)
            if self.options.restore_prompt:
                generation.check_limits(model, call, turns.prompt_of(call).shape[1])
            return new, new["mm_encoder_outputs"].prompt
        self._without_pixels(model, call)
        if turn is not None:
            new = turn.text(by_mask=True)
            real = turns.mask_of(new).bool()
            before = turn.before.position  # a row may have no new tokens
            position = (last_position(new["position_ids"], real) + 1).maximum(before.to(real.device))
            prompt = turns.after(turn, real, real, position, pruned=False, restored=self.options.restore_prompt)
            return turn.resumed(new, generating=True, pad_token_id=pad_token_id(model, self._family)), prompt
        if filled_cache(call) is not None:
            return call, None
        prepared = call.get("mm_encoder_outputs")
        if not isinstance(prepared, PrunedOutputs):
            return call, turns.text_prompt(call, generating=True)
        prompt = prepared.prompt
        if call.get("position_ids") is None and not self._family.continues_by_itself:  # `generate` numbers tokens
            prompt = replace(prompt, skipped=torch.zeros_like(prompt.skipped))
        return call, prompt

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
        restore_prompt: `generate` returns the original prompt before the new tokens, `max_length` counts it, and your
            own stopping criteria, logits processors and streamers see it. Off: all of these have the pruned prompt. A
            later turn, which belongs inside a context too, goes on from the cache with the sequences that were
            returned, and with the pixels of its own images alone; its mask covers the same sequences.

    Any number of threads may call the model, and open contexts of their own on it: of several, the innermost that the
    calling thread opened counts. A thread that opened none, such as one started inside a context, prunes as the thread
    does that was the first to open one. Tasks of asyncio in one thread have its contexts in common. What `prune`
    returns may be entered again. (`patch` is the same, from its call to `remove`.)

    Yields:
        A `Pruning`; its `last` says what the latest call kept.

    Raises:
        TypeError: `model` is of an unsupported class, or `method` returned something else than indices.
        ValueError: an argument here, or of a call inside, that pruning cannot serve; the message names it.
        RuntimeError: from the selector.
    """
    return _Prune(model, Options(method, keep, score, positions, scope, newline, restore_prompt))


class _Prune(ContextDecorator):
    """What `prune` returns: it may be entered any number of times, also inside itself and from several threads."""

    def __init__(self, model: PreTrainedModel, options: Options):
        family_of(unwrapped(model), options)  # raises
        self._model, self._options = model, options
        self._opened: list[Pruning] = []
        self._opening = threading.Lock()

    def __enter__(self) -> Pruning:
        pruning = Pruning(self._model, self._options)
        with self._opening:
            self._opened.append(pruning)
        return pruning

    def __exit__(self, *exception) -> None:
        here = threading.current_thread()
        with self._opening:  # a server may leave it in another thread than it was entered in
            pruning = ([one for one in self._opened if one.thread is here] or self._opened)[-1]
            self._opened.remove(pruning)
        pruning.remove()
