"""The definitions once more, in float64 and plain loops, sharing no line of code with lvtp.

Everything here works on one image, on numpy arrays. What a rounding can decide is not compared for equality: picks are
*replayed* (each must be within rounding of the best key at its step), and functions that compare with a threshold also
return their `margin`, the distance of the closest comparison, so that a test can tell a mistake from a rounding.
"""

import math

import numpy as np


def as_float64(tensor):
    """The values of a torch tensor of any dtype, exactly."""
    return tensor.detach().cpu().double().numpy()


def similarity(x):
    """Cosine similarity of x [N, D]; 0 wherever a token has a non-finite feature or only zeros."""
    unit = np.zeros_like(x)
    for i, token in enumerate(x):
        if np.isfinite(token).all():
            unit[i] = token / max(math.sqrt(float(np.dot(token, token))), 1e-12)
    return unit @ unit.T


def mean_similarity(x, mask=None):
    """The average over ordered pairs of different real tokens, taken literally."""
    real = np.arange(len(x)) if mask is None else np.flatnonzero(mask)
    if len(real) < 2:
        return 0.0
    sim = similarity(x)[np.ix_(real, real)]
    return (sim.sum() - np.trace(sim)) / (len(real) * (len(real) - 1))


# ---------------------------------------------------------------------------------------------------- ID-Selection


def scale_importance(importance, mask=None):
    """ID-Selection step 1; importance [N] as given, rounded to fp32 first as every implementation does."""
    with np.errstate(over="ignore"):
        s = importance.astype(np.float32).astype(np.float64)
    real = np.ones(len(s), bool) if mask is None else mask
    finite = s[np.isfinite(s) & real]
    scaled = s.copy()
    if len(finite) > 0 and 1e-9 < finite.max() - finite.min() <= np.finfo(np.float32).max:
        scaled = (s - finite.min()) / (finite.max() - finite.min())
    scaled[s == np.inf] = 2.0
    scaled[s == -np.inf] = 0.0
    return scaled


def replay(picks, scores, sim, gamma, mask=None):
    """Follow the `picks` [k] of greedy suppression and return the worst shortfall: how far, at any step, the pick's
    key was below the best one, in units of the largest score (at least 1). Picks that break the contract (repeated, out
    of range, padding, -1 too early or missing) raise AssertionError.
    """
    n = len(scores)
    left = set(range(n) if mask is None else np.flatnonzero(mask).tolist())
    # A NaN score is -2^126, from which no subtraction of ordinary size takes anything away in fp32.
    is_nan = np.isnan(scores)
    s = np.where(is_nan, -(2.0**126), np.clip(scores, -(2.0**100), 2.0**100))
    unit = max(1.0, np.abs(s[~is_nan]).max(initial=0.0))
    sim = np.nan_to_num(sim, nan=0.0, posinf=1.0, neginf=-1.0)
    worst = 0.0
    for i in picks:
        i = int(i)
        if not left:
            assert i == -1, f"{i} picked where no token is left"
            continue
        assert i in left, f"{i} is not among the {len(left)} tokens left"
        worst = max(worst, max(s[j] for j in left) - s[i])
        left.remove(i)
        for j in left:
            if not is_nan[j]:
                distance = max(0.0, 1.0 - float(sim[i, j]))
                s[j] -= math.exp(-min(gamma * distance * distance, 700.0)) * max(s[i], 0.0)
    return worst / unit


# -------------------------------------------------------------------------------------------------------- PruneSID


def sigmoid(x):
    """Rounded to float32. Below exp(-87), where float32 loses its normal numbers, it counts as that."""
    return (1.0 / (1.0 + np.exp(-np.maximum(x, -87.0)))).astype(np.float32)


def components(x, center):
    """The centred sigmoid A of x [N, D], and the eigenvalues and eigenvectors (columns) of A A^T, largest first."""
    a = np.zeros_like(x)
    valid = np.isfinite(x).all(1)
    if valid.any():
        a[valid] = sigmoid(x[valid])
        mean = a[valid].mean(1 if center == "feature" else 0, keepdims=True)
        a[valid] = (a[valid] - mean.astype(np.float32)).astype(np.float32)
    values, vectors = np.linalg.eigh(a @ a.T)
    return a, values[::-1], vectors[:, ::-1]


def psca(x, groups, center):
    """Labels and |loadings| of x [N, D] by a float64 eigendecomposition."""
    a, _, vectors = components(x, center)
    v = np.abs(vectors[:, :groups])
    labels, loadings = np.zeros(len(x), int), np.zeros(len(x))
    for i in np.flatnonzero(a.any(1)):
        labels[i] = int(np.argmax(v[i]))
        loadings[i] = v[i, labels[i]]
    return labels, loadings


def by_score(scores):
    """Indices by descending score, ties by lowest index; NaN last."""
    return sorted(
        range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i] if scores[i] == scores[i] else 0)
    )


def nms(scores, labels, sim, tau, mask=None):
    """kept [N] bool, and the margin of the closest similarity that was compared with tau."""
    kept, margin = [], math.inf
    for j in by_score(scores):
        if not scores[j] > 0 or (mask is not None and not mask[j]):
            continue
        rivals = [float(sim[i, j]) for i in kept if labels[i] == labels[j]]
        # Tokens without direction compare 0 with 0, which is exact.
        margin = min([margin] + [abs(r - tau) for r in rivals if not math.isnan(r) and (r, tau) != (0, 0)])
        if not any(r > tau for r in rivals):
            kept.append(j)
    return np.isin(np.arange(len(scores)), kept), margin


def quotas(sizes, survivors, n, reserved):
    """PruneSID step 5, sentence by sentence. fp32 where the definition says so."""
    groups = range(len(sizes))
    low = [min(1, c) for c in sizes]
    up = [min(5 * math.ceil(n / 64), c, m) for c, m in zip(sizes, survivors, strict=True)]
    while sum(up) < n:
        grown = [min(u + 1, c) for u, c in zip(up, sizes, strict=True)]
        if grown == up:
            break
        up = grown

    rest = max(0, n - sum(low) - reserved)
    share, running = [], 0.0
    for m in survivors:
        if sum(survivors) > 0:
            running += float(np.float32(m) / np.float32(sum(survivors)))
        share.append(int(np.rint(np.float32(running) * np.float32(rest))))
    quota = [min(low[g] + share[g] - (share[g - 1] if g > 0 else 0), up[g]) for g in groups]

    target = min(n - reserved, sum(sizes))
    filling = sorted(groups, key=lambda g: (-survivors[g], g))
    for g in filling:
        quota[g] += max(0, min(target - sum(quota), up[g] - quota[g]))
    for g in reversed(filling):
        quota[g] -= max(0, min(sum(quota) - target, quota[g]))
    return quota


def prune_sid(x, scores, labels, n, reserved=0, mask=None):
    """Steps 3 to 7 for given scores and labels: the picks, -1 at the end, and the margin of the suppression."""
    tokens = range(len(x))
    real = [i for i in tokens if mask is None or mask[i]]
    groups = max(1, min(n // 4, len(x)))
    tau = mean_similarity(x, mask) * n / 32
    margin = abs(tau - 1.0)  # from 1 up nothing is suppressed
    kept, closest = nms(scores, labels, similarity(x), tau if tau < 1 else math.inf, mask)
    if tau < 1:
        margin = min(margin, closest)

    members = [[i for i in real if labels[i] == g] for g in range(groups)]
    quota = quotas([len(m) for m in members], [int(sum(kept[m])) for m in members], n, reserved)
    rank = {token: position for position, token in enumerate(by_score(scores))}
    picks = []
    for g in range(groups):
        picks += sorted(members[g], key=lambda i: (not kept[i], rank[i]))[: quota[g]]
    places = min(n - reserved, len(x))
    return sorted(picks) + [-1] * (places - len(picks)), margin


def budget_shares(phi, total, minimum, most):
    """clamp(lambda * phi, minimum, most) adding up to `total`; images without phi get what the others cannot take."""
    phi = np.asarray(phi, np.float64)
    if (phi == 0).all():
        phi = np.ones_like(phi)
    zero = phi == 0
    if total > minimum * zero.sum() + most * (~zero).sum():
        shares = np.full(len(phi), float(most))
        shares[zero] = (total - most * (~zero).sum()) / zero.sum()
        return shares
    # The sum is linear in lambda between the values at which an image reaches a bound.
    bounds = sorted({bound / p for p in phi[~zero] for bound in (minimum, most)})
    sums = [np.clip(b * phi, minimum, most).sum() for b in bounds]
    at = max(i for i in range(len(bounds)) if sums[i] <= total + 1e-9)
    if at == len(bounds) - 1 or sums[at + 1] == sums[at]:
        return np.clip(bounds[at] * phi, minimum, most)
    part = (total - sums[at]) / (sums[at + 1] - sums[at])
    return np.clip((bounds[at] + part * (bounds[at + 1] - bounds[at])) * phi, minimum, most)
