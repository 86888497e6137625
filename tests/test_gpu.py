"""What only a GPU can show: streams, graphs, threads, devices, and that the host never waits.

What the operators compute is the business of their own tests, which run on CUDA tensors too; `pytest -m gpu` runs all.
"""

import contextlib
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations_with_replacement

import pytest
import torch
from conftest import NO_GPU
from test_torch import OPERATORS, Selectors, example

import lvtp

pytestmark = [pytest.mark.gpu, NO_GPU]
N = 577
# The examples of test_torch.py are narrow; these take the ways of wide features, of more eigenvectors than one block
# finds, and of matrices too large to hold.
WIDE = {
    "psca, wide": lambda x, s: (x[:, :N], 16),
    "prune_sid, wide": lambda x, s: (x[:, :N], s[:, :N], 64),
    "id_selection, many tokens": lambda x, s: (x[..., :64].contiguous(), s, 8),
}
CALLS = (*OPERATORS, *WIDE)
CYCLES = 20_000_000  # about 10 ms
# The queue of launches that have not begun has an end, at which the host waits. Triton's kernels for these, some 800,
# may not fit.
LONG = ("psca", "prune_sid")


@pytest.fixture(params=("native", "triton"))
def served(request):
    """A function that makes calls in its thread go to the compiled kernels, or to Triton's."""
    return partial(lvtp.use_backend, request.param)


def run(name, args):
    """What the operator returns, as a list of tensors."""
    out = getattr(lvtp, re.split("[.,]", name)[0])(*args)
    return list(out) if isinstance(out, tuple) else [out]


def arguments(name, device="cuda"):
    if name in WIDE:
        g = torch.Generator().manual_seed(0)
        x, s = torch.randn(2, 4097, 1024, generator=g).bfloat16(), torch.rand(2, 4097, generator=g)
        values = WIDE[name](x, s)
    else:
        values = example(name, torch.bfloat16, 3, N)
    return tuple(a.to(device).contiguous() if isinstance(a, torch.Tensor) else a for a in values)


def other_images(args):
    """The same images in another order: arguments of the same shapes with other values."""
    return tuple(a.roll(1, 0) if isinstance(a, torch.Tensor) else a for a in args)


def overwrite(args, values):
    for old, new in zip(args, values, strict=True):
        if isinstance(old, torch.Tensor):
            old.copy_(new)


def equal(got, wanted):
    return all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@contextlib.contextmanager
def no_waiting():
    """torch raises where the host would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", CALLS)
def test_runs_on_the_current_stream(served, name):
    """Its arguments come late on that stream; on any other they would still be zeros."""
    values = arguments(name)
    args = tuple(torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in values)
    with served():
        wanted = run(name, values)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(CYCLES)
            overwrite(args, values)
            got = run(name, args)
            torch.cuda.current_stream().synchronize()
    assert equal(got, wanted)


@pytest.mark.parametrize("name", CALLS)
def test_the_host_does_not_wait(served, name):
    args = arguments(name)
    stalls = not (served.args == ("triton",) and name.startswith(LONG))
    with served():
        wanted = [w.cpu() for w in run(name, args)]  # Triton compiles, and memory is there for the next call
        torch.cuda.synchronize()
        started = torch.cuda.Event()
        with no_waiting():
            if stalls:
                torch.cuda._sleep(30 * CYCLES)
            started.record()
            got = run(name, args)
        if stalls:  # the device has not come to the operator yet
            assert not started.query()
    assert equal([g.cpu() for g in got], wanted)


@pytest.mark.parametrize("name", CALLS)
def test_captured_in_a_graph_and_replayed_on_other_values(served, name):
    args = arguments(name)
    first, second = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args), other_images(args)
    with served():
        wanted = [run(name, values) for values in (first, second)]
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for _ in range(2):
                run(name, args)
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(name, args)
        for turn in (1, 0, 0, 1):
            overwrite(args, (first, second)[turn])
            for result in got:
                result.fill_(7)
            graph.replay()
            assert equal(got, wanted[turn])


def test_compiled_with_cuda_graphs(served):
    from torch._dynamo.utils import counters

    features, importance = (a.cuda() for a in example("id_selection", torch.float16, 3, N)[:2])
    with served():
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(Selectors(), mode="reduce-overhead", fullgraph=True)
        for turn in range(4):  # eager, recorded, replayed
            inputs = features.roll(turn, 0).clone(), importance.roll(turn, 0).clone()
            torch.compiler.cudagraph_mark_step_begin()
            got = [t.clone() for t in compiled(*inputs)]
            assert equal(got, Selectors()(*inputs))
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_threads_with_streams_of_their_own(served):
    def calls(name):
        args = arguments(name)
        with served(), torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            all_same = [equal(run(name, args), wanted[name]) for _ in range(10)]
            torch.cuda.current_stream().synchronize()
        return all(all_same)

    with served():
        wanted = {name: run(name, arguments(name)) for name in OPERATORS}
        torch.cuda.synchronize()
    with ThreadPoolExecutor(2 * len(OPERATORS)) as pool:
        assert all(pool.map(calls, OPERATORS * 2))


@pytest.mark.parametrize(("one", "other"), combinations_with_replacement(WIDE, 2))
def test_kernels_that_want_the_whole_device_run_at_once(one, other):
    """Their blocks wait for each other, so all of one kernel's must get in; with half of two each, both would wait for
    ever. Two threads queue calls behind one gate, and both streams begin when it opens."""
    gate, opened, queued = torch.cuda.Stream(), torch.cuda.Event(), threading.Barrier(2, timeout=30)

    def calls(name):
        stream, begun, ended = torch.cuda.Stream(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
        with lvtp.use_backend("native"), torch.cuda.stream(stream):
            args = arguments(name)
            wanted = run(name, args)
            torch.cuda.synchronize()
            if queued.wait() == 0:
                with torch.cuda.stream(gate):
                    torch.cuda._sleep(20 * CYCLES)
                    opened.record()
            queued.wait()
            stream.wait_event(opened)
            begun.record()
            got = [run(name, args) for _ in range(10)]
            ended.record()
            stream.synchronize()
        return begun, ended, all(equal(each, wanted) for each in got)

    with ThreadPoolExecutor(2) as pool:
        (begun, ended, same), (other_begun, other_ended, other_same) = pool.map(calls, (one, other))
    assert same
    assert other_same
    assert begun.elapsed_time(other_ended) > 0
    assert other_begun.elapsed_time(ended) > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("name", OPERATORS)
def test_runs_where_its_arguments_are(served, name):
    with served(), torch.cuda.device(0):
        wanted = run(name, arguments(name, "cuda:0"))
        got = run(name, arguments(name, "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(g.device == torch.device("cuda:1") for g in got)
    assert equal([g.cpu() for g in got], [w.cpu() for w in wanted])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_sum_does_not_depend_on_what_else_is_computed(dtype):
    """Many images are computed in larger tiles than one alone."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, N, 1000, generator=g).to("cuda", dtype)
    sim = lvtp.cosine_similarity(x)
    assert torch.equal(sim[5:6], lvtp.cosine_similarity(x[5:6]))
    assert torch.equal(sim, sim.mT)
