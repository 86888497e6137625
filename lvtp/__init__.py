"""lvtp: visual-token selectors for vision-language models as fast, exact, deterministic torch ops.

    keep = lvtp.id_selection(features, importance, k=64)         # [B, 576, 1024], [B, 576] -> int64 [B, 64]
    tokens, valid = lvtp.take(features, keep)                    # [B, 64, 1024], bool [B, 64]
    with lvtp.hf.prune(model, keep=64):                          # any LLaVA of transformers
        model.generate(**inputs)

Arrays of other libraries (anything with `__dlpack__`: NumPy, CuPy, JAX) are taken without a copy, and the first
argument's library is the one that answers. `lvtp.reference` holds the same functions in plain PyTorch for tensors,
`torch.ops.lvtp` the operators themselves.
"""

import importlib
from importlib.metadata import version

from lvtp import reference
from lvtp.budget import Budget, dynamic_budget
from lvtp.ops import (
    build_info,
    cluster_nms,
    cosine_similarity,
    greedy_suppression,
    mean_similarity,
    psca,
    use_backend,
)
from lvtp.select import id_selection, prune_sid, take

__version__ = version("lvtp")

__all__ = [
    "Budget",
    "build_info",
    "cluster_nms",
    "cosine_similarity",
    "dynamic_budget",
    "greedy_suppression",
    "id_selection",
    "mean_similarity",
    "prune_sid",
    "psca",
    "reference",
    "take",
    "use_backend",
]


def __getattr__(name: str):
    if name == "hf":  # on first use: it imports transformers
        return importlib.import_module("lvtp.hf")
    raise AttributeError(f"module 'lvtp' has no attribute {name!r}")
