"""`python -m bench.kernels FOLDER`: every kernel of the calls that the kernels are tuned for, and its microseconds.

torch's profiler on calls one after the other, so that the caches hold what the call before left there. Beside the sum:
the time of a graph replay, whose excess over it is what launches cost. Written to FOLDER/kernels.txt, too.
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

import lvtp
from bench import device
from bench.device import Timed
from bench.gpu import TARGETS
from bench.shapes import arguments

CALLS = 20


def short(name: str) -> str:
    """A kernel's name without namespaces and the types of its arguments."""
    name = re.sub(r"^void |\(anonymous namespace\)::|\w+::", "", name)
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at].rstrip()
    return name


def table(events: Iterable, calls: int, kind: DeviceType = DeviceType.CUDA) -> list[tuple[str, float, float]]:
    """(kernel, launches a call, microseconds a call), the longest first."""
    found: dict[str, tuple[float, float]] = {}
    for event in events:
        if event.device_type == kind:
            launches, microseconds = found.get(short(event.key), (0.0, 0.0))
            found[short(event.key)] = launches + event.count, microseconds + event.self_device_time_total
    rows = [(name, launches / calls, total / calls) for name, (launches, total) in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def text(title: str, rows: list[tuple[str, float, float]], replay: float) -> str:
    launches, total = sum(row[1] for row in rows), sum(row[2] for row in rows)
    head = f"{title}: {total:.1f} us in {launches:g} kernels; a graph replay takes {1e6 * replay:.1f} us"
    return "\n".join([head, *(f"{us:10.1f} us {n:6g} x  {name[:90]}" for name, n, us in rows)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    device.require("bench.kernels")
    folder.mkdir(parents=True, exist_ok=True)
    flush, lines = device.Flush(), []
    for name, shape in TARGETS:
        args = arguments(name, shape, torch.bfloat16, device.DEVICE)

        def call(name=name, args=args):
            return getattr(lvtp, name)(*args)

        with lvtp.use_backend("native"):
            replay = device.medians({"": Timed(flush, device.captured(call))})[""]
            with profile(acc_events=True) as recorded:
                for _ in range(CALLS):
                    call()
                torch.cuda.synchronize()
        lines.append(text(f"{name} {shape}", table(recorded.key_averages(), CALLS), replay))
        print(lines[-1], flush=True)
        (folder / "kernels.txt").write_text("\n\n".join(lines) + "\n")
        del args
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
