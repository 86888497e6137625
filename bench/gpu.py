"""`python -m bench.gpu FOLDER`: the operators on a CUDA device, beside what a user would run instead.

A time is the median between two events, around one replay of a CUDA graph or, where the name says so, one call, with
a cold L2 cache: a write larger than it comes before. The variants of a row take turns. Rows are written to
FOLDER/ops.json and FOLDER/ops.txt as they come, so a run that is cut short keeps what it has.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

import lvtp
from bench import baselines
from bench.shapes import SELECTORS, SHAPES, SWEEPS, Shape, arguments, work

BATCH = Shape("LLaVA-1.5, batch", 64, 576, 1024, 64)
ONE, KEEP_192 = SHAPES[1], SHAPES[2]
LARGE = next(shape for shape in SHAPES if shape.tokens == 16384)
ROWS = (
    ("id_selection", ONE),
    ("id_selection", BATCH),
    ("cosine_similarity", BATCH),
    ("prune_sid", ONE),
    ("prune_sid", KEEP_192),
    ("id_selection", LARGE),
    ("cosine_similarity", ONE),
    ("mean_similarity", BATCH),
    ("psca", ONE),
    *(("id_selection", shape) for shape in SHAPES if shape not in (ONE, LARGE)),
    *(("prune_sid", shape) for shape in SHAPES if shape not in (ONE, KEEP_192, LARGE)),
)
BY_TOKENS = [("id_selection", shape) for shape in SWEEPS if shape.tokens != ONE.tokens]
BY_TOKENS += [("prune_sid", shape) for _, shape in BY_TOKENS if shape.tokens <= 2304]  # its work grows with N^3
COMPILED = ("id_selection", "cosine_similarity", "mean_similarity")
PEAKS = {"H200": (4.3e12, 790e12)}  # bytes/s of a copy and bf16 FLOP/s of a large product, as measured on one
ROUNDS, FEWEST = 50, 5
SUBMITTING = 1_000_000  # cycles, half a millisecond, in which the host queues what is timed
SECONDS = 1.0  # for a row's rounds


def least_seconds(name: str, shape: Shape, dtype: torch.dtype) -> float | None:
    """What the device's peaks allow. None for a device or dtype whose peaks are not on record."""
    peaks = next((peak for chip, peak in PEAKS.items() if chip in torch.cuda.get_device_name()), None)
    if peaks is None or dtype == torch.float32:
        return None
    return max(amount / peak for amount, peak in zip(work(name, shape, dtype), peaks, strict=True))


def captured(run: Callable) -> Callable:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def normalise_and_bmm(features: torch.Tensor) -> torch.Tensor:
    """In the features' own precision, which rounds what the operator does not."""
    unit = F.normalize(features, dim=-1)
    return torch.bmm(unit, unit.mT)


def gram_and_loop(features: torch.Tensor, importance: torch.Tensor, k: int) -> torch.Tensor:
    """What id_selection would be with the whole matrix in fp32; it leaves scaling the importance out."""
    with lvtp.use_backend("native"):
        return lvtp.greedy_suppression(importance, lvtp.cosine_similarity(features), k)


def variants(name: str, shape: Shape, args: tuple, compiles: bool) -> dict[str, Callable[[], Callable]]:
    """How each is made ready; that may take long, or fail."""

    def on(backend: str) -> Callable:
        def run():
            with lvtp.use_backend(backend):
                return getattr(lvtp, name)(*args)

        return run

    found = {
        "lvtp": lambda: captured(on("native")),
        "lvtp, call": lambda: on("native"),
        "triton": lambda: captured(on("triton")),
    }
    if name == "id_selection" and shape.tokens > 4096:
        found["Gram + loop, call"] = lambda: lambda: gram_and_loop(*args)
    matrices = shape.images * shape.tokens**2 * 4 * 4  # the baselines hold several at a time
    if matrices > torch.cuda.mem_get_info()[0] or shape.tokens > 4096:
        return found
    if name in SELECTORS:  # one image, one pick or token at a time, each waited for
        found["published, call"] = lambda: lambda: getattr(baselines, f"published_{name}")(*args)
    if name == "prune_sid":
        gram = baselines.cosine_similarity(args[0])
        return found | {"one fp32 eigh, call": lambda: lambda: torch.linalg.eigh(gram)}
    plain = getattr(baselines, name)
    found["reference, call"] = lambda: on("reference")
    found["eager, call"] = lambda: lambda: plain(*args)
    if name != "psca":  # eigh waits for the device, so it cannot be captured
        found["eager"] = lambda: captured(lambda: plain(*args))
        if compiles:
            compiled = torch.compile(plain)
            found["compiled, call"] = lambda: lambda: compiled(*args)
            found["compiled"] = lambda: captured(lambda: compiled(*args))
    if name == "cosine_similarity":
        found["normalise + bmm"] = lambda: captured(lambda: normalise_and_bmm(*args))
    return found


def medians(runs: dict[str, Callable], flush: torch.Tensor) -> dict[str, float]:
    seconds = {variant: [] for variant in runs}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    deadline = time.monotonic() + SECONDS
    for turn in range(ROUNDS):
        if turn >= FEWEST and time.monotonic() > deadline:
            break
        for variant, run in runs.items():
            flush.zero_()
            torch.cuda._sleep(SUBMITTING)
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds[variant].append(start.elapsed_time(end) / 1e3)
    return {variant: statistics.median(s) for variant, s in seconds.items()}


def peak_memory(run: Callable) -> int:
    """Bytes that a call takes on top of what is there, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def row(name: str, shape: Shape, dtype: torch.dtype, flush: torch.Tensor, compiles: bool) -> dict:
    args = arguments(name, shape, dtype, "cuda")
    runs, errors, memory, first = {}, {}, {}, {}
    for variant, prepare in variants(name, shape, args, compiles).items():
        started = time.monotonic()
        try:
            runs[variant] = prepare()
            runs[variant]()
            torch.cuda.synchronize()
            first[variant] = time.monotonic() - started
            if variant.endswith("call"):
                memory[variant] = peak_memory(runs[variant])
        except Exception as error:  # another variant may still do
            errors[variant] = f"{type(error).__name__}: {error}"[:500]
            runs.pop(variant, None)
    return {
        "name": name,
        **shape._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": medians(runs, flush),
        "least_seconds": least_seconds(name, shape, dtype),
        "first_seconds": first,  # until the first result, with what is compiled or captured on the way
        "bytes": memory,
        "errors": errors,
    }


def text(row: dict) -> str:
    seconds = dict(row["seconds"])
    ours, least = seconds.pop("lvtp", None), row["least_seconds"]
    share = f" {100 * least / ours:3.0f}%" if ours and least else ""
    others = "".join(f"  {v} {1e6 * s:.1f}" + (f" ({s / ours:.1f})" if ours else "") for v, s in seconds.items())
    compiling = row["first_seconds"].get("triton", 0.0)
    others += f"  (triton's first: {compiling:.1f} s)" if compiling > 0.1 else ""
    failed = "".join(f"\n    {variant} failed: {why.splitlines()[0]}" for variant, why in row["errors"].items())
    head = f"{row['name']:18s} {Shape.of(row)!s:44s} {row['dtype']:8s} lvtp "
    return head + (f"{1e6 * ours:9.1f}{share}" if ours else "   failed") + others + failed


def machine(flush: torch.Tensor) -> dict:
    def said(*command: str) -> str:
        """The first line; "unknown" without the tool."""
        if shutil.which(command[0]) is None:
            return "unknown"
        return (subprocess.run(command, capture_output=True, text=True).stdout.splitlines() or ["unknown"])[0]

    one = torch.zeros(1, device="cuda")
    return {
        "device": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "date": date.today().isoformat(),
        "commit": said("git", "rev-parse", "HEAD"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "seconds_of_a_graph_of_one_addition": medians({"graph": captured(lambda: one.add_(1))}, flush)["graph"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not torch.cuda.is_available():
        sys.exit(f"bench.gpu: no CUDA device (torch {torch.__version__})")
    folder.mkdir(parents=True, exist_ok=True)
    size = max(2 * torch.cuda.get_device_properties(0).L2_cache_size, 64 << 20)
    flush = torch.empty(size, dtype=torch.uint8, device="cuda")
    about = machine(flush)
    rows, lines = [], [
        ", ".join(f"{key} {value}" for key, value in about.items()),
        "medians in us; share of what the device's peaks allow; in brackets: how many times what lvtp takes",
    ]  # fmt: skip
    # Compiling unrolls the loop over the picks, which may take long: last.
    compiled = [(*each, torch.bfloat16, True) for each in ROWS if each[1] in (ONE, BATCH) and each[0] in COMPILED]
    plain = [(*each, torch.bfloat16, False) for each in (*ROWS, *BY_TOKENS)]
    plain += [(*each, torch.float32, False) for each in ROWS]
    for name, shape, dtype, compiles in (*plain, *compiled):
        rows.append(row(name, shape, dtype, flush, compiles))
        lines.append(text(rows[-1]))
        print(lines[-1], flush=True)
        (folder / "ops.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
        (folder / "ops.txt").write_text("\n".join(lines) + "\n")
        torch._dynamo.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
