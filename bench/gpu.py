"""`python -m bench.gpu FOLDER`: the operators on a CUDA device, beside what a user would run instead.

`bench.device` says how they are timed: warm or, where the name says so, cold. The variants of a row take turns. Rows
are written to FOLDER/ops.json and FOLDER/ops.txt as they come, so a run that is cut short keeps what it has.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import lvtp
from bench import baselines, device
from bench.device import Flush, Timed, captured
from bench.shapes import SELECTORS, SHAPES, SWEEPS, Shape, arguments, work

BATCH = Shape("LLaVA-1.5, batch", 64, 576, 1024, 64)
ONE, KEEP_192 = SHAPES[1], SHAPES[2]
LARGE = next(shape for shape in SHAPES if shape.tokens == 16384)
# What the kernels are tuned for; bench.kernels takes these apart.
TARGETS = (
    ("id_selection", ONE),
    ("id_selection", BATCH),
    ("id_selection", LARGE),
    ("cosine_similarity", BATCH),
    ("prune_sid", ONE),
    ("prune_sid", KEEP_192),
)
KEY = (*TARGETS, ("cosine_similarity", ONE), ("mean_similarity", BATCH), ("psca", ONE))
# Compiling unrolls the loop over the picks, which may take long: last.
COMPILED = (
    ("cosine_similarity", BATCH),
    ("mean_similarity", BATCH),
    ("id_selection", ONE),
    ("cosine_similarity", ONE),
    ("id_selection", BATCH),
)
SHAPES_LEFT = [shape for shape in SHAPES if shape not in (ONE, LARGE)]
BY_TOKENS = [shape for shape in SWEEPS if shape.tokens != ONE.tokens]
SWEEP = (
    *(("id_selection", shape) for shape in (*SHAPES_LEFT, *BY_TOKENS)),
    *(("prune_sid", shape) for shape in (*SHAPES_LEFT, *BY_TOKENS) if shape.tokens <= 4096 and shape != KEEP_192),
)
BESIDE = ("eager", "compiled", "triton", "published")


def least_seconds(name: str, shape: Shape, dtype: torch.dtype, about: dict) -> float | None:
    """What the device's peaks allow. None for fp32, whose products go another way."""
    if dtype == torch.float32:
        return None
    moved, computed = work(name, shape, dtype)
    return max(moved / about["bytes_per_second"], computed / about["flops_per_second"])


def normalise_and_bmm(features: torch.Tensor) -> torch.Tensor:
    """In the features' own precision, which rounds what the operator does not."""
    unit = F.normalize(features, dim=-1)
    return torch.bmm(unit, unit.mT)


def gram_and_loop(features: torch.Tensor, importance: torch.Tensor, k: int) -> torch.Tensor:
    """What id_selection would be with the whole matrix in fp32; it leaves scaling the importance out."""
    with lvtp.use_backend("native"):
        return lvtp.greedy_suppression(importance, lvtp.cosine_similarity(features), k)


def variants(name: str, shape: Shape, args: tuple, beside: tuple[str, ...]) -> dict[str, Callable[[], Callable]]:
    """How each is made ready; that may take long, or fail."""

    def on(backend: str) -> Callable:
        def run():
            with lvtp.use_backend(backend):
                return getattr(lvtp, name)(*args)

        return run

    found = {"lvtp": lambda: captured(on("native")), "lvtp, call": lambda: on("native")}
    if "triton" in beside:
        found["triton"] = lambda: captured(on("triton"))
    if "eager" in beside and name == "id_selection" and shape.tokens > 4096:
        found["Gram + loop, call"] = lambda: lambda: gram_and_loop(*args)
    matrices = shape.images * shape.tokens**2 * 4 * 4  # the baselines hold several at a time
    if matrices > torch.cuda.mem_get_info()[0] or shape.tokens > 4096:
        return found
    if "published" in beside:
        found["reference, call"] = lambda: on("reference")
        if name in SELECTORS:  # one image, one pick or token at a time, each waited for
            found["published, call"] = lambda: lambda: getattr(baselines, f"published_{name}")(*args)
    if "eager" in beside and name == "prune_sid":
        gram = baselines.cosine_similarity(args[0])
        found["one fp32 eigh, call"] = lambda: lambda: torch.linalg.eigh(gram)
    plain = getattr(baselines, name, None)
    if plain is None:
        return found
    if "eager" in beside:
        found["eager, call"] = lambda: lambda: plain(*args)
        if name != "psca":  # eigh waits for the device, so it cannot be captured
            found["eager"] = lambda: captured(lambda: plain(*args))
        if name == "cosine_similarity":
            found["normalise + bmm"] = lambda: captured(lambda: normalise_and_bmm(*args))
    if "compiled" in beside and name != "psca":
        compiled = torch.compile(plain)
        found["compiled, call"] = lambda: lambda: compiled(*args)
        found["compiled"] = lambda: captured(lambda: compiled(*args))
    return found


def peak_memory(run: Callable) -> int:
    """Bytes that a call takes on top of what is there, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def row(name: str, shape: Shape, dtype: torch.dtype, beside: tuple[str, ...], flush: Flush, about: dict) -> dict:
    args = arguments(name, shape, dtype, device.DEVICE)
    source = args[0].clone()

    def write_features() -> None:
        flush()
        args[0].copy_(source)

    timed, errors, memory, first = {}, {}, {}, {}
    for variant, prepare in variants(name, shape, args, beside).items():
        started = time.monotonic()
        try:
            run = prepare()
            run()
            torch.cuda.synchronize()
            first[variant] = time.monotonic() - started
            if variant.endswith("call"):
                memory[variant] = peak_memory(run)
            else:
                timed[f"{variant}, cold"] = Timed(flush, run)
            timed[variant] = Timed(write_features, run)
        except Exception as error:  # another variant may still do
            errors[variant] = f"{type(error).__name__}: {error}"[:500]
    return {
        "name": name,
        **shape._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": device.medians(timed),
        "least_seconds": least_seconds(name, shape, dtype, about),
        "first_seconds": first,  # until the first result, with what is compiled or captured on the way
        "bytes": memory,
        "errors": errors,
    }


def text(row: dict) -> str:
    seconds = dict(row["seconds"])
    ours, least = seconds.pop("lvtp", None), row["least_seconds"]
    share = f" {100 * least / ours:3.0f}%" if ours and least else ""
    others = "".join(f"  {v} {1e6 * s:.1f}" + (f" ({s / ours:.1f})" if ours else "") for v, s in seconds.items())
    slow = [f"{variant}'s first: {s:.1f} s" for variant, s in row["first_seconds"].items() if s > 1.0]
    others += f"  ({'; '.join(slow)})" if slow else ""
    failed = "".join(f"\n    {variant} failed: {why.splitlines()[0]}" for variant, why in row["errors"].items())
    head = f"{row['name']:18s} {Shape.of(row)!s:44s} {row['dtype']:8s} lvtp "
    return head + (f"{1e6 * ours:9.1f}{share}" if ours else "   failed") + others + failed


def wanted(rows: str, beside: tuple[str, ...]) -> list[tuple]:
    """(name, shape, dtype, beside), in the order of their worth."""
    plain = tuple(kind for kind in beside if kind != "compiled")
    if rows == "sweep":
        found = [(*each, torch.bfloat16, plain) for each in SWEEP]
        found += [(*each, torch.float32, plain) for each in (*KEY, *SWEEP)]
    else:
        found = [(*each, torch.bfloat16, plain) for each in KEY]
    return found + [(*each, torch.bfloat16, beside) for each in COMPILED if rows == "key" and "compiled" in beside]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", choices=("key", "sweep"), default="key", help="sweep: all other shapes, and fp32")
    parser.add_argument("--beside", choices=BESIDE, nargs="*", default=("eager", "compiled"), help="what takes turns")
    options = parser.parse_args(argv)
    device.require("bench.gpu")
    options.folder.mkdir(parents=True, exist_ok=True)
    flush = Flush()
    about = device.machine(flush)
    rows, lines = [], [
        ", ".join(f"{key} {value}" for key, value in device.readable(about).items()),
        "medians in us; share of what the device's peaks allow; in brackets: how many times what lvtp takes",
    ]  # fmt: skip
    print(*lines, sep="\n")
    for each in wanted(options.rows, tuple(options.beside)):
        rows.append(row(*each, flush, about))
        lines.append(text(rows[-1]))
        print(lines[-1], flush=True)
        (options.folder / "ops.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
        (options.folder / "ops.txt").write_text("\n".join(lines) + "\n")
        torch._dynamo.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
