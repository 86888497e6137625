"""The selectors on `jax.Array`s: as `lvtp.id_selection` and `lvtp.prune_sid`, but the answer is int32.

Outside `jit` the arrays are passed to torch by DLPack, without a copy. Inside `jit` and `vmap` a call is one of XLA's
custom calls on the platforms that `calls()` names, the CPU and CUDA devices; where their library was not built, on
other devices, and under `use_backend` of "triton" or "reference", a callback to the host. Arguments are checked when
they are traced. `take` gives the tokens themselves.
"""

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lvtp import arguments, checks, chips, dlpack, ops

_INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64)


def id_selection(features, importance, k: int, gamma: float = 20.0, mask=None) -> jax.Array:
    """int32 [B, k]; see `lvtp.id_selection`."""
    return _select("id_selection", features, importance, k, gamma, mask)


def prune_sid(
    features, importance, n: int, reserved: int = 0, center: str = "feature", labels=None, mask=None
) -> jax.Array:
    """int32 [B, min(n - reserved, N)]; see `lvtp.prune_sid`. Labels may be of any integer dtype from 8 bits up."""
    return _select("prune_sid", features, importance, n, reserved, center, labels, mask)


def take(features, keep) -> tuple[jax.Array, jax.Array]:
    """The tokens that a selector chose, and which of them there are; see `lvtp.take`.

    JAX takes an index of -1 for the last token. An index that is out of range otherwise follows the rules of
    `jnp.take_along_axis`.
    """
    features, keep = _array("features", features), _array("keep", keep)
    checks.take(_meta("take", "features", features), _meta("take", "keep", keep))
    valid = keep != -1
    tokens = jnp.take_along_axis(features, jnp.where(valid, keep, 0)[..., None], axis=1)
    return jnp.where(valid[..., None], tokens, jnp.zeros((), tokens.dtype)), valid


def _array(name: str, value) -> jax.Array:
    if isinstance(value, jax.Array):
        return value
    tensor = dlpack.tensor(value, "take", name)  # refuses what is no array, or none that can be read
    return jnp.asarray(value if isinstance(value, np.ndarray) else tensor.numpy(force=True))


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


def _select(name: str, *args) -> jax.Array:
    takes = arguments.of(getattr(torch.ops.lvtp, name).default)
    args = [a if t.is_tensor else t.ready(a) for a, t in zip(args, takes, strict=True)]
    places = [i for i, t in enumerate(takes) if t.is_tensor and not (t.optional and args[i] is None)]
    arrays = [args[i] for i in places]

    def on(call, tensors) -> torch.Tensor:
        """`call` with these tensors in the places of the arrays."""
        given = {i: _wide(t) if takes[i].name == "labels" else t for i, t in zip(places, tensors, strict=True)}
        return call(*(given.get(i, a) for i, a in enumerate(args)))

    run = functools.partial(ops.call, name)
    if not any(isinstance(a, jax.core.Tracer) for a in arrays):
        return jnp.from_dlpack(on(run, [takes[i].ready(args[i]) for i in places]).int())

    # By the operator's fake kernel, which checks the arguments.
    meta = [_meta(name, takes[i].name, args[i]) for i in places]
    shape = tuple(on(getattr(torch.ops.lvtp, name), meta).shape)
    backend = ops.backend_in_force()  # a compiled function keeps the one it was traced under

    def callback(*arrays):
        with ops.use_backend(backend):  # which is another thread's here
            return on(run, map(torch.from_dlpack, arrays)).int().numpy(force=True)

    given = sum((args[i] is not None) << bit for bit, i in enumerate(i for i, t in enumerate(takes) if t.optional))
    attributes = {t.name: _ATTRIBUTES[t.kind](a) for a, t in zip(args, takes, strict=True) if not t.is_tensor}
    attributes["given"] = np.int64(given)
    ways = {
        "cpu": functools.partial(_on_cpu, name, shape, attributes),
        "cuda": functools.partial(_on_cuda, name, shape, attributes),
    }
    return jax.lax.platform_dependent(
        *(jax.lax.stop_gradient(_for_xla(a)) for a in arrays),
        default=lambda *a: jax.pure_callback(
            callback, jax.ShapeDtypeStruct(shape, jnp.int32), *a, vmap_method="sequential"
        ),
        **{platform: ways[platform] for platform in calls() if backend in ("auto", "native")},
    )


_ATTRIBUTES = {"int": np.int64, "float": np.float64, "str": str}


def _wide(labels: torch.Tensor) -> torch.Tensor:
    return labels.long() if labels.dtype in _INTEGERS else labels


def _for_xla(array) -> jax.Array:
    """As the custom calls take it: their integers are int32 and int64."""
    array = jnp.asarray(array)
    small = jnp.issubdtype(array.dtype, jnp.integer) and array.dtype not in (jnp.int32, jnp.int64)
    return array.astype(jnp.int32) if small else array


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


def _meta(op: str, argument: str, array) -> torch.Tensor:
    if not isinstance(array, jax.Array):
        return dlpack.tensor(array, op, argument).to("meta")
    dtype = getattr(torch, array.dtype.name, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: {argument} must be of a dtype that torch has, got {array.dtype.name}")
    return torch.empty(array.shape, dtype=dtype, device="meta")
