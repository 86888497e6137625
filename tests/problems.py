"""Random calls of every operator: odd shapes, ties, NaN and Inf, padding, strides, every dtype.

`test_properties.py` draws them from hypothesis, `bench/soak.py` from a seed: whatever is a `random.Random` will do.
"""

import math
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0)
FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT_DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
FEW = 40  # tokens, where the caller does not ask for more
# Beside lengths of vectors, tiles, blocks and of what is done at once.
EDGES = (1, 2, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257, 511, 513, 575, 576, 577, 729, 1023, 1024, 1025, 2881, 4097)


# --------------------------------------------------------------------------------------------------- hostile memory


def _sentinel(t):
    return torch.nan if t.is_floating_point() else True if t.dtype == torch.bool else -7


def _transposed(t):
    buffer = t.transpose(-1, -2).contiguous()
    return buffer.transpose(-1, -2), buffer


def _strided(t):
    buffer = t.new_full((*t.shape, 2), _sentinel(t))
    buffer[..., 0] = t
    return buffer[..., 0], buffer


def _offset(t):
    """One element past an aligned address, so that wide loads are misaligned."""
    buffer = t.new_full((t.numel() + 2,), _sentinel(t))
    buffer[1:-1] = t.flatten()
    return buffer[1:-1].view(t.shape), buffer


def _inside(t):
    """A window into a larger tensor."""
    buffer = t.new_full([s + 2 for s in t.shape], _sentinel(t))
    view = buffer[tuple(slice(1, s + 1) for s in t.shape)]
    view.copy_(t)
    return view, buffer


def _expanded(t):
    """Every image the first one, in the same memory: the one layout with other values than t."""
    buffer = t[:1].clone()
    return buffer.expand(t.shape), buffer


# t [..., ...] -> its values in awkward memory, and all of that memory, in which nothing may change.
VIEWS = {"transposed": _transposed, "strided": _strided, "offset": _offset, "inside": _inside}
LAYOUTS = {"contiguous": lambda t: (t, t), "expanded": _expanded, **VIEWS}


# ------------------------------------------------------------------------------------------------------------ values


def sprinkle(r: Random, t: Tensor, g: torch.Generator, rows: bool = False) -> Tensor:
    """Replace some elements, or something in some tokens, by a special value."""
    for value in r.choices(SPECIAL, k=r.randint(0, 2)):
        where = torch.rand(t.shape[:2] if rows else t.shape, generator=g) < 0.2
        if rows and value != 0:
            t[..., -1][where] = value
        else:
            t[where] = value
    return t


def random_scores(r: Random, b: int, n: int, g: torch.Generator) -> Tensor:
    """[B, N]: distinct, with many ties, all alike or of many magnitudes; some of them special."""
    s = torch.randn(b, n, generator=g)
    match r.choice(("distinct", "ties", "alike", "magnitudes", "huge", "tiny")):
        case "ties":
            s = (2 * s).round()
        case "alike":
            s = s[:, :1].repeat(1, n)
        case "magnitudes":
            s = s.sign() * (4 * s).exp()
        case "huge":
            s = (s * 1e38).clamp(-3e38, 3e38)
        case "tiny":
            s = s * 1e-40
    return sprinkle(r, s if r.randint(0, 1) else s.abs(), g).to(r.choice(FLOAT_DTYPES))


def random_features(r: Random, b: int, n: int, d: int, g: torch.Generator) -> Tensor:
    """[B, N, D]: unrelated, near or exact copies of a few, or all alike; of any length, with any mean,
    in any dtype, some special."""
    kind = r.choice(("unrelated", "near", "copies", "alike"))
    x = torch.randn(b, n, d, generator=g)
    if kind == "alike":
        x = x[:, :1].repeat(1, n, 1)
    elif kind != "unrelated":
        x = x[:, torch.randint(min(n, 3), (n,), generator=g)] + (0.1 * x if kind == "near" else 0)
    x = x * r.choice((1.0, 1.0, 1e-3, 1e3, 1e30, 1e-30)) + r.choice((0.0, 0.0, 0.0, 3.0, -30.0))
    x = sprinkle(r, x, g, rows=True)
    return x.to(r.choice(FEATURE_DTYPES))


def random_similarity(r: Random, b: int, n: int, g: torch.Generator) -> Tensor:
    """[B, N, N]: any matrix will do. Not symmetric, nothing on the diagonal, not finite; beyond [-1, 1], or of few
    values, often equal to a threshold."""
    if r.randint(0, 1):
        sim = 1 - torch.randn(b, n, n, generator=g).abs()
    else:
        sim = torch.randint(-8, 9, (b, n, n), generator=g) / 8
    sim[torch.rand(b, n, n, generator=g) < 0.05] = r.choice(SPECIAL)
    return sim.to(r.choice(FLOAT_DTYPES))


def random_mask(r: Random, b: int, n: int, g: torch.Generator) -> Tensor | None:
    return torch.rand(b, n, generator=g) < r.choice((0.0, 0.1, 0.5, 0.9)) if r.randint(0, 1) else None


# ------------------------------------------------------------------------------------------------------------- calls


class Call(NamedTuple):
    op: str
    args: tuple  # in the order of the signature, tensors on the CPU
    layout: str  # of LAYOUTS

    def on(self, device: str) -> tuple[list, list[Tensor]]:
        """The arguments there, laid out, and the memory that they lie in."""
        args, buffers = [], []
        for a in self.args:
            if isinstance(a, Tensor):
                flat = a.dim() == 1  # a layout is of rows and columns
                a, buffer = LAYOUTS[self.layout](a.to(device)[:, None] if flat else a.to(device))
                a = a[:, 0] if flat else a
                buffers.append(buffer)
            args.append(a)
        return args, buffers


def random_call(r: Random, op: str, most: int = FEW) -> Call:
    """A valid call of operator `op` on images of up to `most` tokens."""
    n = r.randint(1, min(most, FEW))
    if most > FEW and r.randint(0, 3):
        n = r.choice([e for e in EDGES if e <= most]) if r.randint(0, 1) else r.randint(1, most)
    b = r.randint(0, 3) if n <= 1100 else 1
    d = r.choice((1, 2, 3, 8, 17, 64) if most <= FEW else (1, 3, 17, 64, 100, 130, 588, 1024))
    g = torch.Generator().manual_seed(r.randrange(2**32))
    layout = r.choice(("contiguous", "contiguous", "contiguous", *LAYOUTS))
    return Call(op, tuple(_ARGUMENTS[op](r, b, n, d, g)), layout)


def _count(r: Random, n: int) -> int:
    """Up to n: of many, a usual budget more often than all."""
    return r.randint(1, n) if n <= FEW or r.randint(0, 4) == 0 else r.randint(1, max(1, n // 8))


def _cosine_similarity(r, b, n, d, g):
    return (random_features(r, b, n, d, g),)


def _mean_similarity(r, b, n, d, g):
    return random_features(r, b, n, d, g), random_mask(r, b, n, g)


def _greedy_suppression(r, b, n, d, g):
    scores, similarity = random_scores(r, b, n, g), random_similarity(r, b, n, g)
    gamma = r.choice((0.0, 0.1, 1.0, 20.0, 20.0, 1e3, 1e30, 1e300))
    return scores, similarity, _count(r, n), gamma, random_mask(r, b, n, g)


def _cluster_nms(r, b, n, d, g):
    scores, similarity = random_scores(r, b, n, g), random_similarity(r, b, n, g)
    labels = torch.randint(r.randint(1, n), (b, n), generator=g) + r.choice((0, 0, 2**40))
    threshold = r.choice((-1.0, 0.0, 0.25, 0.5, 0.875, 1.0, math.inf, math.nan))
    if r.randint(0, 1):
        threshold = torch.full((b,), threshold).to(r.choice(FLOAT_DTYPES))
    return scores, labels, similarity, threshold, random_mask(r, b, n, g)


def _psca(r, b, n, d, g):
    return random_features(r, b, n, d, g), _count(r, n), r.choice(("feature", "token"))


def _id_selection(r, b, n, d, g):
    features, importance = random_features(r, b, n, d, g), random_scores(r, b, n, g)
    return features, importance, _count(r, n), r.choice((0.0, 0.1, 1.0, 20.0, 20.0, 1e3)), random_mask(r, b, n, g)


def _prune_sid(r, b, n, d, g):
    features, scores, mask = random_features(r, b, n, d, g), random_scores(r, b, n, g), random_mask(r, b, n, g)
    budget = r.randint(1, 2 * n + 3) if n <= FEW else _count(r, n)
    reserved, center = r.choice((0, 0, 1, budget // 2, budget - 1)) % budget, r.choice(("feature", "token"))
    if r.randint(0, 1):  # groups of its own
        used = r.randint(1, max(1, min(budget // 4, n)))
        return features, scores, budget, reserved, center, torch.randint(used, (b, n), generator=g), mask
    return features, scores if r.randint(0, 1) else None, budget, reserved, center, None, mask


def _dynamic_budget(r, b, n, d, g):
    minimum = r.randint(0, n)
    return random_features(r, b, n, d, g), r.randint(b * minimum, b * n), minimum


_ARGUMENTS: dict[str, Callable] = {
    "cosine_similarity": _cosine_similarity,
    "mean_similarity": _mean_similarity,
    "greedy_suppression": _greedy_suppression,
    "cluster_nms": _cluster_nms,
    "psca": _psca,
    "id_selection": _id_selection,
    "prune_sid": _prune_sid,
    "dynamic_budget": _dynamic_budget,
}
