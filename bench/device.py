"""`python -m bench.device`: the CUDA device, what of lvtp runs on it, and its two peaks, as measured now.

The clock of all that is timed on a device: the median between two events around one replay of a CUDA graph or, where
the name says so, one call. Everything else has left the L2 cache before. What is timed *cold* finds nothing in it, what
is timed *warm* finds its features, just written, as after a vision tower.
"""

import pprint
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import NamedTuple

import torch

import lvtp
from bench import runs

DEVICE = "cuda"
ROUNDS, FEWEST = 50, 5
SECONDS = 1.0  # for all rounds
SUBMITTING = 1_000_000  # cycles, half a millisecond, in which the host queues what is timed
COPY, PRODUCT = 2 << 30, 8192  # bytes, and rows and columns: large enough for the peaks
FLUSH = 256 << 20  # bytes, at least


class Timed(NamedTuple):
    before: Callable[[], object]  # brings the caches into a known state
    run: Callable[[], object]


class Flush:
    """Fills the L2 cache with other data. It reads: what a write leaves in the cache is written back later, while
    something else is timed."""

    def __init__(self):
        size = max(4 * torch.cuda.get_device_properties(0).L2_cache_size, FLUSH)
        self._data = torch.ones(size // 4, device=DEVICE)
        self._sum = torch.empty((), device=DEVICE)

    def __call__(self) -> None:
        torch.sum(self._data, 0, out=self._sum)


def captured(run: Callable) -> Callable:
    """`run` as a CUDA graph; -> what replays it."""
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


def medians(timed: dict[str, Timed]) -> dict[str, float]:
    """Seconds of each; they take turns."""
    seconds = {name: [] for name in timed}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    deadline = time.monotonic() + SECONDS
    for turn in range(ROUNDS):
        if turn >= FEWEST and time.monotonic() > deadline:
            break
        for name, (before, run) in timed.items():
            before()
            torch.cuda._sleep(SUBMITTING)
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(s) for name, s in seconds.items()}


def peaks() -> dict[str, float]:
    """Bytes a second that a large copy reads and writes, and FLOPs a second of a large bf16 product, on random data:
    zeros are faster."""
    size = min(COPY, torch.cuda.mem_get_info()[0] // 8)
    source = torch.randn(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(PRODUCT, PRODUCT, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)

    def copy() -> None:
        target.copy_(source)

    def multiply() -> None:
        torch.mm(a, b, out=product)

    # Each before itself: neither caches nor clocks are in the state that something else has left.
    seconds = medians({"copy": Timed(copy, copy), "product": Timed(multiply, multiply)})
    return {
        "bytes_per_second": 2 * source.nbytes / seconds["copy"],
        "flops_per_second": 2 * PRODUCT**3 / seconds["product"],
    }


def machine(flush: Flush) -> dict:
    """What was measured where; `bench.runs` reads it back."""

    def said(*command: str) -> str:
        """The first line; "unknown" without the tool."""
        if shutil.which(command[0]) is None:
            return "unknown"
        return (subprocess.run(command, capture_output=True, text=True).stdout.splitlines() or ["unknown"])[0]

    one = torch.zeros(1, device=DEVICE)
    return {
        "device": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "date": date.today().isoformat(),
        "commit": runs.commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "seconds_of_a_graph_of_one_addition": medians({"": Timed(flush, captured(lambda: one.add_(1)))})[""],
        **peaks(),
    }


def readable(about: dict) -> dict[str, str]:
    return {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in about.items()}


def require(tool: str) -> None:
    if not torch.cuda.is_available():
        sys.exit(f"{tool}: no CUDA device (torch {torch.__version__})")


def main() -> None:
    info = lvtp.build_info()
    pprint.pprint({**info, "lvtp": lvtp.__file__})
    require("bench.device")
    for key, value in readable(machine(Flush())).items():
        print(f"{key}: {value}")
    if info["backends"]["native_cuda"] != "loaded":
        sys.exit(f"bench.device: no compiled CUDA kernels: {info['backends']['native_cuda']}")


if __name__ == "__main__":
    main()
