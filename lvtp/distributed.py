"""DTensor's sharding rules for the operators, registered by importing this module; `lvtp`'s functions do so themselves
when they are given a DTensor, before `torch.ops.lvtp.*` it takes an import.

An image is selected from by itself, so a batch sharded over a mesh is served where it lies, without communication, and
the answer is sharded alike. Whatever is sharded otherwise (by tokens, by features, partial sums) is redistributed
first, as DTensor does before any operator: gathered on every rank or moved to shards of the batch, whichever it finds
cheaper. `dynamic_budget` shares one total among all images, so every rank gets them all.
"""

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from lvtp import reference


def _rule(op: torch._ops.OpOverload):
    """The placements of outputs and inputs that `op` works on, for one dimension of a mesh."""
    taken = [Replicate()] if "dynamic_budget" in op.name() else [Replicate(), Shard(0)]
    is_tensor = ["Tensor" in str(argument.type) for argument in op._schema.arguments]

    def rule(*args):  # the specs of tensors, and other arguments as they are; defaults at the end are left out
        return [
            (
                [placement] * len(op._schema.returns),
                [placement if wanted and a is not None else None for a, wanted in zip(args, is_tensor, strict=False)],
            )
            for placement in taken
        ]

    return rule


for _namespace in (torch.ops.lvtp, torch.ops.lvtp_triton):
    for _name in reference.__all__:
        for _overload in getattr(_namespace, _name).overloads():
            _op = getattr(getattr(_namespace, _name), _overload)
            register_sharding(_op)(_rule(_op))
