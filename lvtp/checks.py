"""Argument checks, once: the Python twin of `csrc/checks.h`, same order, same words.

Every check reads metadata only (rank, shape, dtype, device), so it never waits for a GPU, and the fake
kernels run the same ones. A failed one raises `RuntimeError`, as torch's own operators do, whichever backend runs:
the stable ABI can throw nothing else, and what a caller catches must not depend on where a tensor lives.
"""

import contextlib
import math
import operator

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT_DTYPES = (*FEATURE_DTYPES, torch.float64)
CENTERS = ("feature", "token")


def _fail_unless(ok, op: str, argument: str, takes: str, got) -> None:
    # A float as C++ prints it.
    torch._check(ok, lambda: f"{op}: {argument} must be {takes}, got {f'{got:g}' if isinstance(got, float) else got}")


def _fail(op: str, argument: str, takes: str, got) -> None:
    _fail_unless(False, op, argument, takes, got)


def _shape(t: Tensor) -> str:
    return "[" + ", ".join(str(s) for s in t.shape) + "]"


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def check_dense(op: str, name: str, t: Tensor) -> None:
    """No twin in C++: the dispatcher takes tensors alone, and hands those that are not dense to the reference."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {_kind(t)}")
    _fail_unless(t.layout == torch.strided, op, name, "a dense tensor", str(t.layout).removeprefix("torch."))


def check_features(op: str, features: Tensor) -> None:
    check_dense(op, "features", features)
    _fail_unless(features.dim() == 3, op, "features", "a [B, N, D] tensor", f"shape {_shape(features)}")
    _fail_unless(features.dtype in FEATURE_DTYPES, op, "features", "float32, float16 or bfloat16", _dtype(features))
    _fail_unless(features.shape[1] >= 1, op, "features", "a tensor of at least one token (N >= 1)", _shape(features))
    _fail_unless(features.shape[2] >= 1, op, "features", "a tensor of at least one feature (D >= 1)", _shape(features))


def check_scores(op: str, name: str, scores: Tensor) -> None:
    """[B, N] of any floating dtype, when it is the argument that defines B and N."""
    check_dense(op, name, scores)
    _fail_unless(scores.dim() == 2, op, name, "a [B, N] tensor", f"shape {_shape(scores)}")
    _fail_unless(scores.dtype in FLOAT_DTYPES, op, name, "a floating-point tensor", _dtype(scores))
    _fail_unless(scores.shape[1] >= 1, op, name, "a tensor of at least one token (N >= 1)", _shape(scores))


def check_companion(op: str, name: str, t: Tensor, like: Tensor, shape: tuple, kind: str) -> None:
    """A tensor whose shape and device follow another's. `kind`: "float", "int64" or "bool"."""
    check_dense(op, name, t)
    wanted = "[" + ", ".join(str(s) for s in shape) + "]"
    _fail_unless(t.dim() == len(shape), op, name, f"of shape {wanted}", _shape(t))
    for a, b in zip(t.shape, shape, strict=True):
        _fail_unless(a == b, op, name, f"of shape {wanted}", _shape(t))
    if kind == "float":
        _fail_unless(t.dtype in FLOAT_DTYPES, op, name, "a floating-point tensor", _dtype(t))
    else:
        _fail_unless(_dtype(t) == kind, op, name, f"{kind}", _dtype(t))
    _fail_unless(t.device == like.device, op, name, f"on {like.device}", f"{t.device}")


def check_mask(op: str, mask: Tensor | None, like: Tensor) -> None:
    """`mask` [B, N] bool (False = padding) beside a [B, N, ...] tensor."""
    if mask is not None:
        check_companion(op, "mask", mask, like, (like.shape[0], like.shape[1]), "bool")


def check_count(op: str, name: str, value, low, high=None) -> None:
    takes = f"at least {low}" if high is None else f"in [{low}, {high}]"
    _fail_unless(_may_be_at_most(low, value), op, name, takes, value)
    if high is not None:
        _fail_unless(_may_be_at_most(value, high), op, name, takes, value)


def _may_be_at_most(low, high):
    """low <= high. Where a graph is traced and both are symbols: False only if that never holds, without a guard.

    A guard such as N // 4 <= N would narrow what the graph serves, and export refuses those that it cannot prove. The
    kernel checks the values whenever the graph runs.
    """
    if isinstance(low, torch.SymInt) and isinstance(high, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import statically_known_false  # slow to import; tracing has done it

        return not statically_known_false(low <= high)
    return low <= high


def check_gamma(op: str, gamma: float) -> None:
    _fail_unless(math.isfinite(gamma) and gamma >= 0, op, "gamma", "finite and at least 0", gamma)


def check_center(op: str, center: str) -> None:
    _fail_unless(center in CENTERS, op, "center", '"feature" or "token"', f'"{center}"')


# Python's own kinds. The dispatcher holds compiled kernels to them, so these have no twin.


def count(op: str, name: str, value):
    """A count, by its `__index__`: NumPy's integers count, True and 5.0 do not."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, bool) and not _waits(value):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{op}: {name} must be an integer, got {_kind(value)}")


def number(op: str, name: str, value):
    """A real number: Python's, NumPy's, or an array of one."""
    if type(value) in (float, int) or isinstance(value, torch.SymFloat | torch.SymInt):
        return value
    is_one = hasattr(value, "__float__") and not getattr(value, "shape", ())
    if is_one and not isinstance(value, bool) and not _waits(value):
        with contextlib.suppress(TypeError):  # what JAX traces has no value
            return float(value)
    takes = "a number, or a tensor [B]" if name == "threshold" else "a number"
    raise TypeError(f"{op}: {name} must be {takes}, got {_kind(value)}")


def _waits(value) -> bool:
    """Whether reading it would wait for another device."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def text(op: str, name: str, value) -> str:
    if isinstance(value, str):
        return value
    raise TypeError(f"{op}: {name} must be a string, got {_kind(value)}")


def _kind(value) -> str:
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, Tensor):
        return f"a tensor of {_dtype(value)}, shape {_shape(value)}, on {value.device}"
    return type(value).__name__


# One function an operator: what `csrc/checks.h` does for the compiled kernels, in the same order. And one for `take`.


def cosine_similarity(features: Tensor) -> None:
    check_features("cosine_similarity", features)


def mean_similarity(features: Tensor, mask: Tensor | None = None) -> None:
    check_features("mean_similarity", features)
    check_mask("mean_similarity", mask, features)


def greedy_suppression(
    scores: Tensor, similarity: Tensor, k: int, gamma: float = 20.0, mask: Tensor | None = None
) -> None:
    op = "greedy_suppression"
    check_scores(op, "scores", scores)
    n = scores.shape[1]
    check_companion(op, "similarity", similarity, scores, (scores.shape[0], n, n), "float")
    check_count(op, "k", k, 1, n)
    check_gamma(op, gamma)
    check_mask(op, mask, scores)


def cluster_nms(
    scores: Tensor, labels: Tensor, similarity: Tensor, threshold: float | Tensor, mask: Tensor | None = None
) -> None:
    op = "cluster_nms"
    check_scores(op, "scores", scores)
    b, n = scores.shape
    check_companion(op, "labels", labels, scores, (b, n), "int64")
    check_companion(op, "similarity", similarity, scores, (b, n, n), "float")
    if isinstance(threshold, Tensor):
        check_companion(op, "threshold", threshold, scores, (b,), "float")
    check_mask(op, mask, scores)


def psca(features: Tensor, groups: int, center: str = "feature") -> None:
    check_features("psca", features)
    check_count("psca", "groups", groups, 1, features.shape[1])
    check_center("psca", center)


def id_selection(features: Tensor, importance: Tensor, k: int, gamma: float = 20.0, mask: Tensor | None = None) -> None:
    op = "id_selection"
    check_features(op, features)
    check_companion(op, "importance", importance, features, (features.shape[0], features.shape[1]), "float")
    check_count(op, "k", k, 1, features.shape[1])
    check_gamma(op, gamma)
    check_mask(op, mask, features)


def prune_sid(
    features: Tensor,
    importance: Tensor | None,
    n: int,
    reserved: int = 0,
    center: str = "feature",
    labels: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    op = "prune_sid"
    check_features(op, features)
    shape = (features.shape[0], features.shape[1])
    if importance is not None:
        check_companion(op, "importance", importance, features, shape, "float")
    check_count(op, "n", n, 1)
    check_count(op, "reserved", reserved, 0, n - 1)
    _fail_unless(n - reserved >= 1, op, "reserved", f"in [0, {n - 1}]", reserved)  # a size, so for symbols too
    check_center(op, center)
    if labels is not None:
        check_companion(op, "labels", labels, features, shape, "int64")
        _fail_unless(importance is not None, op, "importance", "given when labels are", "None")
    check_mask(op, mask, features)


def dynamic_budget(features: Tensor, total: int, minimum: int = 1) -> None:
    op = "dynamic_budget"
    check_features(op, features)
    check_count(op, "minimum", minimum, 0, features.shape[1])
    b, n = features.shape[0], features.shape[1]
    check_count(op, "total", total, b * minimum, b * n)


def take(features: Tensor, keep: Tensor) -> None:
    """Traced into its caller's graph, where a size has no text: messages are made for failures alone."""
    for name, t in (("features", features), ("keep", keep)):
        if t.layout != torch.strided:
            check_dense("take", name, t)
    if features.dim() != 3:
        _fail("take", "features", "a [B, N, D] tensor", f"shape {_shape(features)}")
    if keep.dim() != 2:
        _fail("take", "keep", "a [B, k] tensor", f"shape {_shape(keep)}")
    if keep.dtype not in (torch.int64, torch.int32):
        _fail("take", "keep", "int64 or int32", _dtype(keep))
    if keep.shape[0] != features.shape[0]:
        _fail("take", "keep", f"a [B, k] tensor for the {features.shape[0]} images of features", _shape(keep))
    if keep.device != features.device:
        _fail("take", "keep", f"on {features.device}", f"{keep.device}")
