"""The operators in Triton, installed as `lvtp.triton_kernels`.

One operator is one file of its name, and in it a function of its name that takes the operator's arguments. Importing
this package imports no Triton; `launcher` does, when an operator is first asked for.
"""

import importlib
from collections.abc import Callable

OPERATORS = (
    "cluster_nms", "cosine_similarity", "dynamic_budget", "greedy_suppression", "id_selection", "mean_similarity",
    "prune_sid", "psca",
)  # fmt: skip


def launcher(name: str) -> Callable:
    """The function that runs operator `name`, one of OPERATORS."""
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)
