"""`pytest bench --benchmark-only`: each operator on the CPU, beside the reference and beside a plain eager loop.

The variants of one call take turns, so that what else the machine does falls on all of them alike; medians. The table
at the end has every figure's baselines and the ratio to them; `--benchmark-json` keeps them with the machine's name.
All are of the machine that runs it.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch

import lvtp
from bench import baselines
from bench.shapes import SHAPES, Shape, arguments

OPERATORS = ("cosine_similarity", "mean_similarity", "id_selection", "psca", "prune_sid")
SECONDS = 1.5  # for all rounds of one test


def variants(name: str, args: tuple, shape: Shape) -> dict[str, Callable]:
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
    if shape.images > 1:
        found["one thread"] = on_one_thread
    # The baselines hold N x N matrices; psca's also decompose them, in N^3.
    if shape.tokens <= (1024 if name in ("psca", "prune_sid") else 4096):
        found["reference"] = on("reference")
        if name == "prune_sid":
            gram = baselines.cosine_similarity(args[0])
            found["one fp32 eigh"] = lambda: torch.linalg.eigh(gram)  # what exact groups usually cost
        else:
            found["eager loop"] = lambda: getattr(baselines, name)(*args)
    if name in ("id_selection", "prune_sid") and shape.model.startswith("LLaVA"):
        found["published loop"] = lambda: getattr(baselines, f"published_{name}")(*args)
    return found


def timed(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(benchmark, name: str, shape: Shape, dtype: torch.dtype, runs: dict[str, Callable]) -> None:
    ours = runs.pop("lvtp")
    once = sum(timed(run) for run in (ours, *runs.values()))  # warms up, too
    seconds = {variant: [] for variant in runs}

    def others():
        for variant, run in runs.items():
            seconds[variant].append(timed(run))

    benchmark.group = name
    benchmark.extra_info.update(
        shape._asdict(), name=name, dtype=str(dtype).removeprefix("torch."), device="cpu", torch=torch.__version__
    )
    rounds = max(3, min(50, int(SECONDS / once)))
    benchmark.pedantic(lambda: timed(ours), setup=others, rounds=rounds, iterations=1, warmup_rounds=1)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["baselines"] = {variant: statistics.median(s) for variant, s in seconds.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(benchmark, name, shape, dtype):
    if name in ("cosine_similarity", "psca", "prune_sid") and shape.tokens > 4096:
        pytest.skip("takes minutes, and no model selects like that")
    args = arguments(name, shape, dtype, "cpu")
    measure(benchmark, name, shape, dtype, variants(name, args, shape))


@pytest.mark.parametrize("tokens", [576, 1152, 2304, 4608, 9216])
def test_growth(benchmark, tokens):
    """Work that grew as the matrix does would take 16 times as long for four times the tokens."""
    shape = Shape("growth", 1, tokens, 1024, 64)
    runs = variants("id_selection", arguments("id_selection", shape, torch.float32, "cpu"), shape)
    measure(benchmark, "id_selection", shape, torch.float32, {"lvtp": runs["lvtp"]})


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
    if "k = N" in kind and shape.tokens > 1024:
        pytest.skip("the eager loop takes minutes")
    args = HARD[kind](*arguments("id_selection", shape, torch.float32, "cpu"))
    shape = shape._replace(model=kind, keep=args[-1])
    runs = variants("id_selection", args, shape)
    del runs["reference"]
    measure(benchmark, "id_selection", shape, torch.float32, runs)
