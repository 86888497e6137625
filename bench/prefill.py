"""`python -m bench.prefill`: what pruning saves of the time to the first token, in transformers' own models.

LLaVA-1.5-7B and LLaVA-NeXT-7B from their configurations, with random weights (they do not change the time; what the
selectors skip on a CPU depends on features, a little), bf16, SDPA. On a CPU the decoder has fewer layers of the true
width, and the rows say so; there, times are CPU time of one thread, to which what else runs adds little.

One call is from the processor's inputs to the first token; its parts, between marks: tower (and projector), importance,
selection, merge (the shorter prompt put together), prefill, first token. The variants of a group take turns; medians.
prefill.json is rewritten after each group.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

import lvtp
import lvtp.hf  # before 14 GB of weights are made: it refuses a transformers that is too old
from bench import baselines, runs
from lvtp.demo.measure import machine

PATCH = 14
IMAGE_TOKEN, TEXT_BEFORE, TEXT_AFTER = 32000, 35, 12  # about Vicuna's system prompt, and a short question
ROUNDS, FEWEST = 20, 3
PARTS = ("tower", "importance", "selection", "merge", "prefill", "first_token")


class Geometry(NamedTuple):
    """Sizes of a model; what is not here is as in the 7B models."""

    label: str
    tower_layers: int = 24
    tower_width: int = 1024
    layers: int = 32
    width: int = 4096
    heads: int = 32
    side: int = 336  # pixels of a crop

    @property
    def tokens(self) -> int:
        """Of a crop."""
        return (self.side // PATCH) ** 2


GEOMETRIES = {
    "7b": Geometry("7B"),
    "cpu": Geometry("scaled down: CLIP-L, and 4 of 32 decoder layers of the 7B width", layers=4),
    "tiny": Geometry("tiny, for a dry run: its times mean nothing", 2, 32, 2, 32, 2, side=112),
}


class Subject(NamedTuple):
    """A model as it is used: crops an image, what a budget counts over, and budgets in tokens a crop of 576."""

    crops: int
    scope: str
    keeps: tuple[int, ...]
    model: type
    config: type


SUBJECTS = {
    "llava-1.5-7b": Subject(1, "image", (192, 128, 64, 32, 16), LlavaForConditionalGeneration, LlavaConfig),
    # As the papers prune it: each crop by itself, without newlines.
    "llava-next-7b": Subject(5, "crop", (128, 64, 32), LlavaNextForConditionalGeneration, LlavaNextConfig),
}


def build(subject: Subject, geometry: Geometry, device: torch.device):
    vision = CLIPVisionConfig(
        hidden_size=geometry.tower_width, intermediate_size=4 * geometry.tower_width,
        num_hidden_layers=geometry.tower_layers, num_attention_heads=max(2, geometry.tower_width // 64),
        image_size=geometry.side, patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=geometry.width, intermediate_size=geometry.width * 43 // 16, num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads, num_key_value_heads=geometry.heads, vocab_size=IMAGE_TOKEN + 64,
        max_position_embeddings=4096,
    )  # fmt: skip
    grid = {"image_grid_pinpoints": [[2 * geometry.side, 2 * geometry.side]]} if subject.crops > 1 else {}
    config = subject.config(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, **grid)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # 14 GB of weights are made where they stay
    try:
        with device:
            model = subject.model(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("sdpa")
    return model


def inputs_of(subject: Subject, geometry: Geometry, batch: int, device: torch.device) -> dict[str, Tensor]:
    """A square image a prompt; LLaVA-NeXT cuts it into two by two crops and an overview, with a newline a row."""
    crops, side = subject.crops, geometry.side
    placeholders = crops * geometry.tokens + (0 if crops == 1 else 2 * side // PATCH)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, IMAGE_TOKEN, (batch, TEXT_BEFORE + placeholders + TEXT_AFTER), generator=g)
    ids[:, TEXT_BEFORE : TEXT_BEFORE + placeholders] = IMAGE_TOKEN
    pixels = torch.randn(*((batch,) if crops == 1 else (batch, crops)), 3, side, side, generator=g)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.bfloat16()}
    if crops > 1:
        inputs["image_sizes"] = torch.tensor([[2 * side, 2 * side]] * batch)
    return {name: value.to(device) for name, value in inputs.items()}


class Marks:
    """Moments of one call, the end of each part, on the device's own clock."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._ends: list[tuple[str, object]] = []

    def start(self) -> None:
        self._ends = []
        if self._cuda:
            torch.cuda.synchronize()
        self("start")

    def __call__(self, part: str) -> None:
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.process_time()
        self._ends.append((part, now))

    def milliseconds(self) -> dict[str, float]:
        if self._cuda:
            torch.cuda.synchronize()
        found = dict.fromkeys(PARTS, 0.0)
        for (_, begin), (part, end) in zip(self._ends, self._ends[1:], strict=False):
            found[part] += begin.elapsed_time(end) if self._cuda else 1e3 * (end - begin)
        return found


@contextmanager
def marked(model, marks: Marks) -> Iterator[None]:
    core = model.model
    hooks = [
        core.multi_modal_projector.register_forward_hook(lambda *_: marks("tower")),
        core.language_model.register_forward_pre_hook(lambda *_: marks("merge")),
        core.language_model.register_forward_hook(lambda *_: marks("prefill")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Variant(NamedTuple):
    method: str  # "none", a selector, or "published" ones; "bare" and "pruned": the two sides of the overhead
    backend: str
    keep: int  # tokens an image


def selector(variant: Variant, marks: Marks) -> Callable:
    def select(features: Tensor, importance: Tensor, k: int) -> Tensor:
        marks("importance")
        if variant.backend == "published":
            picks = getattr(baselines, f"published_{variant.method}")(features, importance, k)
        else:
            with lvtp.use_backend(variant.backend):
                picks = getattr(lvtp, variant.method)(features, importance, k)
        marks("selection")
        return picks

    return select


def variants(subject: Subject, geometry: Geometry) -> list[Variant]:
    def image(keep: int) -> int:
        return max(1, keep * geometry.tokens // 576) * subject.crops

    middle = image(64)
    found = [Variant("none", "none", geometry.tokens * subject.crops), Variant("pruned", "native", middle)]
    found.append(Variant("bare", "native", middle))  # right after its other side
    for method in ("id_selection", "prune_sid"):
        found += [Variant(method, "native", image(keep)) for keep in subject.keeps]
        found += [Variant(method, backend, middle) for backend in ("reference", "published")]
    return found


class Group:
    """One model, geometry and batch."""

    def __init__(self, model, subject: Subject, geometry: Geometry, batch: int, device: torch.device):
        self.model, self.subject, self.marks = model, subject, Marks(device)
        self.variants = variants(subject, geometry)
        self.inputs = inputs_of(subject, geometry, batch, device)
        self.prepared = {}  # variant -> inputs of a call that has been pruned before
        self.kv_bytes: dict[Variant, int] = {}

    def pruned(self, variant: Variant):
        crops, scope = self.subject.crops, self.subject.scope
        method = "id_selection" if variant.method in ("pruned", "bare") else selector(variant, self.marks)
        return {"method": method, "keep": variant.keep // crops, "scope": scope}

    @torch.no_grad()
    def run(self, variant: Variant) -> dict[str, float]:
        """Milliseconds of each part of one call."""
        inputs, context = self.inputs, nullcontext()
        if variant.method == "bare":
            inputs = self.prepared.get(variant) or lvtp.hf.prepare(self.model, inputs, **self.pruned(variant))
            self.prepared[variant] = inputs
        elif variant.method != "none":
            context = lvtp.hf.prune(self.model, **self.pruned(variant))
        with context, marked(self.model, self.marks):
            self.marks.start()
            if variant.method == "bare":
                pixels = {name: self.inputs[name] for name in ("pixel_values", "image_sizes") if name in self.inputs}
                self.model.get_image_features(**pixels)
            out = self.model(**inputs, use_cache=True, logits_to_keep=1)
            out.logits.argmax(-1)
            self.marks("first_token")
            times = self.marks.milliseconds()
        cache = out.past_key_values.layers
        self.kv_bytes[variant] = sum(t.nbytes for layer in cache for t in (layer.keys, layer.values))
        return times

    def measure(self, seconds: float) -> dict[Variant, list[dict[str, float]]]:
        found = {variant: [] for variant in self.variants}
        begin = time.monotonic()
        with tqdm(total=(1 + ROUNDS) * len(found), unit="call", leave=False, mininterval=1) as bar:
            for turn in range(1 + ROUNDS):  # the first one warms up
                if turn > FEWEST and time.monotonic() - begin > seconds:
                    break
                for variant in list(found):
                    bar.set_postfix_str(f"{variant.method} {variant.backend} {variant.keep}", refresh=False)
                    try:
                        times = self.run(variant)
                    except RuntimeError as error:  # the others may still do
                        if variant.method in ("none", "bare", "pruned"):
                            raise
                        bar.write(f"{variant} failed: {str(error).splitlines()[0]}")
                        del found[variant]
                        continue
                    if turn > 0:
                        found[variant].append(times)
                    bar.update()
        return found


def medians(times: list[dict[str, float]]) -> dict[str, float]:
    return {part: statistics.median(one[part] for one in times) for part in PARTS}


def total(one: dict[str, float]) -> float:
    return sum(one.values())


def rows(group: Group, found: dict[Variant, list[dict[str, float]]], about: dict) -> list[dict]:
    """One a variant. Of the row "overhead" the parts are those of the bare tower and decoder, selection what `prune`
    adds to them in all, and "overhead" that share."""
    out = []
    for variant, times in found.items():
        if variant.method in ("pruned", "bare"):
            continue
        out.append(_row(about, variant, medians(times), group.kv_bytes[variant]))
    bare = next(variant for variant in found if variant.method == "bare")
    pruned = next(variant for variant in found if variant.method == "pruned")
    added = [total(p) - total(b) for p, b in zip(found[pruned], found[bare], strict=True)]
    parts = medians(found[bare])
    row = _row(about, bare._replace(method="overhead"), parts, group.kv_bytes[bare])
    row["selection_ms"] = statistics.median(added)
    row["ttft_ms"] = total(parts) + row["selection_ms"]
    row["overhead"] = statistics.median(a / total(b) for a, b in zip(added, found[bare], strict=True))
    return [*out, row]


def _row(about: dict, variant: Variant, parts: dict[str, float], kv_bytes: int) -> dict:
    return {
        **about,
        "keep": variant.keep,
        "method": variant.method,
        "backend": variant.backend,
        **{f"{part}_ms": parts[part] for part in PARTS},
        "ttft_ms": total(parts),
        "kv_bytes": kv_bytes,
    }


def text(found: list[dict]) -> str:
    first = found[0]
    lines = [
        f"{first['model']}, batch {first['batch']}, {first['tokens']} visual tokens an image; {first['geometry']}; ms",
        "method        backend    keep    tower  import.  select.   merge   prefill   first     TTFT  select.   KV MiB",
    ]
    for r in found:
        share = 100 * r["selection_ms"] / r["ttft_ms"]
        faster = first["prefill_ms"] / r["prefill_ms"]
        lines.append(
            f"{r['method']:13s} {r['backend']:9s} {r['keep']:5d} {r['tower_ms']:8.1f} {r['importance_ms']:8.2f} "
            f"{r['selection_ms']:8.2f} {r['merge_ms']:7.2f} {r['prefill_ms']:9.1f} {r['first_token_ms']:7.2f} "
            f"{r['ttft_ms']:8.1f} {share:7.2f}% {r['kv_bytes'] / 2**20:8.1f}   prefill {faster:.2f}x faster"
            + (f", prune() adds {100 * r['overhead']:.2f}%" if "overhead" in r else "")
        )
    return "\n".join(lines)


def default_folder(device: torch.device) -> Path:
    if device.type == "cuda":
        name = re.sub(r"[ /]+", "-", torch.cuda.get_device_name(device))
    else:
        known = re.search(r"Xeon|EPYC|Ryzen|Core|Apple M\d|Neoverse", machine(device))
        name = f"{known[0].replace(' ', '-') if known else 'CPU'}-{os.cpu_count()}-cores"
    return Path(__file__).parent / "results" / f"{name}-{date.today().isoformat()}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=SUBJECTS, action="append", help="one of them; default: both")
    parser.add_argument("--geometry", choices=GEOMETRIES, help="default: 7b on cuda, cpu on a CPU")
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 8 on cuda, 1 on a CPU")
    parser.add_argument("--seconds", type=float, default=15.0, help="for a group, beyond its fewest rounds")
    parser.add_argument("--out", type=Path, help="folder; default: bench/results/<machine>-<date>")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"bench.prefill: no CUDA device (torch {torch.__version__})")
    if device.type == "cpu":
        torch.set_num_threads(1)
    geometry = GEOMETRIES[options.geometry or ("7b" if device.type == "cuda" else "cpu")]
    batches = options.batch or ([1, 8] if device.type == "cuda" else [1])
    folder = options.out or default_folder(device)
    folder.mkdir(parents=True, exist_ok=True)

    result = {
        "machine": machine(device), "date": date.today().isoformat(), "commit": runs.commit(),
        "torch": torch.__version__, "dtype": "bfloat16", "attention": "sdpa",
        "clock": "CUDA events" if device.type == "cuda" else "CPU time, one thread", "rows": [],
    }  # fmt: skip
    print(result["machine"], flush=True)
    for name in options.model or SUBJECTS:
        subject = SUBJECTS[name]
        model = build(subject, geometry, device)
        for batch in batches:
            group = Group(model, subject, geometry, batch, device)
            found = group.measure(options.seconds)
            tokens = geometry.tokens * subject.crops
            about = {"model": name, "geometry": geometry.label, "batch": batch, "tokens": tokens}
            new = rows(group, found, about)
            result["rows"] += new
            print(text(new), flush=True)
            (folder / "prefill.json").write_text(json.dumps(result, indent=1) + "\n")
            del group
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
