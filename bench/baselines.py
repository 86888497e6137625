"""What a user would run without lvtp, in plain eager PyTorch, written from the papers' rules.

`id_selection`, `psca` and the similarities are the careful versions: batched, nothing read back from the device.
`published_id_selection` and `published_prune_sid` are the loops as the papers state them, with what such code does in
practice: full matrices, one image and one cluster at a time, `.item()`, a randomised SVD. All are correct for ordinary
input (`tests/test_bench.py`); `bench/bench_ops.py` and `bench/gpu.py` time them beside the operators.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lvtp.demo.loops import id_selection_loop, nms, quotas


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


def published_id_selection(features: Tensor, importance: Tensor, k: int) -> Tensor:
    """ID-Selection (arXiv 2604.05601, the greedy loop of its method section): image by image, the N x N matrix, and
    k steps that each read their pick back with `.item()`. int64 [B, k], pick order."""
    return torch.tensor([id_selection_loop(x, s, k) for x, s in zip(features, importance, strict=True)])


def randomized_svd(a: Tensor, groups: int) -> Tensor:
    """Left singular vectors [B, N, G] as PruneSID's released code takes them: no oversampling, two power iterations,
    and a start from torch's global random state, so that two calls differ."""
    return torch.svd_lowrank(a, q=groups, niter=2)[0]


def exact_vectors(a: Tensor, groups: int) -> Tensor:
    """The same vectors from a full eigendecomposition in float64."""
    a = a.double()
    return torch.linalg.eigh(a @ a.mT)[1][..., -groups:].flip(-1)


def published_prune_sid(
    features: Tensor, importance: Tensor, n: int, vectors: Callable[[Tensor, int], Tensor] = randomized_svd
) -> Tensor:
    """PruneSID (arXiv 2603.09480: principal semantic components, then NMS inside each group): groups by a randomised
    SVD, B x G x N x N masks for the suppression, and a Python loop over the clusters. int64 [B, min(n, N)], ascending.
    """
    tokens, groups = features.shape[1], max(1, min(n // 4, features.shape[1]))
    a = torch.sigmoid(features.float())
    labels = vectors(a - a.mean(-1, keepdim=True), groups).abs().argmax(-1)

    similarity = cosine_similarity(features)
    tau = (similarity.sum((1, 2)) - tokens) / (tokens * (tokens - 1)) * n / 32
    member = F.one_hot(labels, groups).bool().mT  # [B, G, N]
    alike = (similarity > tau[:, None, None])[:, None] & member[..., None] & member[:, :, None]  # [B, G, N, N]

    picks = []
    for b in range(len(features)):
        kept, dropped = [], []
        for g in range(groups):
            cluster = member[b, g].nonzero().flatten()
            cluster = cluster[importance[b, cluster].argsort(descending=True, stable=True)]
            keep = nms(importance[b, cluster] > 0, alike[b, g][cluster][:, cluster])
            kept.append(cluster[keep].tolist())
            dropped.append(cluster[~keep].tolist())
        sizes = [len(m) + len(s) for m, s in zip(kept, dropped, strict=True)]
        quota = quotas([len(m) for m in kept], sizes, n)
        picks.append(sorted(i for m, s, q in zip(kept, dropped, quota, strict=True) for i in (m + s)[:q]))
    return torch.tensor(picks)
