"""The selectors on `jax.Array`s: as `lvtp.id_selection` and `lvtp.prune_sid`, but the answer is int32.

Outside `jit` the arrays are passed to torch by DLPack, without a copy. Inside `jit` and `vmap` a call is one of XLA's
custom calls on the platforms that `calls()` names, the CPU and CUDA devices; where their library was not built, and on
other devices, a callback to the host. Arguments are checked when they are traced.
"""

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lvtp import chips, ops


def id_selection(features, importance, k: int, gamma: float = 20.0, mask=None) -> jax.Array:
    """int32 [B, k]; see `lvtp.id_selection`."""

    def arguments(features, importance, mask):
        return features, importance, k, gamma, mask

    attributes = {"k": np.int64(k), "gamma": np.float64(gamma), "given": np.int64(mask is not None)}
    return _select("id_selection", arguments, (features, importance, mask), attributes)


def prune_sid(
    features, importance, n: int, reserved: int = 0, center: str = "feature", labels=None, mask=None
) -> jax.Array:
    """int32 [B, min(n - reserved, N)]; see `lvtp.prune_sid`. Labels may be int32 as well."""

    def arguments(features, importance, labels, mask):
        return features, importance, n, reserved, center, None if labels is None else labels.long(), mask

    given = sum((a is not None) << i for i, a in enumerate((importance, labels, mask)))
    attributes = {"n": np.int64(n), "reserved": np.int64(reserved), "center": center, "given": np.int64(given)}
    return _select("prune_sid", arguments, (features, importance, labels, mask), attributes)


@functools.cache
def calls() -> tuple[str, ...]:
    """The platforms, of "cpu" and "cuda", whose custom calls were built for this machine and are registered."""
    loaded = []
    for platform, suffix, registered in (("cpu", "", "cpu"), ("cuda", "_cuda", "CUDA")):
        library = ops._LIBRARIES / f"liblvtp_jax{suffix}{ops._SUFFIX}"
        if not library.exists() or (suffix and not chips.served_by(ops._built()["cuda_architectures"])):
            continue
        functions = ctypes.CDLL(str(library))
        for name in (f"lvtp_id_selection{suffix}", f"lvtp_prune_sid{suffix}"):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(functions, name)), platform=registered)
        loaded.append(platform)
    return tuple(loaded)


def _select(name: str, arguments, arrays: tuple, attributes: dict) -> jax.Array:
    def on(tensors) -> torch.Tensor:
        every = iter(tensors)
        return ops.call(name, *arguments(*(None if a is None else next(every) for a in arrays)))

    present = [a for a in arrays if a is not None]
    if not any(isinstance(a, jax.core.Tracer) for a in present):
        return jnp.from_dlpack(on(map(torch.from_dlpack, present)).int())

    shape = tuple(on(map(_meta, present)).shape)  # by the operator's fake kernel, which checks the arguments
    ways = {
        "cpu": functools.partial(_on_cpu, name, shape, attributes),
        "cuda": functools.partial(_on_cuda, name, shape, attributes),
    }
    return jax.lax.platform_dependent(
        *map(jax.lax.stop_gradient, present),
        default=lambda *a: jax.pure_callback(
            lambda *a: on(map(torch.from_dlpack, a)).int().numpy(force=True),
            jax.ShapeDtypeStruct(shape, jnp.int32), *a, vmap_method="sequential",
        ),
        **{platform: ways[platform] for platform in calls()},
    )  # fmt: skip


def _on_cpu(name: str, shape: tuple, attributes: dict, *arrays) -> jax.Array:
    result = jax.ShapeDtypeStruct(shape, jnp.int32)
    return jax.ffi.ffi_call(f"lvtp_{name}", result, vmap_method="broadcast_all")(*arrays, **attributes)


def _on_cuda(name: str, shape: tuple, attributes: dict, features, *others) -> jax.Array:
    """The kernels read importance in fp32, and labels and picks are int64: two int32s each, the low one first."""

    def as_read(array):
        if jnp.issubdtype(array.dtype, jnp.floating):
            return array.astype(jnp.float32)
        if array.dtype == jnp.bool_:
            return array
        low = array.astype(jnp.int32)
        return jnp.stack((low, low >> 31), -1)

    result = jax.ShapeDtypeStruct((*shape, 2), jnp.int32)
    call = jax.ffi.ffi_call(f"lvtp_{name}_cuda", result, vmap_method="broadcast_all")
    return call(features, *map(as_read, others), **attributes)[..., 0]


def _meta(array) -> torch.Tensor:
    dtype = getattr(torch, array.dtype.name, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"lvtp.jax: torch has no dtype {array.dtype.name}")
    return torch.empty(array.shape, dtype=dtype, device="meta")
