"""What the operators' Python functions take for each argument of a schema, and how it reaches the dispatcher."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from lvtp import checks, dlpack

_TYPES = {
    "Tensor": {Tensor, Parameter}, "Optional[Tensor]": {Tensor, Parameter, type(None)},
    "int": {int}, "float": {float, int}, "str": {str},
}  # fmt: skip


@dataclass(frozen=True)
class Argument:
    op: str
    name: str
    kind: str  # a key of _TYPES
    types: frozenset[type]  # what the dispatcher takes as it is; everything else goes through `ready`

    @property
    def is_tensor(self) -> bool:
        return "Tensor" in self.kind

    @property
    def optional(self) -> bool:
        return self.kind == "Optional[Tensor]"

    def ready(self, value):
        """`value` as the dispatcher takes it. Raises `TypeError` or `ValueError`, which name the argument."""
        if self.kind == "int":
            return checks.count(self.op, self.name, value)
        if self.kind == "float":
            return checks.number(self.op, self.name, value)
        if self.kind == "str":
            return checks.text(self.op, self.name, value)
        if value is None and self.optional:
            return None
        value = dlpack.tensor(value, self.op, self.name)
        checks.check_dense(self.op, self.name, value)  # a nested tensor knows none of our operators
        if type(value).__module__ == "torch.distributed.tensor":
            _register_sharding_rules()
        return value


def of(operator: torch._ops.OpOverload) -> tuple[Argument, ...]:
    schema = operator._schema
    kinds = [str(a.type).replace("SymInt", "int") for a in schema.arguments]
    op = schema.name.removeprefix("lvtp::")
    return tuple(Argument(op, a.name, k, frozenset(_TYPES[k])) for a, k in zip(schema.arguments, kinds, strict=True))


def constant_when_traced(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, all that it does, without importing torch._dynamo and Triton (0.8 s)."""
    function._dynamo_marked_constant = True
    return function


@constant_when_traced
def _register_sharding_rules() -> bool:
    importlib.import_module("lvtp.distributed")
    return True
