"""`pytest bench --benchmark-only`: every operator, registered shape and dtype on the CPU, beside what else there is.

The variants of one call take turns, so that what else the machine does falls on all of them alike; medians. Each row's
`extra_info` in the JSON has its baselines, the bytes and FLOPs of the rule, the seconds that those take at the speeds
measured on this machine, and the ratio to the reference. All are of the machine that runs it.
"""

import functools
import statistics
import time
from collections.abc import Callable

import pytest
import torch

import lvtp
from bench import baselines
from bench.shapes import DTYPES, OPERATORS, SELECTORS, SHAPES, SWEEPS, WITHOUT_BUDGET, Shape, arguments, fp32_only, work

SECONDS = 0.5  # for all rounds of one test; the whole suite is to take less than ten minutes on two cores
MATRICES = ("cosine_similarity", "greedy_suppression", "cluster_nms")
COMPONENTS = ("psca", "prune_sid")


def rows(shapes: tuple[Shape, ...], names: tuple[str, ...], dtypes: tuple[str, ...] = DTYPES) -> list:
    """What is timed. Not: 16k tokens where an N x N matrix (1 GiB) or its components (minutes) are wanted."""
    found = {}
    for shape in shapes:
        for name in names:
            budget = {"keep": 0} if name in WITHOUT_BUDGET else {}
            for dtype in dtypes:
                small = shape.tokens <= 8192 or name not in (*MATRICES, *COMPONENTS)
                if small and (dtype == "float32" or not fp32_only(name)):
                    key = name, shape._replace(model="", **budget), dtype
                    found.setdefault(key, pytest.param(name, shape, dtype, id=f"{name}-{shape}-{dtype}"))
    return list(found.values())


def variants(name: str, args: tuple, shape: Shape, dtype: torch.dtype) -> dict[str, Callable]:
    """What is timed in turn. "lvtp" is what users get by themselves; the rest is what they would run otherwise."""

    def on(backend: str) -> Callable:
        def run():
            with lvtp.use_backend(backend):
                getattr(lvtp, name)(*args)

        return run

    def on_one_thread() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        on("auto")()
        torch.set_num_threads(threads)

    found = {"lvtp": on("auto")}
    if shape.images > 1 and name not in ("greedy_suppression", "cluster_nms"):
        found["one thread"] = on_one_thread
    # The baselines hold N x N matrices, and some decompose them, in N^3: seconds and more.
    many, slow = shape.tokens > 1152, shape.tokens > (2880 if name in COMPONENTS else 4608)
    if not slow and not (many and name in COMPONENTS and dtype != torch.float32):
        found["reference"] = on("reference")
        if hasattr(baselines, name):
            found["eager loop"] = lambda: getattr(baselines, name)(*args)
    if name == "prune_sid" and not slow:
        gram = baselines.cosine_similarity(args[0])
        found["one fp32 eigh"] = lambda: torch.linalg.eigh(gram)  # what exact groups usually cost
    # PruneSID's has a mask of N x N for each of k / 4 groups.
    masks = shape.images * shape.tokens**2 * (shape.keep // 4 if name == "prune_sid" else 1)
    if name in SELECTORS and masks < 1 << 30 and shape.tokens <= 4608:
        found["published loop"] = lambda: getattr(baselines, f"published_{name}")(*args)
    return found


def timed(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@functools.cache
def speed(of: str | torch.dtype) -> float:
    """Of this machine, the best of five: bytes/s, read and written, of a "copy"; or FLOP/s of a product in a dtype."""
    if of == "copy":
        source = torch.ones(1 << 26)
        target = torch.empty_like(source)
        return 2 * source.nbytes / min(timed(lambda: target.copy_(source)) for _ in range(5))
    n = 2048
    a, b = torch.rand(2, n, n).to(of)
    return 2 * n**3 / min(timed(lambda: a @ b) for _ in range(5))


def measure(
    benchmark, name: str, shape: Shape, dtype: torch.dtype, runs: dict[str, Callable], input_kind: str = ""
) -> None:
    ours = runs.pop("lvtp")
    once = sum(timed(run) for run in (ours, *runs.values()))  # warms up, too
    seconds = {variant: [] for variant in runs}

    def others():
        for variant, run in runs.items():
            seconds[variant].append(timed(run))

    benchmark.group = name
    rounds = max(2 if once > 1 else 3, min(50, int(SECONDS / once)))
    benchmark.pedantic(ours, setup=others, rounds=rounds, iterations=1)
    median = benchmark.stats.stats.median
    found = {variant: statistics.median(s) for variant, s in seconds.items()}
    moved, flops = work(name, shape, dtype)
    least = max(moved / speed("copy"), flops / speed(dtype))
    benchmark.extra_info.update(
        shape._asdict(),
        name=name,
        input=input_kind,
        dtype=str(dtype).removeprefix("torch."),
        device="cpu",
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        baselines=found,
        ratio=found["reference"] / median if "reference" in found else None,
        bytes=moved,
        flops=flops,
        least_seconds=least,
        roofline=least / median,
    )


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    rows(SHAPES, OPERATORS) + rows(SWEEPS, SELECTORS, ("float32",)),
)
def test_operator(benchmark, name, shape, dtype):
    dtype = getattr(torch, dtype)
    args = arguments(name, shape, dtype, "cpu")
    measure(benchmark, name, shape, dtype, variants(name, args, shape, dtype))


# What laziness gains nothing by: every pick suppresses every token, or every token is picked.
HARD = {
    "all alike": lambda x, s, k: (x[:, :1].expand_as(x).contiguous(), s, k),
    "nearly alike": lambda x, s, k: (x[:, :1] + 1e-3 * x, s, k),
    "equal scores": lambda x, s, k: (x, torch.ones_like(s), k),
    "k = N": lambda x, s, k: (x, s, x.shape[1]),
    "nearly alike, k = N": lambda x, s, k: (x[:, :1] + 1e-3 * x, s, x.shape[1]),
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], SHAPES[6]], ids=str)
def test_hard_input(benchmark, shape, kind):
    args = HARD[kind](*arguments("id_selection", shape, torch.float32, "cpu"))
    shape = shape._replace(keep=args[-1])
    runs = variants("id_selection", args, shape, torch.float32)
    for variant in ("reference", "published loop", *(["eager loop"] * (shape.keep > 1024))):  # minutes
        runs.pop(variant, None)
    measure(benchmark, "id_selection", shape, torch.float32, runs, kind)
