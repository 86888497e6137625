"""lvtp.jax's way to CUDA devices, from `jit` to the kernels: JAX's calls on the CPU, the kernels on the emulator."""

import ctypes

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from test_jax import cases, jitted, to_jax, want  # noqa: E402
from test_torch import example  # noqa: E402

import lvtp  # noqa: E402
import lvtp.jax  # noqa: E402

from . import build, kernels  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def registered():
    kernels.module().set_seed(1)
    functions = ctypes.CDLL(str(build.build().with_name("jax_calls.so")))
    for name in ("id_selection", "prune_sid"):
        jax.ffi.register_ffi_target(f"lvtp_{name}_cuda", jax.ffi.pycapsule(getattr(functions, f"{name}_on_host")))


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch):
    """What is chosen where a computation is lowered for CUDA devices."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, **others: cuda(*args))
    monkeypatch.setattr(lvtp.jax, "calls", lambda: ("cuda",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_jit(dtype):
    for name, args in cases(dtype):
        function, arrays = jitted(name, args)
        assert np.array_equal(function(*arrays), want(name, args)), (name, args)


def test_vmap_of_jit_and_no_images():
    for name, args in cases(b=6)[1::2]:
        function, arrays = jitted(name, args)
        got = jax.vmap(function)(*(a.reshape(2, 3, *a.shape[1:]) for a in arrays))
        assert np.array_equal(got.reshape(6, -1), want(name, args)), name
        assert function(*(a[:0] for a in arrays)).shape == (0, got.shape[-1])


def test_labels_out_of_range_go_to_the_nearest_group():
    features, importance, *_ = example("id_selection", b=1)
    labels = torch.arange(features.shape[1])[None] % 5 - 1
    function, arrays = jitted("prune_sid", (features, importance, 12, 0, "feature", labels.int(), None))
    assert np.array_equal(function(*arrays), lvtp.prune_sid(features, importance, 12, labels=labels.clamp(0, 2)).int())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"features": lambda x: x.astype(jnp.int32)}, "features must be F32, F16 or BF16, got S32"),
        ({"importance": lambda s: s[:, 1:]}, "importance must be 72 elements, got 69"),
        ({"importance": lambda s: s.astype(jnp.bfloat16)}, "importance must be F32, got BF16"),
        ({"mask": lambda m: m[:, :3]}, "mask must be 72 elements, got 9"),
        ({"k": 25}, r"k must be in \[1, 24\], got 25"),
        ({"out": (3, 6, 2)}, "the answer must be 30 elements, got 36"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_call_that_would_read_or_write_elsewhere_fails(change, says):
    features, importance, k, _, mask = map(to_jax, example("id_selection", b=3))
    arrays = {"features": features, "importance": importance, "mask": mask}
    arrays = [change.get(name, lambda a: a)(array) for name, array in arrays.items()]
    result = jax.ShapeDtypeStruct(change.get("out", (3, k, 2)), jnp.int32)
    call = jax.ffi.ffi_call("lvtp_id_selection_cuda", result)
    with pytest.raises(Exception, match=says):
        call(*arrays, k=np.int64(change.get("k", k)), gamma=np.float64(20), given=np.int64(1)).block_until_ready()
