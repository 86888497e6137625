"""The operators as a user of PyTorch would write them: the whole similarity matrix, then a loop in Python.

Plain and eager, batched over images where the published code is, correct for ordinary input, and in the same order of
operations as the definitions; `bench/bench_ops.py` times them beside the operators and checks that they agree.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_similarity(features: Tensor) -> Tensor:
    x = F.normalize(features.float(), dim=-1)
    return x @ x.mT


def mean_similarity(features: Tensor) -> Tensor:
    n = features.shape[1]
    return (cosine_similarity(features).sum((1, 2)) - n) / (n * (n - 1))


def id_selection(features: Tensor, importance: Tensor, k: int, gamma: float = 20.0) -> Tensor:
    similarity = cosine_similarity(features)
    low, high = importance.amin(1, keepdim=True), importance.amax(1, keepdim=True)
    scores = (importance - low) / (high - low)
    image = torch.arange(len(scores), device=scores.device)
    taken = torch.zeros_like(scores, dtype=torch.bool)
    picks = []
    for _ in range(k):
        pick = scores.masked_fill(taken, -torch.inf).argmax(1)
        taken[image, pick] = True
        cost = torch.exp(-gamma * (1 - similarity[image, pick]).clamp_min(0) ** 2)
        scores = scores - cost * scores[image, pick].clamp_min(0)[:, None]
        picks.append(pick)
    return torch.stack(picks, 1)


def psca(features: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    a = torch.sigmoid(features.float())
    a = a - a.mean(-1, keepdim=True)
    _, vectors = torch.linalg.eigh(a @ a.mT)
    loadings, labels = vectors[..., -groups:].flip(-1).abs().max(-1)
    return labels, loadings
