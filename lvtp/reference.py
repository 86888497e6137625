"""Both selectors in plain PyTorch: the definition, in code, that every kernel of lvtp is tested against.

Read from the top, the file teaches two papers: ID-Selection (arXiv 2604.05601) takes the most important token, lowers
the scores of the tokens that look like it, and repeats; PruneSID (arXiv 2603.09480) groups the tokens by principal
component, drops near-duplicates inside each group, and gives every group its share of the budget.

Everything is batched, runs on any device, is deterministic and never waits for a GPU: no value is read back, except
that CPU labels are range-checked. Shapes: B images, N tokens, D features, G groups. Ties always go to the lowest index,
which `torch.max` and stable sorts guarantee. B = 0 gives an empty result. A bad argument raises `RuntimeError`, by the
function of the same name in `lvtp.checks`, which states what each one takes; a count that is no integer, `TypeError`.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from lvtp import checks

__all__ = [
    "cluster_nms", "cosine_similarity", "dynamic_budget", "greedy_suppression", "id_selection", "mean_similarity",
    "prune_sid", "psca",
]  # fmt: skip

NORM_FLOOR = 1e-12  # below this norm a token has no direction
RANK_FLOOR = 1e-7  # a column of A U this much shorter than the first is what rounding leaves of a zero
SPREAD_FLOOR = 1e-9  # importance that varies less than this is not scaled
SCORE_LIMIT = 2.0**100  # greedy scores are clamped to it: N subtractions of at most this much stay far from -Inf,
NAN_SCORE = -(2.0**126)  # and from this, the score of a NaN token, which is therefore picked after every other one
FLOAT_MAX = torch.finfo(torch.float32).max
SIGMOID_FLOOR = -87.0  # a feature below counts as this: its sigmoid is no normal fp32 number any more


# ---------------------------------------------------------------------------------------------------- similarity


def _directions(features: Tensor) -> Tensor:
    """x^ = x / max(||x||, 1e-12) as fp32 [B, N, D]; a token with NaN or Inf anywhere becomes all zeros."""
    x = features.float()
    # A token without a direction has no gradient either; the norm of zeros, which has no second one, is not taken.
    has_direction = x.isfinite().all(-1, keepdim=True) & (x != 0).any(-1, keepdim=True)
    x = torch.where(has_direction, x, 1.0)
    # Squares of features as large as 1e30 overflow fp32, so the norm is accumulated in float64.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64).float()
    return torch.where(has_direction, x / norm.clamp_min(NORM_FLOOR), 0.0)


def without_autocast(t: Tensor) -> contextlib.AbstractContextManager:
    """Autocast would round the operands of a product to half precision. The meta device, for one, has none."""
    device = t.device.type
    return (
        torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()
    )


def cosine_similarity(features: Tensor) -> Tensor:
    """Cosine similarity of every pair of tokens: features [B, N, D] fp32, fp16 or bf16 -> fp32 [B, N, N].

    Accumulated in fp32 whatever the input type. A token with a non-finite feature, or with only zeros, has similarity
    0 to every token, itself included. Differentiable.
    """
    checks.cosine_similarity(features)
    x = _directions(features)
    with without_autocast(x):  # TF32 stays what torch's own switch says: off by default
        return x @ x.mT


def mean_similarity(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cosine similarity rho over the pairs of different tokens: features [B, N, D] -> fp32 [B].

    sum_ij x^_i . x^_j = ||sum_i x^_i||^2, so no N x N matrix is needed; what a token contributes with itself,
    ||x^_i||^2, is 1, or 0 for the tokens without a direction. `mask` bool [B, N] (False = padding) leaves tokens out.
    0 where fewer than two tokens are left. Differentiable.
    """
    checks.mean_similarity(features, mask)
    x = _directions(features)
    real = _real(mask, x[..., 0])
    x = torch.where(real[..., None], x, 0.0)
    together = x.sum(1, dtype=torch.float64).square().sum(-1)
    alone = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).square().sum(-1)
    pairs = real.sum(1) * (real.sum(1) - 1)
    return torch.where(pairs > 0, (together - alone) / pairs.clamp_min(1), 0.0).float()


def _real(mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask, or all True where there is none: bool [B, N]."""
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask


# -------------------------------------------------------------------------------------------------- ID-Selection


@torch.no_grad()
def greedy_suppression(
    scores: Tensor, similarity: Tensor, k: int, gamma: float = 20.0, mask: Tensor | None = None
) -> Tensor:
    """ID-Selection step 2. k times: emit i = argmax S over the tokens not taken; then, for every token j not taken,

        S_j -= exp(-gamma * max(0, 1 - sim_ij)^2) * max(S_i, 0)

    scores [B, N] and similarity [B, N, N] of any floating dtype, computed in fp32 -> int64 [B, k] in pick order.

    max(S_i, 0) means that S never rises: picks are unique, tokens whose scores are exhausted still have an order
    (least suppressed first), and the first j of k picks are the picks for j. Scores are used as they are, clamped to
    +-2^100; a NaN one is picked after every other. In the similarity NaN counts as 0, +Inf as 1 and -Inf as -1.
    `mask` bool [B, N] (False = padding): an image with fewer than k real tokens gets -1 after its last pick.
    """
    k = checks.count("greedy_suppression", "k", k)
    gamma = checks.number("greedy_suppression", "gamma", gamma)
    checks.greedy_suppression(scores, similarity, k, gamma, mask)
    s = scores.float().clamp(-SCORE_LIMIT, SCORE_LIMIT).nan_to_num(nan=NAN_SCORE)
    s = torch.where(_real(mask, s), s, -torch.inf)  # -Inf marks padding and taken tokens; nothing else reaches it
    image = torch.arange(s.shape[0], device=s.device)
    gamma = min(gamma, FLOAT_MAX)  # a gamma that fp32 turns into Inf would make NaN where the distance is 0

    picks = []
    for _ in range(k):
        best, i = s.max(1)  # [B], [B]
        picks.append(torch.where(best > -torch.inf, i, -1))
        row = similarity[image, i].float().nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0)  # [B, N]
        distance = (1 - row).clamp(0.0, 2.0**60)  # the upper bound only keeps the square finite
        s = s - torch.exp(-gamma * distance.square()) * best.clamp_min(0.0)[:, None]
        s = s.scatter(1, i[:, None], -torch.inf)
    return torch.stack(picks, 1)


@torch.no_grad()
def id_selection(
    features: Tensor, importance: Tensor, k: int, gamma: float = 20.0, mask: Tensor | None = None
) -> Tensor:
    """ID-Selection: the k tokens that are important and unlike those already picked, int64 [B, k] in pick order.

    Step 1 scales the importance (any floating dtype [B, N], for example the attention of the CLS token) to [0, 1] in
    each image, step 2 is `greedy_suppression` on the cosine similarity of features [B, N, D]. `mask` bool [B, N]
    (False = padding): an image with fewer than k real tokens gets -1 after its last pick.
    """
    k = checks.count("id_selection", "k", k)
    gamma = checks.number("id_selection", "gamma", gamma)
    checks.id_selection(features, importance, k, gamma, mask)
    return greedy_suppression(_scaled(importance, mask), cosine_similarity(features), k, gamma, mask)


def _scaled(importance: Tensor, mask: Tensor | None) -> Tensor:
    """ID-Selection step 1: min-max scaling to [0, 1] over the finite values of real tokens, fp32 [B, N].

    Values are left as they are where max - min <= 1e-9, where no value is finite and where the difference overflows.
    In every case +Inf becomes 2, -Inf 0, and NaN stays, for `greedy_suppression` to put last.
    """
    s = importance.float()
    counts = s.isfinite() & _real(mask, s)
    low = torch.where(counts, s, torch.inf).amin(1, keepdim=True)
    spread = torch.where(counts, s, -torch.inf).amax(1, keepdim=True) - low
    scale = (spread > SPREAD_FLOOR) & (spread < torch.inf)
    scaled = torch.where(scale, (s - low) / spread, s)
    return torch.where(s == torch.inf, 2.0, torch.where(s == -torch.inf, 0.0, scaled))


# ------------------------------------------------------------------------------------------------------ PruneSID


def psca(features: Tensor, groups: int, center: str = "feature") -> tuple[Tensor, Tensor]:
    """PruneSID step 1, principal semantic component analysis: a group for each token.

    features [B, N, D] -> labels int64 [B, N] in [0, groups), and loadings fp32 [B, N]: with V [N, G] the eigenvectors
    of A A^T for the `groups` largest eigenvalues, A the centred sigmoid of the features, token i belongs to group
    argmax_g |V_ig| (ties: lowest g) and its loading is that |V_ig|: absolute, as an eigenvector's sign is arbitrary.

    `center="feature"` subtracts each token's mean over D (the released code), "token" each feature's mean over the
    tokens (the paper). A token with a non-finite feature has no part in either: group 0, loading 0. Neither has one
    that is all zero once centred. Beyond the rank of A no vector is better than another: with more tokens than
    features, and than groups, the groups beyond it stay empty; else their vectors are any that complete a basis.
    """
    groups = checks.count("psca", "groups", groups)
    checks.psca(features, groups, center)
    return _psca(features, groups, center, None)


def _psca(features: Tensor, groups: int, center: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`psca` where padding, too, is left out: its rows of A are zero and it does not count in the means."""
    a, usable = centred_sigmoid(features, center, mask)
    # Where tokens outnumber features, A^T A is the smaller matrix: with U its eigenvectors, V = A U up to length.
    tall = a.shape[1] > max(a.shape[2], groups)
    gram = a.mT @ a if tall else a @ a.mT
    # LAPACK may not converge where few tokens differ: rounding leaves entries near zero that it compares with each
    # other. Adding the mean eigenvalue to all of them changes no eigenvector and gives it something to compare with.
    gram.diagonal(dim1=-2, dim2=-1).add_(gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True))
    _, vectors = torch.linalg.eigh(gram)  # ascending, so the last columns are the principal ones
    vectors = vectors[..., -groups:].flip(-1)
    if tall:
        vectors = a @ vectors
        length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        real = length > RANK_FLOOR * length[..., :1]
        vectors = torch.where(real, vectors / torch.where(real, length, 1.0), 0.0)
    loadings, labels = vectors.abs().max(-1)
    return torch.where(usable, labels, 0), torch.where(usable, loadings, 0.0).float()


def centred_sigmoid(features: Tensor, center: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The A of `psca`, fp32 values as float64 [B, N, D], and which of its rows are not zero, bool [B, N]."""
    x = features.float()
    valid = x.isfinite().all(-1) & _real(mask, x[..., 0])
    v = valid[..., None]
    # By way of float64: torch's fp32 sigmoid rounds the last elements of a tensor, beyond a full vector, differently.
    a = torch.where(v, torch.where(v, x, 0.0).clamp_min(SIGMOID_FLOOR).double().sigmoid().float(), 0.0)
    if center == "feature":
        mean = a.mean(-1, keepdim=True, dtype=torch.float64)
    else:
        mean = a.sum(1, keepdim=True, dtype=torch.float64) / v.sum(1, keepdim=True).clamp_min(1)
    # Rounded to fp32, the mean of equal values is that value: a constant token's row is zero, not a row of roundings.
    a = torch.where(v, a - mean.float(), 0.0).double()
    return a, (a != 0).any(-1)


@torch.no_grad()
def cluster_nms(
    scores: Tensor, labels: Tensor, similarity: Tensor, threshold: float | Tensor, mask: Tensor | None = None
) -> Tensor:
    """PruneSID step 4, non-maximum suppression inside groups: which tokens are kept, bool [B, N].

    In the order of falling scores a token is kept unless an already kept token i of its group has
    similarity[i, j] > threshold. Never kept: padding, and tokens whose score is NaN or <= 0. scores [B, N] and
    similarity [B, N, N] of any floating dtype, compared in fp32; threshold a number or a tensor [B]; labels int64
    [B, N]: any number from 0 up is a group (below 0: RuntimeError on the CPU, a group like any other elsewhere).
    A NaN similarity suppresses nothing.

    Groups never interact, so one pass over the sorted tokens serves all of them.
    """
    checks.cluster_nms(scores, labels, similarity, threshold, mask)
    _check_labels("cluster_nms", labels, mask)
    s = scores.float()
    if not isinstance(threshold, Tensor):
        threshold = torch.full_like(s[:, 0], checks.number("cluster_nms", "threshold", threshold), dtype=torch.float64)
    tau = threshold.float()[:, None]
    image = torch.arange(s.shape[0], device=s.device)
    kept = (s > 0) & _real(mask, s)  # loses every token that a better one suppresses; final once its turn is over
    waiting = torch.ones_like(kept)  # suppression looks forward only, whatever sim > tau says of earlier tokens
    for i in _by_score(s).unbind(1):  # [B]: each image's next token
        waiting = waiting.scatter(1, i[:, None], False)
        twin = (labels == labels[image, i][:, None]) & (similarity[image, i].float() > tau)
        kept = kept & ~(kept[image, i][:, None] & waiting & twin)
    return kept


def _by_score(scores: Tensor) -> Tensor:
    """Token indices by descending fp32 score, ties by lowest index; -Inf after every finite score, NaN last."""
    key = torch.where(scores.isnan(), -torch.inf, scores.clamp_min(-FLOAT_MAX))
    return key.argsort(dim=1, descending=True, stable=True)


def _check_labels(op: str, labels: Tensor, mask: Tensor | None, groups: int | None = None) -> None:
    """The one check that reads values: on the CPU only, where there are any, and not those of padding."""
    if labels.device.type == "cpu" and type(labels) is Tensor and not is_functorch_wrapped_tensor(labels):
        seen = labels[_real(mask, labels)]
        wrong = seen[(seen < 0) | (seen >= groups)] if groups else seen[seen < 0]
        if wrong.numel() > 0:
            raise RuntimeError(f"{op}: labels must be in [0, {groups or 'G'}), got {int(wrong[0])}")


@torch.no_grad()
def prune_sid(
    features: Tensor,
    importance: Tensor | None,
    n: int,
    reserved: int = 0,
    center: str = "feature",
    labels: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """PruneSID: n - reserved tokens that cover the image, int64 [B, min(n - reserved, N)], ascending.

    features [B, N, D]; importance [B, N] of any floating dtype, or None to score tokens by their loading; `reserved`
    of the n tokens are not patches (CLS). `labels` int64 [B, N] in [0, max(1, min(n // 4, N))) gives the groups
    instead of `psca`; off the CPU labels beyond that range count as the nearest group. `mask` bool [B, N] (False =
    padding): an image with fewer than n - reserved real tokens ends in -1.
    """
    n = checks.count("prune_sid", "n", n)
    reserved = checks.count("prune_sid", "reserved", reserved)
    checks.prune_sid(features, importance, n, reserved, center, labels, mask)
    tokens = features.shape[1]
    groups = max(1, min(n // 4, tokens))
    real = _real(mask, features[..., 0])

    # Steps 1 and 2: groups and scores. Padding gets a group of its own, the last, which has no quota.
    loadings = None
    if labels is None:
        labels, loadings = _psca(features, groups, center, mask)
    else:
        _check_labels("prune_sid", labels, mask, groups)
    scores = importance.float() if importance is not None else loadings
    labels = torch.where(real, labels.clamp(0, groups - 1), groups)

    # Steps 3 and 4: the threshold follows the image's redundancy. From 1 up it suppresses nothing, even where rounding
    # makes a similarity slightly larger than 1.
    tau = mean_similarity(features, mask) * n / 32
    tau = torch.where(tau < 1, tau, torch.inf)
    kept = cluster_nms(scores, labels, cosine_similarity(features), tau, mask)

    # Step 5: how many tokens each group gives.
    member = labels[..., None] == torch.arange(groups, device=labels.device)  # [B, N, G]
    sizes, survivors = member.sum(1), (member & kept[..., None]).sum(1)  # [B, G]
    quota = _quotas(sizes, survivors, n, reserved, rounds=min(n, tokens))

    # Step 6: each group's kept tokens by falling score, then its suppressed ones. Three stable sorts, the least
    # significant key first, bring every group together in that order; a token's rank is its distance to the start.
    order = _by_score(scores)
    for key in (~kept, labels):
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    group = labels.gather(1, order)
    start = F.pad(sizes, (1, 0)).cumsum(1)  # [B, G + 1]
    index = torch.arange(tokens, device=labels.device).expand_as(labels)
    take = index - start.gather(1, group) < F.pad(quota, (0, 1)).gather(1, group)

    # Step 7: ascending indices. N, which sorts after them, stands for a token not taken.
    picks = torch.where(take, order, tokens).sort(dim=1).values[:, : n - reserved]
    return torch.where(picks < tokens, picks, -1)


def _quotas(sizes: Tensor, survivors: Tensor, n: int, reserved: int, rounds: int) -> Tensor:
    """PruneSID step 5: sizes c, survivors m, int64 [B, G] -> tokens of each group, adding up to min(n - reserved, N').

    Where even one token for each group is more than n - reserved, which the papers leave open, quotas are cut in the
    reverse of the order in which they are filled.
    """
    low = sizes.clamp_max(1)
    cap = 5 * -(-n // 64)
    up = torch.minimum(sizes, survivors).clamp_max(cap)
    # "While sum(up) < n" without looking at values: an image that has reached n stays as it is. A group not yet full
    # after n rounds gives n tokens alone, and after N rounds none is left, so min(n, N) rounds are enough.
    for _ in range(rounds):
        up = torch.where(up.sum(1, keepdim=True) < n, torch.minimum(up + 1, sizes), up)

    rest = (n - reserved - low.sum(1, keepdim=True)).clamp_min(0)
    ratio = survivors.float() / survivors.sum(1, keepdim=True).clamp_min(1)
    # In float64 a sum of these fp32 numbers is exact, so that the order of the additions cannot move a rounding.
    share = (ratio.cumsum(1, dtype=torch.float64).float() * rest).round().long()
    quota = torch.minimum(low + share.diff(dim=1, prepend=torch.zeros_like(rest)), up)

    target = sizes.sum(1, keepdim=True).clamp_max(n - reserved)
    order = survivors.argsort(dim=1, descending=True, stable=True)
    missing = target - quota.sum(1, keepdim=True)
    quota = quota + _hand_out(missing, up - quota, order)
    return quota - _hand_out(-missing, quota, order.flip(1))


def _hand_out(amount: Tensor, room: Tensor, order: Tensor) -> Tensor:
    """Fill groups one after the other, in `order`, to their `room` [B, G], until `amount` [B, 1] is used up."""
    room = room.gather(1, order)
    before = room.cumsum(1) - room
    return torch.zeros_like(room).scatter(1, order, (amount - before).clamp_min(0).minimum(room))


# ------------------------------------------------------------------------------------------------ dynamic budget


@torch.no_grad()
def dynamic_budget(features: Tensor, total: int, minimum: int = 1) -> Tensor:
    """PruneSID step 8: share `total` tokens among the images, int64 [B], adding up to `total` exactly.

    Shares are proportional to phi = 1 - rho, how little the image repeats itself, between `minimum` and N. Seats that
    rounding down leaves over go to the largest remainders below N (ties: lowest index).
    """
    total = checks.count("dynamic_budget", "total", total)
    minimum = checks.count("dynamic_budget", "minimum", minimum)
    checks.dynamic_budget(features, total, minimum)
    return shares(mean_similarity(features), features.shape[1], total, minimum)


def shares(rho: Tensor, tokens: int | Tensor, total: int, minimum: int | Tensor) -> Tensor:
    """`dynamic_budget` for images of `tokens` tokens whose mean similarity is rho, fp32 [B] -> int64 [B].

    Images of several sizes: `tokens` and `minimum` are int64 [B].
    """
    # phi is 0 or at least 2^-24. Images with none take part with so little that no other share changes; they share
    # equally where nobody has any, and take what is left where all others are full.
    phi = (1 - rho.double()).clamp_min(2.0**-100)
    # The sum of clamp(lambda * phi, minimum, N) rises with lambda, whose logarithm 64 bisections bring to rounding.
    low, high = -64 * torch.ones_like(phi[:1]), 192 * torch.ones_like(phi[:1])
    for _ in range(64):
        middle = (low + high) / 2
        fits = (middle.exp2() * phi).clamp(minimum, tokens).sum() <= total
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    exact = (low.exp2() * phi).clamp(minimum, tokens)
    budget = exact.floor().long()
    rank = (exact - budget).argsort(descending=True, stable=True).argsort()  # a full image has no remainder
    return budget + (rank < total - budget.sum())
