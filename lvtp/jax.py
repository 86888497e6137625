"""The selectors on `jax.Array`s: as `lvtp.id_selection` and `lvtp.prune_sid`, but the answer is int32.

Outside `jit` the arrays are passed to torch by DLPack, without a copy. Inside `jit` and `vmap` a call is one of XLA's
custom calls on the CPU; where its library was not built (`calls()` says so), and on other devices, a callback to the
host. Arguments are checked when they are traced.
"""

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lvtp import ops


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
def calls() -> str:
    """ "xla" where the custom calls were built and registered, else "callback"."""
    library = ops._LIBRARIES / f"liblvtp_jax{ops._SUFFIX}"
    if not library.exists():
        return "callback"
    loaded = ctypes.CDLL(str(library))
    for name in ("lvtp_id_selection", "lvtp_prune_sid"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return "xla"


def _select(name: str, arguments, arrays: tuple, attributes: dict) -> jax.Array:
    def on(tensors) -> torch.Tensor:
        every = iter(tensors)
        return ops.call(name, *arguments(*(None if a is None else next(every) for a in arrays)))

    present = [a for a in arrays if a is not None]
    if not any(isinstance(a, jax.core.Tracer) for a in present):
        return jnp.from_dlpack(on(map(torch.from_dlpack, present)).int())

    shape = tuple(on(map(_meta, present)).shape)  # by the operator's fake kernel, which checks the arguments
    result = jax.ShapeDtypeStruct(shape, jnp.int32)
    present = [jax.lax.stop_gradient(a) for a in present]
    if calls() == "xla" and jax.default_backend() == "cpu":
        return jax.ffi.ffi_call(f"lvtp_{name}", result, vmap_method="broadcast_all")(*present, **attributes)
    return jax.pure_callback(
        lambda *a: on(map(torch.from_dlpack, a)).int().numpy(force=True), result, *present, vmap_method="sequential"
    )


def _meta(array) -> torch.Tensor:
    dtype = getattr(torch, array.dtype.name, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"lvtp.jax: torch has no dtype {array.dtype.name}")
    return torch.empty(array.shape, dtype=dtype, device="meta")
