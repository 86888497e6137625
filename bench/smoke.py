"""`python -m bench.smoke`: does every operator give the right answer at all? Seconds, before anything else is asked.

Each operator at five shapes, which between them take every way through the CUDA kernels, judged by the float64 oracle
(tests/verdicts.py). A process an operator: one that reads or writes where it must not does not take the others along.
--small: one small image a shape, all in one process, for compute-sanitizer.
"""

import argparse
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

import lvtp
from bench.device import require
from bench.shapes import Shape, arguments
from lvtp.ops import OPS

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the oracle

import verdicts

# Groups are a quarter of what is kept. Up to 4096 tokens id_selection has a matrix, beyond it goes in rounds; psca
# iterates a subspace from 256 tokens on for up to 64 groups, in one of two sizes, and else decomposes directly; where
# there are many more tokens than features it does either over the features.
CASES = {
    "matrix, a subspace for few groups": (Shape("", 1, 577, 1024, 64), torch.bfloat16),
    "matrix, a subspace for many groups": (Shape("", 3, 576, 600, 144), torch.float16),
    "matrix, directly": (Shape("", 2, 300, 640, 288), torch.bfloat16),
    "one block": (Shape("", 5, 33, 40, 16), torch.float32),
    "rounds, over the features": (Shape("", 1, 4097, 64, 128), torch.bfloat16),
}
SMALL = {
    "matrix, a subspace for few groups": (Shape("", 1, 257, 264, 16), torch.bfloat16),
    "matrix, a subspace for many groups": (Shape("", 1, 257, 264, 72), torch.float16),
    "matrix, directly": (Shape("", 1, 265, 272, 264), torch.bfloat16),
    "one block": (Shape("", 1, 33, 40, 16), torch.float32),
    "rounds, over the features": (Shape("", 1, 4097, 16, 8), torch.bfloat16),
}
DECOMPOSED = 300  # tokens that psca's answer over the features is judged on: the oracle takes N^3


def check(name: str, shape: Shape, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """-> the worst share of the shortfall allowed, and the milliseconds of the second call; raises what is wrong."""
    if name in ("psca", "prune_sid") and shape.tokens > 4 * shape.features:
        shape = shape._replace(tokens=DECOMPOSED)
    with lvtp.use_backend("native"):
        args = arguments(name, shape, dtype, device)
        call = getattr(lvtp, name)
        result = call(*args)
        on_cpu = [t.cpu() for t in (result if isinstance(result, tuple) else (result,))]  # waits
        started = time.perf_counter()
        again = call(*args)
        again = [t.cpu() for t in (again if isinstance(again, tuple) else (again,))]
        milliseconds = 1e3 * (time.perf_counter() - started)
        worst = float(getattr(verdicts, name)(result, *args))
        assert all(map(torch.equal, on_cpu, again)), "another answer the second time"
    return worst, milliseconds


def run(names: list[str], cases: dict, device: str) -> int:
    """-> how many are wrong."""
    failed = 0
    for name in names:
        for about, (shape, dtype) in cases.items():
            head = f"{name:18s} {shape.size:26s} {str(dtype).removeprefix('torch.'):8s} {about:35s} "
            try:
                worst, milliseconds = check(name, shape, dtype, device)
            except Exception as error:  # the others may still do
                failed += 1
                what = str(error).splitlines() or [traceback.extract_tb(error.__traceback__)[-1].line]
                print(f"{head}WRONG  {type(error).__name__}: {what[0][:200]}", flush=True)
            else:
                print(f"{head}right  {worst:5.2f} of the rounding allowed, {milliseconds:.2f} ms", flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=OPS, action="append", help="this operator; may be repeated")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(argv)
    if options.device == "cuda":
        require("bench.smoke")
    names = options.only or list(OPS)
    if options.only or options.small:
        failed = run(names, SMALL if options.small else CASES, options.device)
    else:
        command = [sys.executable, "-m", "bench.smoke", "--device", options.device, "--only"]
        running = [subprocess.Popen([*command, name]) for name in names]
        failed = sum(process.wait() != 0 for process in running)
    print(f"{failed} wrong" if failed else f"all right: {', '.join(names)}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
