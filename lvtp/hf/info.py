"""What pruning would do to a call, from the sizes of its inputs alone."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from lvtp.budget import Budget
from lvtp.hf.families import family_of, unwrapped
from lvtp.hf.family import Family
from lvtp.hf.layout import check_room
from lvtp.hf.options import Keep, Method, Options, Score
from lvtp.hf.packing import sample_lengths, unpacked
from lvtp.hf.rewrite import (
    check_call,
    check_count,
    check_empty,
    check_first,
    check_unseen,
    encoder_arguments,
    given_modalities,
    has_pixels,
    pad_token_id,
    placeholder_id,
    with_ids,
)
from lvtp.hf.selection import count
from lvtp.hf.sequence import real_tokens


@dataclass(frozen=True)
class VisualTokens:
    """One image or video of a call."""

    modality: str  # "image" or "video"
    prompt: int  # the row of the batch, or the sample of a packed row
    columns: tuple[int, int]  # its first placeholder in that prompt and the one after its last
    units: tuple[int, ...]  # what `keep` counts over (the whole of it, its crops or frames): tokens of each
    keeps: tuple[int, ...] | None  # how many of each are kept; None for a dynamic budget, which depends on the content
    placeholders: int  # its tokens in the prompt, newlines among them


@dataclass(frozen=True)
class Info:
    """What a call costs the language model before and after pruning; a pair is (before, after).

    Where it depends on the images how many row separators stay (newline="rows", a dynamic budget), "after" counts as
    many as can.
    """

    model: str
    images: tuple[VisualTokens, ...]
    prompt_tokens: tuple[tuple[int, int], ...]  # of every prompt, without padding
    kv_bytes: tuple[int, int]  # key-value cache of all prompts
    prefill_flops: tuple[int, int]  # all prompts through the decoder layers: matrix products, causal attention

    @property
    def visual_tokens(self) -> int:
        return sum(image.placeholders for image in self.images)

    def __str__(self) -> str:
        prompts = len(self.prompt_tokens)
        lines = [f"{self.model}: {self.visual_tokens} visual tokens in {prompts} prompt{'s' * (prompts != 1)}"]
        for prompt, (before, after) in enumerate(self.prompt_tokens):
            lines.append(f"  prompt {prompt}: {before} tokens -> {after}")
            for image in self.images:
                if image.prompt == prompt:
                    keeps = "by content" if image.keeps is None else _runs(image.keeps)
                    where = f"columns {image.columns[0]}..{image.columns[1] - 1}"
                    lines.append(f"    {image.modality} at {where}: {_runs(image.units)} -> {keeps}")
        for name, step, unit, pair in (
            ("KV cache", 2**10, ("B", "KiB", "MiB", "GiB"), self.kv_bytes),
            ("prefill", 10**3, ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs"), self.prefill_flops),
        ):
            lines.append(f"  {name} {' -> '.join(_scaled(number, step, unit) for number in pair)}")
        return "\n".join(lines)


def info(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    method: Method = "id_selection",
    keep: Keep = 64,
    *,
    score: Score = "auto",
    positions: str = "auto",
    scope: str = "image",
    newline: str | None = None,
) -> Info:
    """How many visual tokens a call has, where they stand, and what pruning would save. Runs nothing.

    Args:
        inputs: keyword arguments of the call, as for `prepare`.
        model, method, keep, score, positions, scope, newline: see `prune`.

    Raises:
        TypeError, ValueError: see `prune`.
    """
    options = Options(method, keep, score, positions, scope, newline)
    model = unwrapped(model)
    family = family_of(model, options)
    if not has_pixels(family, inputs):
        check_unseen(model, family, inputs)
    call = with_ids(model, family, dict(inputs))
    check_call(call)
    check_first(call)
    if (samples := sample_lengths(call)) is not None:
        call = unpacked(call, samples, pad_token_id(model, family))
    real = real_tokens(call)  # [B, S]
    before = real.sum(dim=1).tolist()
    after = list(before)
    images = list(_images(model, family, call, options)) if has_pixels(family, call) else []
    for prompt in range(len(before)):
        places = [place for place, image in enumerate(images) if image.prompt == prompt]
        here = _with_keeps([images[place] for place in places], options.keep)
        for place, image in zip(places, here, strict=True):
            images[place] = image
        after[prompt] -= sum(image.placeholders for image in here) - _left(
            here, options.keep, family.newline(options), scope
        )
    costs = [_costs(model, lengths) for lengths in (before, after)]
    kv_bytes, flops = zip(*costs, strict=True)
    return Info(type(model).__name__, tuple(images), tuple(zip(before, after, strict=True)), kv_bytes, flops)


def _images(model: PreTrainedModel, family: Family, call: dict[str, Any], options: Options) -> Iterator[VisualTokens]:
    check_empty(model, family, call)
    for modality in given_modalities(family, call):
        places = (call["input_ids"] == placeholder_id(model, modality)).nonzero()  # [sum M_i, 2]
        arguments = encoder_arguments(model, modality, call)
        sizes = family.sizes(model, modality, arguments, options.scope)
        check_count(modality, len(sizes), sum(size.placeholders for size in sizes), len(places))
        for size, where in zip(sizes, places.split([size.placeholders for size in sizes]), strict=True):
            (prompt, first), last = where[0].tolist(), int(where[-1, 1])
            yield VisualTokens(modality, prompt, (first, last + 1), size.units, None, size.placeholders)


def _with_keeps(images: list[VisualTokens], keep: Keep) -> list[VisualTokens]:
    """The images of one prompt with what they keep, if it can be known."""
    units = [tokens for image in images for tokens in image.units]
    if not isinstance(keep, Budget):
        keeps = iter([count(keep, tokens) for tokens in units])
    elif not keep.dynamic and units:
        keeps = iter(keep.share([torch.empty(tokens, 0) for tokens in units]))
    else:
        keep.check(len(units))
        return images
    return [replace(image, keeps=tuple(islice(keeps, len(image.units)))) for image in images]


def _left(images: list[VisualTokens], keep: Keep, newline: str | None, scope: str) -> int:
    """Placeholders left of the images of one prompt; at most, where it depends on their content."""
    if any(image.keeps is None for image in images):
        placeholders, tokens = sum(image.placeholders for image in images), sum(sum(image.units) for image in images)
        if keep.total >= tokens:
            return placeholders
        # Only an image that keeps every token may have more of them than placeholders, and one at least does not.
        check_room(keep.total, tokens - min(max(sum(image.units) - image.placeholders, 0) for image in images))
        return min(keep.total + sum(_separators(image, newline, scope, keep.total) for image in images), placeholders)
    left = 0
    for image in images:
        kept = image.placeholders
        if image.keeps != image.units:
            kept = sum(image.keeps) + _separators(image, newline, scope, sum(image.keeps))
            check_room(kept, image.placeholders)
        left += kept
    return left


def _separators(image: VisualTokens, newline: str | None, scope: str, kept: int) -> int:
    if newline in (None, "drop") or (scope == "crop" and image.modality == "image"):
        return 0
    separators = image.placeholders - sum(image.units)
    return separators if newline == "all" else min(separators, kept)


def _costs(model: PreTrainedModel, lengths: list[int]) -> tuple[int, int]:
    """Bytes of the key-value cache and FLOPs of the prefill for prompts of these lengths."""
    config, layers = model.config.get_text_config(), model.get_decoder().layers
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    tokens, pairs = sum(lengths), sum(length * (length + 1) // 2 for length in lengths)
    # What comes out of the projections, whatever their weights are stored as: of the dtype of the embeddings.
    item = model.get_input_embeddings().weight.element_size()
    kv_bytes = 2 * len(layers) * kv_heads * width * item * tokens
    flops = 2 * _weights(layers, config) * tokens + 4 * len(layers) * heads * width * pairs
    return kv_bytes, flops


def _weights(layers: nn.ModuleList, config) -> int:
    """Entries of the matrices that one token is multiplied with; of experts [n, in, out], those it is sent to.

    Of a linear layer by its sizes: what is stored of quantized weights may be packed.
    """
    experts = getattr(config, "num_experts", None) or 1
    active = getattr(config, "num_experts_per_tok", None) or experts
    total = 0
    for module in layers.modules():
        sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if None not in sizes:
            total += 0 if hasattr(module, "base_layer") else math.prod(sizes)  # PEFT's, around one that counts itself
            continue
        for weight in module.parameters(recurse=False):
            if weight.dim() >= 2:
                total += weight.numel() if weight.dim() == 2 else weight.numel() * active // experts
    return total


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    """In the largest of the units, each `step` times the one before, that leaves at least 1."""
    power = next((power for power in range(len(units) - 1) if number < step ** (power + 1)), len(units) - 1)
    return f"{number / step**power:.4g} {units[power]}"


def _runs(numbers: tuple[int, ...]) -> str:
    """(5, 5, 5, 4) -> "3 x 5 + 4" """
    runs = [(number, len(list(same))) for number, same in groupby(numbers)]
    return " + ".join(str(number) if times == 1 else f"{times} x {number}" for number, times in runs)
