"""The selectors as one would write them from the papers: a full similarity matrix and a Python loop in plain PyTorch.

What `lvtp` is timed against. They follow the same definitions, so a test can compare the picks; they are written for
clarity, one image at a time, with the synchronising `.item()` and `.tolist()` calls such code has in practice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def id_selection_loop(features: Tensor, importance: Tensor, k: int, gamma: float = 20.0) -> list[int]:
    """Picks of one image, in pick order. features [N, D], importance [N]."""
    x = F.normalize(features.float(), dim=-1)
    similarity = x @ x.T  # [N, N]
    scores = importance.float()
    scores = (scores - scores.min()) / (scores.max() - scores.min()).clamp_min(1e-9)
    taken = torch.zeros_like(scores, dtype=torch.bool)
    picks = []
    for _ in range(k):
        pick = scores.masked_fill(taken, float("-inf")).argmax().item()
        picks.append(pick)
        taken[pick] = True
        suppression = torch.exp(-gamma * (1 - similarity[pick]).clamp_min(0) ** 2)
        scores = scores - suppression * scores[pick].clamp_min(0)
    return picks


def prune_sid_loop(features: Tensor, importance: Tensor, n: int) -> list[int]:
    """Picks of one image, ascending. features [N, D], importance [N]."""
    a = features.float().sigmoid()
    a = a - a.mean(-1, keepdim=True)
    vectors = torch.linalg.eigh(a @ a.T).eigenvectors  # ascending eigenvalues
    labels = vectors.flip(-1)[:, : max(1, n // 4)].abs().argmax(-1)

    x = F.normalize(features.float(), dim=-1)
    similarity = x @ x.T  # [N, N]
    total = x.shape[0]
    rho = ((similarity.sum() - total) / (total * (total - 1))).item()
    kept, dropped = [], []
    for g in range(max(1, n // 4)):
        members = (labels == g).nonzero().flatten()
        members = members[importance[members].argsort(descending=True, stable=True)]
        keep = nms(importance[members] > 0, similarity[members][:, members] > rho * n / 32)
        kept.append(members[keep].tolist())
        dropped.append(members[~keep].tolist())
    quota = quotas([len(m) for m in kept], [len(m) + len(s) for m, s in zip(kept, dropped, strict=True)], n)
    return sorted(i for m, s, q in zip(kept, dropped, quota, strict=True) for i in (m + s)[:q])


def nms(keep: Tensor, alike: Tensor) -> Tensor:
    """Of the candidates `keep` [M], best first, those that no better kept one is `alike` [M, M]: bool [M]."""
    for i in range(len(keep)):
        if keep[i]:
            keep[i + 1 :] &= ~alike[i, i + 1 :]
    return keep


def quotas(kept: list[int], sizes: list[int], n: int) -> list[int]:
    """Tokens taken from each group, summing to min(n, N): a share of what each group kept, at least 1, capped."""
    low = [min(1, c) for c in sizes]
    cap = 5 * -(-n // 64)
    up = [min(cap, c, m) for c, m in zip(sizes, kept, strict=True)]
    while sum(up) < min(n, sum(sizes)):
        up = [min(u + 1, c) for u, c in zip(up, sizes, strict=True)]
    portions = torch.tensor(kept, dtype=torch.float32)
    bounds = (portions / portions.sum().clamp_min(1)).cumsum(0) * max(0, n - sum(low))
    shares = bounds.round().diff(prepend=torch.zeros(1)).tolist()
    found = [min(int(s) + lo, u) for s, lo, u in zip(shares, low, up, strict=True)]
    for g in sorted(range(len(kept)), key=lambda g: -kept[g]):
        found[g] += min(up[g] - found[g], max(0, n - sum(found)))
    return found
