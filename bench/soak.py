"""`python -m bench.soak --minutes 5`: random calls of every operator on every backend there is, until the time is up.

Each answer is judged by the float64 oracle (tests/verdicts.py), so two backends may differ only where a rounding
decides; all must refuse a bad argument in the same words; nothing may write to its arguments, and threads change
nothing. A case that fails prints the line that repeats it, and the run goes on; the exit status is 1 if any did. A call
that hangs ends the run, with every thread's traceback. TRITON_INTERPRET=1 adds Triton's interpreter, on small calls.
"""

import argparse
import faulthandler
import os
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # more threads than cores would spin

import torch
from torch import Tensor
from tqdm import tqdm

import lvtp
from lvtp.ops import OPS

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the oracle, and what the property tests draw from

import verdicts
from problems import FEW, random_call

PATIENCE = 120  # seconds for one case
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def backends() -> list[tuple[str, str]]:
    """(backend, device) for all that run here."""
    loaded = {name for name, state in lvtp.build_info()["backends"].items() if state == "loaded"}
    found = [("native", "cpu"), ("reference", "cpu")] + [("triton", "cpu")] * INTERPRETED
    if torch.cuda.is_available():
        found += [("native", "cuda")] * ("native_cuda" in loaded) + [("triton", "cuda")] * ("triton" in loaded)
        found.append(("reference", "cuda"))
    return found


def most_tokens(random: Random, op: str) -> int:
    """Small calls mostly: they find as much, and there are more of them."""
    if INTERPRETED or random.randrange(8) > 0:
        return FEW
    decomposed = op in ("psca", "prune_sid")  # in N^3, on the reference
    return random.choice((150, 600) if decomposed else (150, 600, 1100, 4200))


def spoil(random: Random, args: list) -> list:
    """The arguments with one of them most likely wrong: of another rank, size or dtype, out of range."""
    args = list(args)
    at = random.randrange(len(args))
    value = args[at]
    if isinstance(value, Tensor):
        spoilt = [value[None], value[..., :0], value[..., :-1], value[1:], value.long(), value.double(), value > 0]
        if value.dim() > 1:
            spoilt += [value.flatten(0, 1), value[:, :0]]
        if at > 0:
            spoilt.append(value.to("meta"))
    elif isinstance(value, str):
        spoilt = ["", "mean", "Feature"]
    elif isinstance(value, float):
        spoilt = [-1.0, float("nan"), float("inf"), -float("inf")]
    else:
        spoilt = [0, -1, 2**40, -(2**62)] if isinstance(value, int) else [value]
    args[at] = random.choice(spoilt)
    return args


def refusal(op: str, args: list) -> str:
    """What the operator says against the arguments; empty if it takes them."""
    try:
        getattr(lvtp, op)(*args)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


@contextmanager
def threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_hang(what: str):
    """Ends the process if the block takes longer than PATIENCE."""
    speaker = threading.Timer(PATIENCE, lambda: print(f"\nhangs: {what}", file=sys.stderr, flush=True))
    speaker.daemon = True
    speaker.start()
    # Needs no Python thread to get its turn.
    faulthandler.dump_traceback_later(PATIENCE + 1, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        speaker.cancel()


def run_valid(random: Random, op: str, where: list[tuple[str, str]]) -> float:
    """One call on every backend. -> the worst share of the shortfall allowed; raises AssertionError."""
    call, worst = random_call(random, op, most_tokens(random, op)), 0.0
    for backend, device in where:
        args, buffers = call.on(device)
        before = [buffer.clone() for buffer in buffers]
        try:
            with lvtp.use_backend(backend), threads(1):
                result = getattr(lvtp, op)(*args)
                worst = max(worst, float(getattr(verdicts, op)(result, *args)))
                if backend == "native":
                    with threads(random.randint(2, 4)):
                        again = getattr(lvtp, op)(*args)
                    torch.testing.assert_close(again, result, rtol=0, atol=0, msg="another answer on other threads")
            torch.testing.assert_close(buffers, before, rtol=0, atol=0, equal_nan=True, msg="an argument is changed")
        except (AssertionError, RuntimeError) as error:
            what = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
            raise AssertionError(f"{backend} on {device}: {what}") from error
    return worst


def run_spoilt(random: Random, op: str, where: list[tuple[str, str]]) -> bool:
    """One call with a bad argument on every backend; raises AssertionError. -> whether it was bad."""
    args = spoil(random, random_call(random, op).args)
    said = {}
    for backend, device in where:
        with lvtp.use_backend(backend):
            moved = [a.to(device) if isinstance(a, Tensor) and a.device.type == "cpu" else a for a in args]
            said[backend, device] = refusal(op, moved)
    for device in {device for _, device in where}:
        words = {backend: text for (backend, on), text in said.items() if on == device}
        assert len(set(words.values())) == 1, f"refused differently on {device}: {words}"
        first = next(iter(words.values()))
        assert not first or first.startswith(f"{op}: "), f"the message does not name the operator: {first}"
    return any(said.values())


class Tally:
    """What the summary says of one operator."""

    def __init__(self):
        self.cases, self.refused, self.failed = 0, 0, 0
        self.worst, self.seconds = 0.0, 0.0


def run_case(seed: int, op: str, where: list[tuple[str, str]], tally: Tally) -> str:
    """-> what is wrong; empty if nothing is."""
    random = Random(f"{op} {seed}")
    started = time.perf_counter()
    tally.cases += 1
    try:
        if random.randrange(5) > 0:
            tally.worst = max(tally.worst, run_valid(random, op, where))
        else:
            tally.refused += run_spoilt(random, op, where)
    except Exception as error:  # whatever it is, the run goes on
        tally.failed += 1
        return f"{type(error).__name__}: {error}"
    finally:
        tally.seconds += time.perf_counter() - started
    return ""


def summary(tallies: dict[str, Tally]) -> str:
    lines = [f"{'operator':20s}   cases  refused   failed   worst  ms a case"]
    for op, t in tallies.items():
        each = 1e3 * t.seconds / max(1, t.cases)
        lines.append(f"{op:20s} {t.cases:7d} {t.refused:8d} {t.failed:8d} {t.worst:7.2f} {each:10.1f}")
    return "\n".join([*lines, "refused: by all, in the same words; worst: share of what is left to rounding"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="0: one case of each operator")
    parser.add_argument("--seed", type=int, default=None, help="of the first case (default: a new one)")
    parser.add_argument("--only", choices=OPS, action="append", help="this operator; may be repeated")
    options = parser.parse_args(argv)
    first = time.time_ns() // 1_000_000 % 10**9 if options.seed is None else options.seed
    where, ops = backends(), options.only or list(OPS)
    print(", ".join(f"{backend} on {device}" for backend, device in where) + f"; seed {first}", flush=True)

    tallies, started, seconds = {op: Tally() for op in ops}, time.monotonic(), 60 * options.minutes
    bar = tqdm(total=seconds, bar_format="{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s{postfix}", mininterval=1)
    try:
        for seed, op in ((seed, op) for seed in count(first) for op in ops):
            again = f"python -m bench.soak --minutes 0 --seed {seed} --only {op}"
            with no_hang(again):
                if wrong := run_case(seed, op, where, tallies[op]):
                    tqdm.write(f"{again}\n    {' '.join(wrong.split())[:1000]}")
            elapsed, cases = time.monotonic() - started, sum(t.cases for t in tallies.values())
            failed = sum(t.failed for t in tallies.values())
            bar.set_postfix_str(f"{cases} cases, {cases / elapsed:.1f} a second, {failed} failed", refresh=False)
            bar.update(min(elapsed, seconds) - bar.n)
            if elapsed >= seconds and cases >= len(ops):
                break
    except KeyboardInterrupt:  # what it has found so far
        pass
    bar.close()
    print(summary(tallies), flush=True)
    return int(any(t.failed for t in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
