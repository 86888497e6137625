"""The shapes that selection meets in real models, once, for every benchmark, and features of those shapes."""

from typing import NamedTuple

import torch
from torch import Tensor

import lvtp


class Shape(NamedTuple):
    """B images of N visual tokens with D features, of which the usual budget keeps k."""

    model: str
    images: int
    tokens: int
    features: int
    keep: int

    @classmethod
    def of(cls, result: dict) -> "Shape":
        """That of a result which holds its fields."""
        return cls(*(result[field] for field in cls._fields))

    @property
    def size(self) -> str:
        return f"{self.images} x {self.tokens} x {self.features}, k = {self.keep}"

    def __str__(self) -> str:
        return f"{self.model} {self.images}x{self.tokens}x{self.features} k={self.keep}"


OPERATORS = (
    "cosine_similarity", "mean_similarity", "greedy_suppression", "cluster_nms", "psca", "id_selection", "prune_sid",
    "dynamic_budget",
)  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16")
SELECTORS = ("id_selection", "prune_sid")
WITHOUT_BUDGET = ("cosine_similarity", "mean_similarity", "dynamic_budget")  # k changes nothing
SHAPES = (
    Shape("LLaVA-1.5", 1, 576, 1024, 16),
    Shape("LLaVA-1.5", 1, 576, 1024, 64),
    Shape("LLaVA-1.5", 1, 576, 1024, 192),
    Shape("LLaVA-1.5, batch", 4, 576, 1024, 64),
    Shape("LLaVA-1.5, batch", 8, 576, 1024, 64),
    Shape("LLaVA-NeXT, by crop", 5, 576, 1024, 32),
    Shape("LLaVA-NeXT, by image", 1, 2880, 4096, 160),
    Shape("OneVision", 1, 729, 1152, 128),
    Shape("Qwen2.5-VL, 1k", 1, 1024, 1280, 128),
    Shape("Qwen2.5-VL, 4k", 1, 4096, 3584, 512),
    Shape("Qwen2.5-VL, 16k", 1, 16384, 3584, 1024),
    Shape("video", 32, 196, 3584, 16),
)

# Beside the registered ones, what the plots' axes go along.
SWEEPS = (
    *(Shape("by N", 1, tokens, 1024, 64) for tokens in (1152, 2304, 4608, 9216)),
    *(Shape("by k", 1, 576, 1024, keep) for keep in (32, 128, 288)),
    *(Shape("by batch", images, 576, 1024, 64) for images in (2, 16, 32)),
)


def fp32_only(name: str) -> bool:
    """Whether `name` takes a similarity matrix, which has one dtype."""
    return name in ("greedy_suppression", "cluster_nms")


def work(name: str, shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes and FLOPs of the rule: inputs read once (of a similarity matrix, the rows or entries that decide), the
    result written, and the products. Those are half of a Gram matrix where that is the result; k of its rows for
    id_selection, of which a lazy implementation skips some; one product with each component's vector for the groups.
    """
    b, n, d, k = shape[1:]
    features, groups = b * n * d * dtype.itemsize, max(1, k // 4)
    return {
        "cosine_similarity": (features + b * n * n * 4, b * n * (n + 1) * d),
        "mean_similarity": (features + b * 4, 4 * b * n * d),
        "dynamic_budget": (features + b * 8, 4 * b * n * d),
        "greedy_suppression": (b * (n * 4 + k * n * 4 + k * 8), 4 * b * k * n),
        "cluster_nms": (b * n * (4 + 8 + 4 + 1), b * n),
        "id_selection": (features + b * (n * 4 + k * 8), 2 * b * k * n * d),
        "psca": (features + b * n * 12, 2 * b * n * d * groups),
        "prune_sid": (features + b * (n * 4 + k * 8), 2 * b * n * d * groups),
    }[name]


def inputs(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Features [B, N, D] in 40 clusters, the noise in each half as strong as the distance between them, and uniform
    importance fp32 [B, N]; the same in every run.
    """
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(40, shape.features, generator=g)
    member = torch.randint(0, 40, (shape.images, shape.tokens), generator=g)
    noise = torch.randn(shape.images, shape.tokens, shape.features, generator=g)
    importance = torch.rand(shape.images, shape.tokens, generator=g)
    return (centres[member] + 0.5 * noise).to(device, dtype), importance.to(device)


def arguments(name: str, shape: Shape, dtype: torch.dtype, device: str) -> tuple:
    """Those of operator `name`."""
    features, importance = inputs(shape, dtype, device)
    groups = max(1, shape.keep // 4)
    if name == "greedy_suppression":
        return importance, lvtp.cosine_similarity(features), shape.keep
    if name == "cluster_nms":
        labels = torch.arange(shape.tokens, device=device).expand(shape.images, -1) % groups
        return importance, labels, lvtp.cosine_similarity(features), 0.5
    return {
        "id_selection": (features, importance, shape.keep),
        "psca": (features, groups),
        "prune_sid": (features, importance, shape.keep),
        "dynamic_budget": (features, shape.images * shape.keep),
    }.get(name, (features,))
