"""The steps of `lvtp demo`, each announced in one line so that nobody is left waiting."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import lvtp
import lvtp.hf
from lvtp.demo import DemoError, descriptors, loops, measure, model, photo, picture, table
from lvtp.hf.tower import encode_with_tower

METHODS = {"id_selection": "ID-Selection", "prune_sid": "PruneSID"}
BUDGETS = [64, 16]  # tokens kept of 576
NEW_TOKENS = 8  # generated; 32 with a trained model, whose words are worth reading
NEW_TOKENS_TRAINED = 32
SELECTION_ROUNDS, PREFILL_ROUNDS = 15, 5

Picks = dict[tuple[str, int], Tensor]  # (method, budget) -> int64 [K]
Calls = dict[tuple[str, int], Callable[[], object]]  # (method, budget) -> what is timed


def run(photo_path: Path | None, checkpoint: str | None, out: Path) -> None:
    """Write `descriptors.png`, `tower.png` and `table.txt` into `out`, and print the table. Raises DemoError."""
    start = time.perf_counter()
    first, second, written = files = [out / name for name in ("descriptors.png", "tower.png", "table.txt")]
    _check_writable(out, files)  # first, because the model takes long to build
    image = _photograph(photo_path)
    subject = _subject(checkpoint, image)
    with torch.inference_mode():
        _say("Picture from patch descriptors: colour and DCT, classical saliency; meaningful without training")
        rgb = photo.to_tensor(image)
        features, importance = descriptors.patch_descriptors(rgb), descriptors.saliency(rgb)
        source = "Features: colour and DCT of each patch. Importance: classical saliency. No trained weights involved."
        draw(first, image, features, importance, source)

        _say(f"generate, all {model.VISUAL_TOKENS} visual tokens: {_generate(subject)}")
        for method, name in METHODS.items():
            for k in BUDGETS:
                with lvtp.hf.prune(subject.model, method=method, keep=k) as pruning:
                    answer = _generate(subject)
                _say(f"generate, {pruning.last.counts[0]} by {name}: {answer}")

        _say(f"Picture from the vision tower of {subject.name}")
        features, importance = tower_tokens(subject)
        source = f"Features and CLS attention of the vision tower: {subject.name}."
        draw(second, image, features, importance, source)

        text = make_table(subject, features, importance)
    written.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # a checkpoint's name may be any bytes
    print(f"\n{text}\n", flush=True)
    _say(f"Done in {time.perf_counter() - start:.0f} s. Table: {written}")
    print(f"Picture from descriptors: {first}\nPicture from the tower:   {second}", flush=True)


def _say(line: str) -> None:
    print(f"- {line}", flush=True)


def _check_writable(out: Path, files: list[Path]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        for file in files:
            if file.exists():
                file.open("r+b").close()
    except OSError as error:
        raise DemoError(f"--out {out} cannot be written to: {error}. Name another folder.") from error


def _photograph(path: Path | None) -> Image.Image:
    path = path or photo.sample_photo()
    _say(f"Photograph {path.name}, cropped to {photo.SIDE} x {photo.SIDE}: {model.VISUAL_TOKENS} patches")
    try:
        return photo.crop(photo.load(path))
    except OSError as error:
        raise DemoError(f"{path} is not a photograph that can be read: {error}.") from error


def _subject(checkpoint: str | None, image: Image.Image) -> model.Subject:
    if checkpoint:
        _say(f"Loading {checkpoint} (safetensors only, no remote code)")
        return model.checkpoint_subject(checkpoint, image)
    _say("Building an untrained LLaVA-1.5 of true token geometry")
    subject = model.untrained_subject(image)
    _say(f"Built: {subject.name}, on {subject.device}")
    return subject


def tower_tokens(subject: model.Subject) -> tuple[Tensor, Tensor]:
    """What the selectors see in the model: features [1, 576, Dv], and CLS attention, fp32 [1, 576]."""
    pixels = {"pixel_values": subject.inputs["pixel_values"]}
    seen = encode_with_tower(subject.model, "image", pixels, "auto")
    return seen.features, seen.importance


def select(features: Tensor, importance: Tensor) -> Picks:
    """Every selector at every budget on one image, features [1, N, D], importance [1, N]."""
    picks = {}
    for k in BUDGETS:
        picks["id_selection", k] = lvtp.id_selection(features, importance, k)[0].cpu()
        picks["prune_sid", k] = lvtp.prune_sid(features, importance, k)[0].cpu()
    return picks


def draw(path: Path, image: Image.Image, features: Tensor, importance: Tensor, source: str) -> Picks:
    """Select and write the picture; returns the picks drawn."""
    picks = select(features, importance)
    ordered, grouped = [], []
    for k in BUDGETS:
        labels, _ = lvtp.psca(features, k // 4)  # the groups PruneSID makes at this budget
        ordered.append(picture.order_panel(f"ID-Selection, {k} tokens", picks["id_selection", k]))
        grouped.append(picture.group_panel(f"PruneSID, {k} tokens", picks["prune_sid", k], labels[0].cpu()))
    title = f"{model.VISUAL_TOKENS} visual tokens in, {' or '.join(map(str, BUDGETS))} out"
    picture.draw(path, image, importance[0].cpu(), [ordered, grouped], title, source)
    return picks


def _generate(subject: model.Subject) -> str:
    new = NEW_TOKENS_TRAINED if subject.trained else NEW_TOKENS
    ids = subject.model.generate(**subject.inputs, max_new_tokens=new, do_sample=False)
    return subject.decode(ids[0, subject.inputs["input_ids"].shape[1] :])


def make_table(subject: model.Subject, features: Tensor, importance: Tensor) -> str:
    """Time the selectors, the plain loops and the prefill, count FLOPs, and render it all."""
    _say(f"Timing the selectors and the plain loops, medians of up to {SELECTION_ROUNDS} interleaved rounds")
    backends = {method: measure.serving_backend(_selector(method, features, importance, 16)) for method in METHODS}
    selection = measure.median_times(_selections(features, importance, backends), SELECTION_ROUNDS, subject.device)
    _say(f"Timing the prefill of the language model, medians of up to {PREFILL_ROUNDS} interleaved rounds")
    prefill = measure.median_times(_prefills(subject), PREFILL_ROUNDS, subject.device)
    _say(f"Counting the FLOPs of {subject.flops_name} on the meta device")
    removed = measure.flops_removed(subject.flops_config, subject.text_tokens, model.VISUAL_TOKENS, BUDGETS)
    rows = [
        table.Row(
            selector=name,
            tokens=k,
            selection=selection[method, k],
            loop=selection[f"{method} loop", k],
            prefill_before=prefill["before", model.VISUAL_TOKENS],
            prefill_after=prefill[method, k],
            flops_removed=removed[k],
        )
        for method, name in METHODS.items()
        for k in BUDGETS
    ]
    return table.render(rows, _notes(subject, features, backends), measure.machine(subject.device))


def _selector(method: str, features: Tensor, importance: Tensor, k: int) -> Callable[[], Tensor]:
    return partial(getattr(lvtp, method), features, importance, k)


def _selections(features: Tensor, importance: Tensor, backends: dict[str, str]) -> Calls:
    """The same selections by lvtp and by the plain loops."""

    def on(backend: str, select: Callable[[], Tensor]) -> Tensor:
        with lvtp.use_backend(backend):
            return select()

    calls = {}
    for method, loop in (("id_selection", loops.id_selection_loop), ("prune_sid", loops.prune_sid_loop)):
        for k in BUDGETS:
            calls[method, k] = partial(on, backends[method], _selector(method, features, importance, k))
            calls[f"{method} loop", k] = partial(loop, features[0], importance[0], k)
    return calls


def _prefills(subject: model.Subject) -> Calls:
    """The language model alone, on visual tokens encoded beforehand: all of them, then those each selector keeps."""

    def prefill(method: str, keep: int):
        call = lvtp.hf.prepare(subject.model, subject.inputs, method=method, keep=keep)
        return lambda: subject.model(**call, use_cache=True, logits_to_keep=1)

    calls = {("before", model.VISUAL_TOKENS): prefill("id_selection", model.VISUAL_TOKENS)}
    for method in METHODS:
        for k in BUDGETS:
            calls[method, k] = prefill(method, k)
    return calls


def _notes(subject: model.Subject, features: Tensor, backends: dict[str, str]) -> list[str]:
    """What each measured column means, in the order of the numbers in the headings."""
    visual, width = features.shape[1:]
    text = subject.text_tokens
    decoder = subject.model.config.text_config
    everything, bare = f"F({text}+{visual})", f"F({text})"
    return [
        f"{' and '.join(f'lvtp.{m} ({b} backend)' for m, b in backends.items())} "
        f"on the tower's features [1, {visual}, {width}].",
        "lvtp/demo/loops.py on the same features: plain PyTorch, full similarity matrix, eigh, Python loops.",
        f"Language model of {subject.name}, {decoder.num_hidden_layers} layers of {decoder.hidden_size}: "
        f"{text} text tokens and {visual} visual ones before, the kept ones after. The vision tower is not in it.",
        f"Language model of {subject.flops_name}, F(n) FLOPs for n tokens, counted by torch's FlopCounterMode on the "
        f"meta device: ({everything} - F({text}+kept)) / ({everything} - {bare}).",
    ]
