"""The stateless core: a call with pixels in, the same call with fewer, already encoded visual tokens out."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.arguments import filled_cache, name_in
from lvtp.hf.families import family_of, unwrapped
from lvtp.hf.family import Encoded, Family
from lvtp.hf.options import Keep, Method, Options, Score
from lvtp.hf.packing import packed, sample_lengths, unpacked
from lvtp.hf.positions import position_after, positions_of, without_collated
from lvtp.hf.prompt import attention_of_the_last_token
from lvtp.hf.selection import budgets, select
from lvtp.hf.sequence import columns_of, laid_out, new_columns, numbered, real_tokens, spanned
from lvtp.hf.training import rescaled
from lvtp.hf.turns import CachedPrompt, Turn, after


@dataclass(frozen=True)
class Pruned:
    """What one call kept."""

    kept: Tensor  # bool [B, S]: the tokens of the original prompt that the language model read
    # Image (crop, frame: see `scope`) i: int64 [K_i], which of its tokens were kept, ascending; images before videos.
    indices: tuple[Tensor, ...]
    counts: tuple[int, ...]  # K_i
    # int64 [B]: the position of the token after the prompt, its tokens counted; of each sample of a packed row. A call
    # of a model by hand with compact positions on one axis counts columns of padding on the left, too.
    next_position: Tensor
    scope: str
    positions: str  # "compact" or "original"
    # int64 [B, S]: where the tokens of the original prompt are in the pruned one; of those dropped, the last token
    # before them. None if everything was kept.
    columns: Tensor | None


class PrunedOutputs(dict[str, ModelOutput]):
    """The encoded images of a call, by modality, after pruning: what tells it from a call that was never pruned."""

    pruned: Pruned
    prompt: CachedPrompt | None  # what the call leaves in its cache; None for packed samples, which have none


def prepare(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    *,
    method: Method = "id_selection",
    keep: Keep = 64,
    score: Score = "auto",
    positions: str = "auto",
    scope: str = "image",
    newline: str | None = None,
) -> dict[str, Any]:
    """The inputs of a pruned call, to pass to `model(...)` or `model.generate(...)` once.

    Changes neither `model` nor `inputs`, but for the `rope_deltas` of a Qwen-VL model, which every call sets: run what
    was prepared before the next call. The result is for one call: `generate` rewrites its containers under beam
    search. The prompt that `generate` returns is the pruned one, and `max_length` counts it. With positions="original"
    do not turn the cache off in `generate`: it drops the attention mask that the positions then need (`prune` sees to
    that); and what the mask hides between tokens is numbered as `model(...)` does, which counts it, not as `generate`.

    Args:
        inputs: keyword arguments of a call with images: `input_ids` [B, S] (or `inputs_embeds` [B, S, D], in which
            placeholders are embedded tokens still), `pixel_values`, `attention_mask` [B, S]
            (required for B > 1), `labels` [B, S] and whatever else the call takes. Without images: returned as is.
        model, method, keep, score, positions, scope, newline: see `prune`.

    Returns:
        `input_ids` and all that runs along it, [B, S']. As many columns of padding follow a prompt as before, so that
        `logits[:, -n:]` are those of the same tokens; the rest of the padding is on the left. With `labels`, a batch
        that is padded on the right alone is no wider than its longest prompt.

    Raises:
        TypeError, ValueError: see `prune`.
    """
    options = Options(method, keep, score, positions, scope, newline)
    model = unwrapped(model)
    family, call = family_of(model, options), dict(inputs)
    if has_pixels(family, call):
        check_first(call)
        return rewrite(model, family, call, options)[0]
    check_unseen(model, family, call)
    return call


def check_unseen(model: PreTrainedModel, family: Family, call: Mapping[str, Any]) -> None:
    """Raises for a prompt without pixels that may hold visual tokens nevertheless: they would stay unpruned."""
    outputs = call.get("mm_encoder_outputs") or {}
    if filled_cache(call) is not None or isinstance(outputs, PrunedOutputs):
        return
    if any(encoded is not None for encoded in outputs.values()):
        raise ValueError(
            f"mm_encoder_outputs must be left out and {' or '.join(family.modalities.values())} given, which pruning "
            "encodes itself; only what lvtp.hf.prepare returns is taken, for it is pruned"
        )
    if call.get("inputs_embeds") is None:
        return
    if call.get("input_ids") is not None:
        tokens = [placeholder_id(model, modality) for modality in family.modalities]
        visual = any(bool((call["input_ids"] == token).any()) for token in tokens)
    else:
        types = call.get("mm_token_type_ids")
        visual = types is None or bool(types.any())
    if visual:
        raise ValueError(
            f"inputs_embeds must come with {' or '.join(family.modalities.values())}, and hold the embeddings of "
            "placeholders where they go: visual tokens that are merged into them already cannot be pruned, nor told "
            "from text (text alone: call outside the context, or give mm_token_type_ids of zeros where the call takes "
            "them)"
        )


def has_pixels(family: Family, call: Mapping[str, Any]) -> bool:
    return bool(given_modalities(family, call))


def given_modalities(family: Family, call: Mapping[str, Any]) -> list[str]:
    """Those of which the call brings pixels. No image at all, or a video without frames, are none."""
    given = []
    for modality, name in family.modalities.items():
        pixels = call.get(name)
        if pixels is not None and not (isinstance(pixels, Tensor) and 0 in pixels.shape[:2]):  # items, and frames
            given.append(modality)
    return given


def check_empty(model: PreTrainedModel, family: Family, call: dict[str, Any]) -> None:
    """Raises for placeholders of pixels that hold nothing: a call with other images goes on without these."""
    for modality in family.modalities.keys() - given_modalities(family, call):
        if call.get(family.modalities[modality]) is not None:
            check_count(modality, 0, 0, int((call["input_ids"] == placeholder_id(model, modality)).sum()))


@torch.compiler.disable  # its shapes depend on the images
def rewrite(
    model: PreTrainedModel,
    family: Family,
    call: dict[str, Any],
    options: Options,
    *,
    turn: Turn | None = None,
    generating: bool = False,
    restored: bool = False,
) -> tuple[dict[str, Any], Pruned]:
    """Encodes the call's images, selects, shortens.

    Args:
        turn: the turn that the call begins, where there are tokens in its cache.
        generating: for `generate`, which is padded on the left; a call of the model as it was.
        restored: whether the caller goes on with a sequence that holds what is pruned.

    Returns:
        The call to make instead, and what it keeps.
    """
    embedded = call.get("input_ids") is None
    call = with_ids(model, family, call if turn is None else turn.new)
    check_call(call)
    whole, pad = call, pad_token_id(model, family)
    samples = sample_lengths(call)
    if samples is not None and generating:
        raise ValueError(
            f"generate takes no packed samples, got {len(samples)} in one row: pass them as rows of a batch"
        )
    if samples is not None and turn is not None:
        raise ValueError(f"{name_in(call, 'cache')} must be empty for packed samples, got {len(samples)} of them")
    if samples is not None:
        call = unpacked(call, samples, pad)
    real = real_tokens(call)  # [B, S]
    if not generating:
        call = without_collated(family, call, real, are_packed=samples is not None)
    positions = family.positions(options)
    kept, indices, encoder_outputs = real.clone(), [], {}
    placeholders, arguments, encoded = {}, {}, {}
    check_empty(model, family, call)
    for modality in given_modalities(family, call):
        arguments |= (taken := encoder_arguments(model, modality, call))
        encoded[modality] = family.encode(model, modality, taken, options.tower_score, options.scope)
        placeholders[modality] = call["input_ids"] == placeholder_id(model, modality)  # [B, S]
        _check_placeholders(modality, placeholders[modality], real, encoded[modality])
    if options.score == "prompt":
        if turn is not None:
            raise ValueError(
                f"{name_in(call, 'cache')} must be empty with score='prompt': the language model would have to look at "
                "the whole conversation to score an image of a later turn"
            )
        encoded = _scored_by_prompt(model, family, call, encoded, placeholders, real)
    selected = _select(encoded, placeholders, options)
    for modality, images in encoded.items():
        mask, tokens = _keep(images, selected[modality], family.newline(options))
        kept[placeholders[modality]] = mask.to(kept.device)
        encoder_outputs[modality] = family.container(modality, images, tokens)
        indices += selected[modality]

    pruned = not torch.equal(kept, real)
    stay = kept | (spanned(real) & ~real)  # what the mask hides inside a prompt stays hidden where it is
    numbers = positions_of(
        model,
        family,
        call,
        real,
        kept,
        positions=positions,
        generating=generating,
        are_packed=samples is not None,
        start=None if turn is None else turn.before.position,
    )
    latest = numbers.masked_fill(~real.to(numbers.device), -1).amax(dim=-1)  # [B], or with axes before
    next_position = latest.view(-1, len(real)).amax(dim=0) + 1
    if turn is not None:  # a row may have no new tokens
        next_position = next_position.maximum(turn.before.position.to(next_position.device))
    placed = pruned or (turn is not None and (turn.moved or family.continues_by_itself))
    if not placed:  # the text stays as it came: bit for bit the unpruned call
        shortened, columns = without_pixels(family, whole), None
    else:
        shortened = without_pixels(family, call)
        spelled = positions == "original" or family.spells_positions or call.get("position_ids") is not None
        if spelled or samples or turn is not None:
            shortened["position_ids"] = numbers
        if positions == "original" and call.get("attention_mask") is None:
            # Without a mask, attention reads a gap in the positions as the start of another packed sequence.
            shortened["attention_mask"] = real.long()
        # With labels, the loss is the model's and nobody counts columns of the logits from the end.
        places = new_columns(real, stay, left=generating, tight=call.get("labels") is not None)
        shortened = laid_out(shortened, stay, places, pad)
        shortened = family.place(model, shortened, next_position, None if turn is None else turn.before)
        shortened = {name: value for name, value in shortened.items() if name not in arguments}
        columns = columns_of(stay, places)
    prompt = None
    if samples is None:
        before = 0 if turn is None else turn.real.shape[1]
        position = position_after(family, shortened, real, next_position, cached=before, generating=generating)
        read = real_tokens(shortened)  # [B, S']
        prompt = after(turn, kept, read, position, pruned=pruned, restored=restored)
    elif placed:
        shortened, columns = packed(model, shortened, whole, pad), numbered(kept[real][None])
    if placed:
        shortened |= rescaled(whole, shortened)
    if embedded:
        del shortened["input_ids"]
    if turn is not None:
        kept = turn.kept(kept)
        shortened = turn.resumed(shortened, generating, pad) if placed else without_pixels(family, turn.call)
    shortened["mm_encoder_outputs"] = encoder_outputs = PrunedOutputs(encoder_outputs)
    counts = tuple(len(index) for index in indices)
    kept = kept if samples is None else kept[real][None]
    encoder_outputs.pruned = Pruned(kept, tuple(indices), counts, next_position, options.scope, positions, columns)
    encoder_outputs.prompt = prompt
    return shortened, encoder_outputs.pruned


def without_pixels(family: Family, call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in family.modalities.values()}


def with_ids(model: PreTrainedModel, family: Family, call: dict[str, Any]) -> dict[str, Any]:
    """The call with `input_ids`, where it has only `inputs_embeds`: placeholders are known by their embeddings, as the
    models know them; the others are padding, which nothing reads."""
    embeds = call.get("inputs_embeds")
    if call.get("input_ids") is not None or embeds is None:
        return call
    if embeds.dim() != 3:
        raise ValueError(f"inputs_embeds must be a [B, S, D] tensor, got shape {list(embeds.shape)}")
    ids = torch.full(embeds.shape[:2], pad_token_id(model, family), device=embeds.device)
    for modality in family.modalities:
        token = torch.tensor(placeholder_id(model, modality), device=embeds.device)
        ids[(embeds == model.get_input_embeddings()(token)).all(dim=-1)] = token
    return {**call, "input_ids": ids}


def check_call(call: dict[str, Any]) -> None:
    """Raises for arguments that a call with pixels cannot be pruned with."""
    if call.get("input_ids") is None:
        raise ValueError("input_ids or inputs_embeds must be given beside the pixels, got neither")
    if call["input_ids"].dim() != 2:
        raise ValueError(f"input_ids must be a [B, S] tensor, got shape {list(call['input_ids'].shape)}")
    if call.get("inputs_embeds") is not None and call["inputs_embeds"].shape[:2] != call["input_ids"].shape:
        raise ValueError(
            f"inputs_embeds must have the rows and columns of input_ids {list(call['input_ids'].shape)}, "
            f"got shape {list(call['inputs_embeds'].shape)}"
        )
    if call.get("mm_encoder_outputs") is not None:
        raise ValueError("mm_encoder_outputs must be left out when pixels are given: pruning encodes them itself")
    if isinstance(call.get("logits_to_keep"), Tensor):
        raise ValueError(
            "logits_to_keep must be an int when pruning, got a tensor (its indices are of the unpruned prompt)"
        )


def check_first(call: dict[str, Any]) -> None:
    """Raises for images that come after cached tokens, which only a patched model can tell from the new ones."""
    cache = filled_cache(call)
    if cache is not None:
        raise ValueError(
            f"{name_in(call, 'cache')} must be empty, got {int(cache.get_seq_length())} tokens: images in a later turn "
            "are pruned by prune and patch"
        )


def encoder_arguments(model: PreTrainedModel, modality: str, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the call that the model's encoder takes, as `generate` finds them."""
    encoder = getattr(model.base_model, f"get_{modality}_features")
    return {name: call[name] for name in inspect.signature(encoder).parameters if name in call}


def _scored_by_prompt(
    model: PreTrainedModel,
    family: Family,
    call: dict[str, Any],
    encoded: dict[str, Encoded],
    placeholders: dict[str, Tensor],
    real: Tensor,
) -> dict[str, Encoded]:
    """The images with importance from the language model instead of the tower."""
    if call.get("inputs_embeds") is not None and call.get("position_ids") is None and family.continues_by_itself:
        # The model alone would number embeddings along one axis.
        call = {**call, "position_ids": family.original_positions(model, call, real, generating=False)}
    outputs = {modality: family.container(modality, images, images.projected) for modality, images in encoded.items()}
    attention = attention_of_the_last_token(model, call, outputs, real)  # [B, S]
    scored = {}
    for modality, images in encoded.items():
        scores = attention[placeholders[modality].to(attention.device)]
        if images.layouts is not None:
            newline = torch.cat([layout.newline for layout in images.layouts])
            scores = scores[~newline.to(scores.device)]
        sizes = [len(tokens) for tokens in images.features]
        scored[modality] = replace(images, importance=list(scores.split(sizes)))
    return scored


def _select(encoded: dict[str, Encoded], placeholders: dict[str, Tensor], options: Options) -> dict[str, list[Tensor]]:
    """The kept tokens of every unit, int64 [K_i], by modality."""
    prompts = {modality: _prompts(images, placeholders[modality]) for modality, images in encoded.items()}
    shared = iter(
        budgets(
            options.keep,
            [unit for images in encoded.values() for unit in images.features],
            [prompt for of_units in prompts.values() for prompt in of_units],
        )
    )
    return {
        modality: select(options.method, images.features, images.importance, list(islice(shared, len(images.features))))
        for modality, images in encoded.items()
    }


def _prompts(images: Encoded, placeholders: Tensor) -> list[int]:
    """The prompt (row of the batch) that each unit stands in."""
    rows = placeholders.nonzero()[:, 0].tolist()
    prompts, start = [], 0
    for image, tokens in enumerate(images.projected):
        units = 1 if images.layouts is None else images.layouts[image].units
        prompts += [rows[start]] * units
        start += len(tokens)
    return prompts


def _keep(images: Encoded, selected: list[Tensor], newline: str | None) -> tuple[Tensor, list[Tensor]]:
    """The placeholders that stay, bool [sum M_i], and the tokens [K_i, D] of each image that replace them."""
    units = zip(images.features, selected, strict=True)
    masks, tokens = [], []
    for image, projected in enumerate(images.projected):
        layout = None if images.layouts is None else images.layouts[image]
        chosen = torch.cat([_mask(*unit) for unit in islice(units, 1 if layout is None else layout.units)])
        mask = chosen if layout is None else layout.kept(chosen, newline)
        masks.append(mask)
        tokens.append(
            projected[mask.to(projected.device)] if layout is None else layout.tokens(projected, chosen, mask)
        )
    return torch.cat(masks), tokens


def _mask(features: Tensor, index: Tensor) -> Tensor:
    """bool [N]"""
    mask = torch.zeros(len(features), dtype=torch.bool, device=index.device)
    mask[index] = True
    return mask


def check_count(modality: str, images: int, wanted: int, got: int) -> None:
    """Raises unless the prompts hold the placeholders of so many images."""
    if wanted != got:
        raise ValueError(
            f"input_ids must hold one placeholder for each of the {wanted} {modality} tokens of {images} {modality}s, "
            f"got {got}"
        )


def _check_placeholders(modality: str, placeholders: Tensor, real: Tensor, encoded: Encoded) -> None:
    sizes = [len(tokens) for tokens in encoded.projected]
    check_count(modality, len(sizes), sum(sizes), int(placeholders.sum()))
    if bool((placeholders & ~real).any()):
        raise ValueError(f"attention_mask must not hide {modality} placeholders")


def placeholder_id(model: PreTrainedModel, modality: str) -> int:
    return getattr(model.config, f"{modality}_token_id")


def pad_token_id(model: PreTrainedModel, family: Family) -> int:
    """The model's padding token; any other text token where it has none, since padding is masked."""
    placeholders = {placeholder_id(model, modality) for modality in family.modalities}
    declared = [model.generation_config.pad_token_id, model.config.get_text_config().pad_token_id]
    usable = [token for token in (*declared, *range(len(placeholders) + 1)) if token is not None and token >= 0]
    return next(token for token in usable if token not in placeholders)
