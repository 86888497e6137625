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


def test_what_is_no_array_is_refused_by_name():
    features, importance = inputs(2, 24)
    with pytest.raises(TypeError, match=r"id_selection: features must be a torch.Tensor or .*__dlpack__, got list"):
        lvtp.id_selection(features.tolist(), importance, 5)
    with pytest.raises(TypeError, match=r"id_selection: importance must be .* got list"):
        lvtp.id_selection(features.numpy(), importance.tolist(), 5)
    with pytest.raises(RuntimeError, match=r"id_selection: features must be float32, .* got float64"):
        lvtp.id_selection(features.double().numpy(), importance, 5)


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


def test_an_array_that_runs_backwards_is_refused_by_name():
    x, scores = np.ones((1, 4, 3), np.float32), np.ones((1, 4), np.float32)
    with pytest.raises(ValueError, match="id_selection: features must not run backwards"):
        lvtp.id_selection(x[:, ::-1], scores, 2)


def test_an_array_beside_a_tensor():
    x, scores = torch.eye(4)[None], np.array([[1, 4, 3, 2]], np.float32)
    assert lvtp.id_selection(x, scores, 2).tolist() == [[1, 2]]
