"""lvtp called by others: arrays of other libraries, many threads at once."""

import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_torch import OPERATORS, example, inputs, operator

import lvtp


def to_numpy(value):
    return value.numpy() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", OPERATORS)
def test_numpy_arrays_are_answered_by_numpy_arrays(name):
    args = example(name)
    function = getattr(lvtp, name.partition(".")[0])
    got, want = function(*map(to_numpy, args)), function(*args)
    for g, w in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
        assert type(g) is np.ndarray
        assert g.dtype == w.numpy().dtype
        assert np.array_equal(g, w.numpy())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_arrays_go_to_the_backend_in_force(backend):
    features, importance = inputs(2, 24)
    with lvtp.use_backend(backend):
        got = lvtp.id_selection(features.numpy(), importance.numpy(), 5)
    assert np.array_equal(got, lvtp.id_selection(features, importance, 5).numpy())


def test_strided_float64_and_read_only_arrays():
    features, importance = (t.numpy() for t in inputs(2, 24))
    want = lvtp.id_selection(features, importance, 5)
    read_only = np.repeat(features, 2, axis=1)[:, ::2]
    read_only.flags.writeable = False
    assert np.array_equal(lvtp.id_selection(read_only, importance.astype(np.float64), 5), want)


def test_arrays_are_not_copied(monkeypatch):
    features, importance = inputs(2, 24)
    seen = []
    monkeypatch.setattr(lvtp.reference, "id_selection", lambda x, *rest: seen.append(x) or x[..., 0].long())
    with lvtp.use_backend("reference"):
        lvtp.id_selection(features.numpy(), importance.numpy(), 5)
    assert seen[0].data_ptr() == features.data_ptr()


def test_a_library_without_the_array_api_answers_by_its_own_from_dlpack(monkeypatch):
    class Array:
        def __init__(self, t):
            self.t = t

        def __dlpack__(self, **kwargs):
            return self.t.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.t.__dlpack_device__()

    Array.__module__ = "others.arrays"
    others = types.ModuleType("others")
    others.from_dlpack = lambda t: Array(torch.from_dlpack(t))
    monkeypatch.setitem(sys.modules, "others", others)
    features, importance = inputs(2, 24)
    got = lvtp.id_selection(Array(features), importance, 5)
    assert type(got) is Array
    assert torch.equal(got.t, lvtp.id_selection(features, importance, 5))


@pytest.mark.parametrize("name", OPERATORS)
def test_an_array_in_any_place_beside_tensors(name):
    args = example(name)
    function = getattr(lvtp, name.partition(".")[0])
    want = function(*args)
    for place in (i for i, a in enumerate(args) if isinstance(a, torch.Tensor)):
        got = function(*(to_numpy(a) if i == place else a for i, a in enumerate(args)))
        for g, w in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
            assert type(g) is (torch.Tensor if place else np.ndarray)
            assert np.array_equal(g, w)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_counts_and_numbers_of_numpy(backend):
    x, s = inputs(2, 24)
    labels, similarity = torch.zeros(2, 24, dtype=torch.int64), lvtp.cosine_similarity(x)
    for i, f in [(np.int64, np.float32), (np.uint8, np.float64), (np.array, np.array)]:
        calls = [
            ("id_selection", (x, s), (5, 7.0), (i(5), f(7.0))),
            ("prune_sid", (x, s), (12, 1), (i(12), i(1))),
            ("greedy_suppression", (s, similarity), (5, 7.0), (i(5), f(7.0))),
            ("cluster_nms", (s, labels, similarity), (0.5,), (f(0.5),)),
            ("psca", (x,), (4,), (i(4),)),
            ("dynamic_budget", (x,), (20, 2), (i(20), i(2))),
        ]
        for name, tensors, python, numpy in calls:
            want = getattr(lvtp, name)(*tensors, *python)
            with lvtp.use_backend(backend):
                torch.testing.assert_close(getattr(lvtp, name)(*tensors, *numpy), want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(getattr(lvtp.reference, name)(*tensors, *numpy), want, rtol=1e-5, atol=1e-5)


X, S = np.ones((2, 6, 4), np.float32), np.ones((2, 6), np.float32)
NO_ARRAYS = [
    ("id_selection", "features", (X.tolist(), S, 2), TypeError, "got list"),
    ("id_selection", "features", (None, S, 2), TypeError, "got NoneType"),
    ("id_selection", "importance", (X, S.tolist(), 2), TypeError, "got list"),
    ("id_selection", "importance", (torch.ones(2, 6, 4), S.tolist(), 2), TypeError, "got list"),
    ("id_selection", "importance", (torch.ones(2, 6, 4), None, 2), TypeError, "got NoneType"),
    ("id_selection", "mask", (X, S, 2, 20.0, (S > 0).tolist()), TypeError, "got list"),
    ("id_selection", "importance", (X, S.astype(object), 2), ValueError, "got ndarray of dtype dtype('O')"),
    ("id_selection", "features", (X.astype(">f4"), S, 2), ValueError, "got ndarray of dtype dtype('>f4')"),
    ("id_selection", "features", (X[:, ::-1], S, 2), ValueError, "got strides"),
    ("id_selection", "importance", (X, S[:, ::-1], 2), ValueError, "got strides"),
    ("id_selection", "importance", (X, np.ma.array(S, mask=S > 0), 2), TypeError, "got a masked array: pass its .data"),
    ("id_selection", "features", (torch.nested.nested_tensor([torch.ones(6, 4)] * 2, layout=torch.jagged), S, 2),
     RuntimeError, "a dense tensor, got jagged"),
    ("cluster_nms", "threshold", (S, S.astype(int), X @ X.mT, [0.5, 0.5]), TypeError, "or a tensor [B], got list"),
    ("cluster_nms", "threshold", (S, S.astype(int), X @ X.mT, None), TypeError, "or a tensor [B], got None"),
    ("id_selection", "gamma", (X, S, 2, "20"), TypeError, "a number, got str"),
    ("id_selection", "gamma", (X, S, 2, torch.tensor(20.0, device="meta")), TypeError, "on meta"),
    ("psca", "center", (X, 2, None), TypeError, "a string, got None"),
    ("take", "keep", (X, [[1, 2], [3, 4]]), TypeError, "got list"),
    ("take", "features", (np.ma.array(X), S.astype(int)), TypeError, "got a masked array"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "argument", "args", "error", "got"), NO_ARRAYS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_is_no_array_no_number_or_no_plain_one_is_refused_by_name(backend, op, argument, args, error, got):
    with lvtp.use_backend(backend), pytest.raises(error) as raised:
        getattr(lvtp, op)(*args)
    assert str(raised.value).startswith(f"{op}: {argument} must ")
    assert got in str(raised.value)


@pytest.mark.parametrize("got", [None, [1.0], X], ids=["None", "list", "ndarray"])
def test_the_reference_takes_tensors_alone_and_says_so(got):
    x, s = torch.from_numpy(X), torch.from_numpy(S)
    said = "None" if got is None else type(got).__name__
    with pytest.raises(TypeError, match=f"mean_similarity: features must be a torch.Tensor, got {said}"):
        lvtp.reference.mean_similarity(got)
    with pytest.raises(TypeError, match=f"id_selection: importance must be a torch.Tensor, got {said}"):
        lvtp.reference.id_selection(x, got, 2)
    with pytest.raises(TypeError, match=f"greedy_suppression: scores must be a torch.Tensor, got {said}"):
        lvtp.reference.greedy_suppression(got, x @ x.mT, 2)
    assert lvtp.reference.prune_sid(x, s, 2).shape == (2, 2)


def test_many_threads_at_once_get_what_one_gets():
    calls = [(name, example(name, b=b, n=n)) for name in OPERATORS for b, n in ((1, 24), (3, 40), (2, 600))]
    want = [operator(name)(*args) for name, args in calls]
    with ThreadPoolExecutor(8) as threads:
        for got in [[threads.submit(operator(name), *args) for name, args in calls] for _ in range(4)]:
            torch.testing.assert_close([g.result() for g in got], want, rtol=0, atol=0)


def test_the_gil_is_released_while_an_operator_runs():
    features = torch.randn(1, 1152, 1152, generator=torch.Generator().manual_seed(0))
    started, done = threading.Event(), []

    def run():
        started.set()
        lvtp.psca(features, 96)  # a good part of a second
        done.append(True)

    def this_thread_runs_meanwhile():
        started.clear(), done.clear()
        other = threading.Thread(target=run)
        other.start()
        started.wait()
        meanwhile = not done
        other.join()
        return meanwhile

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # only who waits, or releases the GIL, lets another thread run
    try:
        assert any(this_thread_runs_meanwhile() for _ in range(3))
    finally:
        sys.setswitchinterval(interval)
