"""Arrays of other libraries, by DLPack: taken without a copy, answered by an array of the same library."""

import sys

import torch
from torch import Tensor


def tensor(value, op: str, argument: str) -> Tensor:
    """`value` if it is a tensor, else a tensor that shares the array's memory.

    Raises `TypeError` for what is no array, `ValueError` for an array that torch cannot read; both name the argument.
    """
    if isinstance(value, Tensor):
        return value
    takes = f"{op}: {argument} must be a torch.Tensor or an array with __dlpack__"
    if _is("jax", "core.Tracer", value):
        raise TypeError(f"{takes}, got a value that JAX traces: inside jax.jit, grad or vmap call lvtp.jax")
    if _is("numpy", "ma.MaskedArray", value):
        raise TypeError(f"{takes}, got a masked array: pass its .data, and which tokens count as the argument mask")
    if not hasattr(value, "__dlpack__"):
        raise TypeError(f"{takes}, got {type(value).__name__}")
    if any(stride < 0 for stride in getattr(value, "strides", None) or ()):  # torch ends the process over it
        raise ValueError(f"{op}: {argument} must not run backwards in memory, got strides {value.strides}")
    try:
        return torch.from_dlpack(value)
    except Exception as error:  # each library has its own for byte orders and dtypes that DLPack does not know
        got = f"{type(value).__name__} of dtype {getattr(value, 'dtype', 'unknown')!r}"
        raise ValueError(f"{takes} that torch can read, got {got}: {error}") from error


def _is(module: str, path: str, value) -> bool:
    """Whether `value` is an instance of that class; a module that is not imported has no instances."""
    kind = sys.modules.get(module)
    for name in path.split("."):
        kind = getattr(kind, name, None)
    return isinstance(kind, type) and isinstance(value, kind)


def in_kind(out: Tensor | tuple[Tensor, ...], like):
    """The answer as arrays of the library of `like`; tensors where that is one."""
    if isinstance(like, Tensor):
        return out
    from_dlpack = _namespace(like).from_dlpack
    return tuple(map(from_dlpack, out)) if isinstance(out, tuple) else from_dlpack(out)


def _namespace(array):
    """The module whose from_dlpack makes arrays of this kind; before the array API standard, the library's own."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules[type(array).__module__.partition(".")[0]]
