"""Arrays of other libraries, by DLPack: taken without a copy, answered by an array of the same library."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor


def in_kind(call: Callable, name: str, args: tuple, overload: str):
    """`call` on tensors that share the arrays' memory. The first argument's library is the one that answers."""
    schema = getattr(getattr(torch.ops.lvtp, name), overload)._schema
    tensors = [_tensor(a, name, argument) for a, argument in zip(args, schema.arguments, strict=False)]
    from_dlpack = _namespace(args[0]).from_dlpack
    out = call(name, *tensors, overload=overload)
    return tuple(map(from_dlpack, out)) if isinstance(out, tuple) else from_dlpack(out)


def _tensor(value, name: str, argument):
    if value is None or isinstance(value, Tensor) or "Tensor" not in str(argument.type):
        return value
    if not hasattr(value, "__dlpack__"):
        raise TypeError(
            f"{name}: {argument.name} must be a torch.Tensor or an array with __dlpack__, got {type(value).__name__}"
        )
    if any(stride < 0 for stride in getattr(value, "strides", None) or ()):  # torch ends the process over it
        raise ValueError(f"{name}: {argument.name} must not run backwards in memory, got strides {value.strides}")
    return torch.from_dlpack(value)


def _namespace(array):
    """The module whose from_dlpack makes arrays of this kind; before the array API standard, the library's own."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules[type(array).__module__.partition(".")[0]]
