"""lvtp called by others: arrays of other libraries, many threads at once."""

import sys
import types

import numpy as np
import pytest
import torch
from test_torch import OPERATORS, example, inputs

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
