"""Whether an operator's answer is right, judged by the float64 oracle: one function for each, of its name.

It takes the answer and the arguments of the call. What no rounding can excuse raises AssertionError; what one can is
returned: the worst shortfall over the images, as a share of the one allowed (at most 1). So two backends whose answers
pass can differ only where keys tie, or a comparison is as close, to within roundings.

Where an answer rests on another operator's (groups, redundancy), that is called too, on the backend in force.
"""

import math

import numpy as np
import oracle
import torch

import lvtp

SIMILARITY = 2e-6  # a cosine, or a mean of them
KEY = 2e-5  # a key of the greedy loop, in units of the largest score, after up to 64 picks
MARGIN = 1e-6  # a comparison with a threshold that is closer may go either way
LOADING = 5e-3
SEATS = 1e-4


def images(mask, *tensors):
    """Image by image: the values in float64, rounded to float32 first as every implementation does, and the mask."""
    masks = [None] * len(tensors[0]) if mask is None else mask.cpu().numpy()
    values = (oracle.as_float64(t.float()) if t.is_floating_point() else t.cpu().numpy() for t in tensors)
    return zip(*values, masks, strict=True)


def _at_most(shortfall, limit, what):
    assert shortfall <= limit, f"{what}: {shortfall:.3g}, where {limit:.3g} is left to rounding"
    return shortfall / limit


def assert_real_and_unique(picks, like, places, mask=None):
    """`places` an image, int64: different real tokens of the [B, N, ...] `like`, then -1 where there are too few."""
    b, n = like.shape[:2]
    assert picks.shape == (b, places), f"shape {tuple(picks.shape)}"
    assert picks.dtype == torch.int64
    assert picks.device == like.device
    for image, row in enumerate(picks.tolist()):
        real = set(range(n) if mask is None else mask[image].nonzero()[:, 0].tolist())
        count = min(places, len(real))
        assert row[count:] == [-1] * (places - count), f"image {image} ends in {row[count:]}"
        assert len(set(row[:count])) == count, f"image {image} has a token twice"
        assert set(row[:count]) <= real, f"image {image} has {sorted(set(row[:count]) - real)}, which are none"


def cosine_similarity(sim, features):
    assert sim.dtype == torch.float32
    assert sim.shape == (*features.shape[:2], features.shape[1])
    worst = max((abs(s - oracle.similarity(x)).max() for s, x, _ in images(None, sim, features)), default=0.0)
    # Sums of many products round more.
    return _at_most(worst, SIMILARITY * max(1.0, math.sqrt(features.shape[2] / 256)), "similarity")


def mean_similarity(rho, features, mask=None):
    assert rho.dtype == torch.float32
    assert rho.shape == features.shape[:1]
    worst = max((abs(r - oracle.mean_similarity(x, m)) for r, x, m in images(mask, rho, features)), default=0.0)
    return _at_most(worst, SIMILARITY, "rho")


# ---------------------------------------------------------------------------------------------------- ID-Selection


def greedy_shortfall(picks, scores, similarity, gamma=20.0, mask=None):
    """How far below the best key of its step a pick was, at worst."""
    rows = images(mask, picks, scores, similarity)
    return max((oracle.replay(p, s, sim, gamma, m) for p, s, sim, m in rows), default=0.0)


def selection_shortfall(picks, features, importance, gamma=20.0, mask=None):
    """The same against similarity and scores from the features and the importance as given."""
    rows = images(mask, picks, features, importance)
    replays = (oracle.replay(p, oracle.scale_importance(s, m), oracle.similarity(x), gamma, m) for p, x, s, m in rows)
    return max(replays, default=0.0)


def greedy_suppression(picks, scores, similarity, k, gamma=20.0, mask=None):
    assert_real_and_unique(picks, scores, k, mask)
    return _at_most(greedy_shortfall(picks, scores, similarity, gamma, mask), KEY * max(1, k / 64), "a pick")


def id_selection(picks, features, importance, k, gamma=20.0, mask=None):
    assert_real_and_unique(picks, features, k, mask)
    # A rounding of the similarity, 1e-7 or so, weighs more the steeper exp(-gamma d^2) is.
    limit = KEY * max(1, k / 64) * (1 + math.sqrt(gamma) / 10)
    return _at_most(selection_shortfall(picks, features, importance, gamma, mask), limit, "a pick")


# -------------------------------------------------------------------------------------------------------- PruneSID


def cluster_nms(kept, scores, labels, similarity, threshold, mask=None):
    """Exact: the similarities are given, and both sides compare them in float32."""
    assert kept.dtype == torch.bool
    assert kept.shape == scores.shape
    tau = threshold
    if not isinstance(threshold, torch.Tensor):
        tau = torch.full((len(scores),), threshold, dtype=torch.float64)
    rows = images(mask, kept, tau, scores, labels, similarity)
    for image, (got, t, s, group, sim, m) in enumerate(rows):
        wrong = np.flatnonzero(got != oracle.nms(s, group, sim, float(t), m)[0])
        assert len(wrong) == 0, f"tokens {wrong[:5].tolist()} of image {image} are kept, or not, against the rule"
    return 0.0


def psca(result, features, groups, center="feature"):
    """Eigenvectors are defined only up to a rotation among those whose eigenvalues hardly differ: of such a set only
    the length of its part of a token is. A loading is at most that; and it is the largest of all, so at least the
    share that one of them must have in every set among the first `groups`."""
    labels, loadings = result
    assert labels.shape == loadings.shape == features.shape[:2]
    assert (labels.dtype, loadings.dtype) == (torch.int64, torch.float32)
    assert ((labels >= 0) & (labels < groups)).all()
    worst = 0.0
    for label, loading, x, _ in images(None, labels, loadings, features):
        a, values, vectors = oracle.components(x, center)
        scale = oracle.sigmoid(x[np.isfinite(x).all(1)]).max(initial=0.0)
        used = a.any(1)
        assert not label[~used].any(), "a token without direction has a group"
        assert not loading[~used].any(), "a token without direction has a loading"
        if not used.any():
            continue
        # Sigmoids rounded to float32 move A by about this, relative to its length, and vectors by that over the gap.
        rounding = 2.0**-25 * scale * sum(np.sqrt(a.shape)) / np.sqrt(values[0])
        gap = max(1e-4, 4 * rounding / LOADING)
        ends = np.flatnonzero(values[:-1] - values[1:] > gap * values[0]) + 1
        sets = np.split(np.arange(len(values)), ends)
        lengths = np.stack([np.sqrt((vectors[:, s] ** 2).sum(1)) for s in sets], 1)  # [N, sets]
        own = np.searchsorted(ends, label, side="right")
        above = loading - lengths[np.arange(len(x)), own]
        worst = max(worst, above[used].max())
        whole = [c for c, s in enumerate(sets) if s[-1] < groups]
        if whole:
            least = (lengths[:, whole] / np.sqrt([len(sets[c]) for c in whole])).max(1)
            worst = max(worst, (least - loading)[used].max())
    return _at_most(worst, LOADING, "a loading")


def prune_sid(picks, features, importance, n, reserved=0, center="feature", labels=None, mask=None):
    tokens = features.shape[1]
    assert_real_and_unique(picks, features, min(n - reserved, tokens), mask)
    for row in picks.tolist():
        found = [i for i in row if i >= 0]
        assert found == sorted(found), "not in ascending order"
    scores = importance
    if labels is None:
        if mask is not None:  # the groups of fewer tokens cannot be asked for; but what padding holds must not matter
            blank = torch.where(mask[..., None], features, torch.nan)
            again = lvtp.prune_sid(blank, importance, n, reserved, center, None, mask)
            assert torch.equal(picks, again), "what padding holds matters"
            return 0.0
        labels, loadings = lvtp.psca(features, max(1, min(n // 4, tokens)), center)
        scores = loadings if importance is None else importance
    worst = 0.0
    for row, (x, s, group, m) in zip(picks.tolist(), images(mask, features, scores, labels), strict=True):
        wanted, margin = oracle.prune_sid(x, s, group, n, reserved, m)
        if row != wanted:
            assert margin < MARGIN, f"{sorted(set(row) ^ set(wanted))} differ; the closest comparison: {margin:.1e}"
            worst = 1.0
    return worst


def dynamic_budget(budget, features, total, minimum=1):
    """Exactly `total` in all, between minimum and N each, and each image's exact share rounded down or up: up where the
    remainders are largest."""
    tokens = features.shape[1]
    assert budget.dtype == torch.int64
    assert budget.shape == features.shape[:1]
    if len(features) == 0:
        return 0.0
    seats = budget.cpu().numpy()
    assert seats.sum() == total, f"{seats.sum()} in all"
    assert (seats >= minimum).all(), "below the minimum"
    assert (seats <= tokens).all(), "more than there are"
    # The rounding of rho to fp32 must not be amplified into a difference of seats: shares follow the op's own rho.
    phi = (1 - oracle.as_float64(lvtp.mean_similarity(features))).clip(min=0)
    shares = oracle.budget_shares(phi, total, minimum, tokens)
    worst = max(0.0, (abs(seats - shares) - 1).max())
    up, down = seats > shares + SEATS, seats < shares - SEATS
    if up.any() and down.any():
        worst = max(worst, (shares % 1)[down].max() - (shares % 1)[up].min())
    return _at_most(worst, SEATS, "a share")
