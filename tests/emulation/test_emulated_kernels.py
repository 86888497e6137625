"""The CUDA kernels, on the emulator, against the reference and the oracle: what tests/test_<op>.py does on a GPU."""

import os

import oracle
import pytest
import torch
import verdicts
from conftest import DTYPES, clustered_features, photograph_features, random_importance
from torch.testing import assert_close
from verdicts import greedy_shortfall as shortfall
from verdicts import selection_shortfall

import lvtp

from . import kernels

TOLERANCE = 2e-5
SIZES = (1, 2, 31, 33, 575, 577)


def some_mask(b, n):
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(3)) > 0.5
    mask[-1] = False
    mask[-1, [0, n // 2]] = True
    return mask


def hostile_features(n, d=16):
    """NaN, Inf, zeros, a huge and a tiny token among ordinary ones."""
    x = clustered_features(2, n, d)
    x[0, 3, 5], x[0, 4, 0], x[1, 7] = torch.nan, torch.inf, 0
    x[1, 1] *= 1e30
    x[1, 2] *= 1e-10
    return x


# ---------------------------------------------------------------------------------------------------------- similarity


@pytest.mark.parametrize("n", SIZES)
def test_cosine_similarity_sizes(seed, n):
    x = clustered_features(2, n, 50, seed=n, dtype=DTYPES[seed % 3])
    assert_close(kernels.cosine_similarity(x), lvtp.reference.cosine_similarity(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("d", [1, 3, 8, 12, 33, 200, 513, 1000])
def test_cosine_similarity_of_rows_of_any_length(seed, d):
    """Copied 16, 4 or 2 bytes at a time, and through all the buffers."""
    for dtype in DTYPES:
        x = clustered_features(1, 70, d, seed=d, dtype=dtype)
        assert_close(kernels.cosine_similarity(x), lvtp.reference.cosine_similarity(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_cosine_similarity_in_large_tiles(dtype):
    """Enough of them fill a device; each sum is that of the small tiles."""
    kernels.module().set_seed(1)
    x = clustered_features(12, 289, 72, dtype=dtype)
    sim = kernels.cosine_similarity(x)
    assert_close(sim, lvtp.reference.cosine_similarity(x), rtol=0, atol=2e-6)
    assert torch.equal(sim, sim.mT)
    assert torch.equal(sim[-1:], kernels.cosine_similarity(x[-1:]))


def test_cosine_similarity_of_bad_features(seed):
    x = hostile_features(70)
    for features in (x, x.bfloat16(), x * 1e-12):
        sim = kernels.cosine_similarity(features)
        assert_close(sim, lvtp.reference.cosine_similarity(features), rtol=0, atol=2e-6)
        assert torch.equal(sim, sim.mT)


def test_cosine_similarity_of_misaligned_features(seed):
    for dtype in DTYPES:
        room = torch.zeros(1 + 40 * 64, dtype=dtype)
        x = room[1:].view(1, 40, 64).copy_(clustered_features(1, 40, 64))
        assert_close(kernels.cosine_similarity(x), lvtp.reference.cosine_similarity(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("n", SIZES)
def test_mean_similarity_sizes(seed, n):
    x = clustered_features(2, n, 50, seed=n, dtype=DTYPES[seed % 3])
    assert_close(kernels.mean_similarity(x), lvtp.reference.mean_similarity(x), rtol=1e-5, atol=1e-6)


def test_mean_similarity_of_bad_features_and_with_a_mask(seed):
    x, mask = hostile_features(70, d=33), some_mask(2, 70)
    assert_close(kernels.mean_similarity(x), lvtp.reference.mean_similarity(x), rtol=1e-5, atol=1e-6)
    assert_close(kernels.mean_similarity(x, mask), lvtp.reference.mean_similarity(x, mask), rtol=1e-5, atol=1e-6)
    mask[1, 1:] = False
    assert kernels.mean_similarity(x, mask)[1] == 0  # one token: no pair


# -------------------------------------------------------------------------------------------------- greedy_suppression


@pytest.mark.parametrize("n", SIZES)
def test_greedy_suppression_sizes(seed, n):
    scores = random_importance(2, n, n) * n
    sim = lvtp.cosine_similarity(clustered_features(2, n, seed=n)).to(DTYPES[seed % 3])
    picks = kernels.greedy_suppression(scores, sim, min(n, 64))
    assert shortfall(picks, scores, sim) <= TOLERANCE


@pytest.mark.parametrize("n", [1100, 4200])
def test_greedy_suppression_with_several_tokens_a_thread(seed, n):
    scores = random_importance(1, n) * n
    sim = torch.rand(1, n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float32).half()
    picks = kernels.greedy_suppression(scores, sim, 6)
    assert torch.equal(picks, lvtp.reference.greedy_suppression(scores, sim, 6))


def test_greedy_suppression_beyond_the_registers():
    kernels.module().set_seed(1)
    n, k = 16 * 1024 + 37, 5
    scores = torch.rand(1, n, generator=torch.Generator().manual_seed(1))
    scores[0, [n - 1, n - 30, 16 * 1024]] = torch.tensor([5.0, 4.0, 4.0])
    sim = torch.zeros(1, n, n, dtype=torch.bfloat16)
    sim[0, n - 1, n - 30] = 1
    picks = kernels.greedy_suppression(scores, sim, k)
    assert torch.equal(picks, lvtp.reference.greedy_suppression(scores, sim, k))
    assert picks[0, :2].tolist() == [n - 1, 16 * 1024]


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, torch.nan, torch.inf, -torch.inf])
def test_greedy_suppression_ties_go_to_the_lowest_index(seed, value):
    scores = torch.full((2, 77), value)
    if value == 0:
        scores[:, ::2] = 0.0  # both zeros are one key
    picks = kernels.greedy_suppression(scores, torch.ones(2, 77, 77), 77, gamma=0.0)
    assert torch.equal(picks, torch.arange(77).expand(2, 77))


def test_greedy_suppression_of_what_is_not_finite(seed):
    scores = torch.tensor([[torch.nan, -torch.inf, 1.0, torch.inf, torch.nan, -5.0]])
    assert kernels.greedy_suppression(scores, torch.zeros(1, 6, 6), 6).tolist() == [[3, 2, 5, 1, 0, 4]]
    sim = torch.zeros(1, 4, 4)
    sim[0, 0] = torch.tensor([1.0, torch.inf, torch.nan, -torch.inf])  # reads as 1, 1, 0, -1
    assert kernels.greedy_suppression(torch.tensor([[4.0, 3, 2, 1]]), sim, 4).tolist() == [[0, 2, 3, 1]]


def test_greedy_suppression_with_a_mask(seed):
    scores, mask = random_importance(3, 90) * 90, some_mask(3, 90)
    sim = lvtp.cosine_similarity(clustered_features(3, 90))
    scores[~mask] = torch.nan
    picks = kernels.greedy_suppression(scores, sim, 60, mask=mask)
    assert torch.equal(picks, lvtp.reference.greedy_suppression(scores, sim, 60, mask=mask))
    assert (picks[2, 2:] == -1).all()


# --------------------------------------------------------------------------------------------------------- cluster_nms


@pytest.mark.parametrize("n", SIZES)
def test_cluster_nms_sizes(seed, n):
    g = torch.Generator().manual_seed(n)
    scores, labels = torch.rand(2, n, generator=g) - 0.1, torch.randint(0, 1 + n // 20, (2, n), generator=g)
    sim = lvtp.cosine_similarity(clustered_features(2, n, seed=n)).to(DTYPES[seed % 3])
    kept = kernels.cluster_nms(scores, labels, sim, 0.5)
    assert torch.equal(kept, lvtp.reference.cluster_nms(scores, labels, sim, 0.5))


def test_cluster_nms_of_one_large_group_and_of_groups_with_large_labels(seed):
    g = torch.Generator().manual_seed(5)
    scores, sim = torch.rand(1, 333, generator=g), torch.rand(1, 333, 333, generator=g)
    for labels in (torch.zeros(1, 333, dtype=torch.long), torch.randint(2**40, 2**40 + 3, (1, 333), generator=g)):
        kept = kernels.cluster_nms(scores, labels, sim, 0.97)
        assert torch.equal(kept, lvtp.reference.cluster_nms(scores, labels, sim, 0.97))
        assert 10 < kept.sum() < 300


def test_cluster_nms_thresholds_masks_ties_and_bad_scores(seed):
    g = torch.Generator().manual_seed(6)
    n, labels = 130, torch.randint(0, 4, (3, 130), generator=g)
    scores, mask = torch.randint(-1, 4, (3, n), generator=g).float(), some_mask(3, n)
    scores[0, :9] = torch.tensor([torch.nan, torch.inf, -torch.inf] * 3)
    sim = lvtp.cosine_similarity(clustered_features(3, n))
    sim[1, 5] = torch.nan
    for threshold in (0.3, torch.tensor([0.2, 0.5, 0.9]), torch.inf, -torch.inf, torch.nan):
        kept = kernels.cluster_nms(scores, labels, sim, threshold, mask)
        assert torch.equal(kept, lvtp.reference.cluster_nms(scores, labels, sim, threshold, mask))


# -------------------------------------------------------------------------------------------------------- id_selection


@pytest.mark.parametrize("n", SIZES)
def test_id_selection_sizes(seed, n):
    x = clustered_features(2, n, 40, seed=n, dtype=DTYPES[seed % 3])
    importance = random_importance(2, n, n)
    picks = kernels.id_selection(x, importance, min(n, 48))
    assert selection_shortfall(picks, x, importance) <= TOLERANCE


def test_id_selection_of_many_tokens():
    """The one size here at which `id_selection` chooses rounds by itself."""
    kernels.module().set_seed(1)
    x, importance, mask = clustered_features(2, 4100, 5), random_importance(2, 4100), some_mask(2, 4100)
    picks = kernels.id_selection(x, importance, 12, mask=mask)
    assert picks[1].tolist() == [*lvtp.id_selection(x, importance, 2, mask=mask)[1].tolist(), *[-1] * 10]
    assert selection_shortfall(picks[:1], x[:1], importance[:1], mask=mask[:1]) <= TOLERANCE


WAYS = (kernels.id_selection, kernels.id_selection_in_rounds)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [0.0, 0.3, torch.nan, torch.inf, -torch.inf])
def test_id_selection_ties_go_to_the_lowest_index(way, value):
    kernels.module().set_seed(3)
    picks = way(torch.ones(1, 200, 3), torch.full((1, 200), value), 150)
    assert torch.equal(picks[0], torch.arange(150))


@pytest.mark.parametrize("way", WAYS)
def test_id_selection_of_bad_input(seed, way):
    x, importance = hostile_features(50).to(DTYPES[seed // 2 * 2]), random_importance(2, 50)
    importance[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.inf])
    importance[1] = 3e38 * (torch.arange(50) % 3 - 1)  # the spread overflows
    picks = way(x, importance, 50)
    assert selection_shortfall(picks, x, importance) <= TOLERANCE
    assert picks[0, 0] in (1, 3)
    assert picks[0, -1] == 0


# A round has 128 candidates, a team of 5 blocks 64 tokens each at a time.
@pytest.mark.parametrize(("n", "d", "k"), [(1, 3, 1), (2, 9, 2), (65, 50, 40), (129, 7, 129), (350, 16, 350)])
def test_id_selection_in_rounds_sizes(seed, n, d, k):
    x, importance = clustered_features(2, n, d, seed=n, dtype=DTYPES[seed % 3]), random_importance(2, n, n)
    picks = kernels.id_selection_in_rounds(x, importance, k)
    assert selection_shortfall(picks, x, importance) <= (TOLERANCE if k < 200 else 2 * TOLERANCE)
    if x.dtype != torch.float32:  # whose three products are not the same for both factors
        assert torch.equal(picks, kernels.id_selection(x, importance, k))


@pytest.mark.parametrize("clusters", [2, 12, 200])
def test_id_selection_in_many_rounds(seed, clusters):
    """Candidates that are alike leave the race together, and many equal scores and equal tokens tie."""
    x = clustered_features(1, 330, 8, seed=seed, clusters=clusters, noise=0.0)
    importance = torch.randint(0, 6, (1, 330), generator=torch.Generator().manual_seed(seed)) / 5
    picks = kernels.id_selection_in_rounds(x.half(), importance, 260)
    assert selection_shortfall(picks, x.half(), importance) <= 2 * TOLERANCE
    assert torch.equal(picks, kernels.id_selection(x.half(), importance, 260))


def test_id_selection_in_rounds_when_candidates_fall_to_the_others_scores(seed):
    """Exactly: scores are quarters, and a pick takes all of its score from its equals and nothing from others."""
    g = torch.Generator().manual_seed(seed)
    x = torch.eye(20)[torch.randint(0, 20, (1, 330), generator=g)]
    importance = torch.randint(0, 5, (1, 330), generator=g) / 4
    picks = kernels.id_selection_in_rounds(x, importance, 300, gamma=1e6)
    assert torch.equal(picks, lvtp.id_selection(x, importance, 300, gamma=1e6))


def test_id_selection_in_rounds_with_masks_and_more_images_than_teams(seed):
    n, k = 70, 40
    x, importance, mask = clustered_features(7, n, 6), random_importance(7, n), some_mask(7, n)
    mask[2] = False
    x[~mask] = torch.nan
    importance[~mask] = torch.inf
    picks = kernels.id_selection_in_rounds(x, importance, k, mask=mask)
    assert selection_shortfall(picks, x, importance, mask=mask) <= TOLERANCE
    assert (picks[2] == -1).all()
    assert (picks[6, 2:] == -1).all()


def test_id_selection_in_rounds_of_rows_of_any_length_and_misaligned(seed):
    importance = random_importance(1, 150)
    for dtype, d in zip(DTYPES * 2, (64, 33, 34, 70, 200, 1), strict=True):
        room = torch.zeros(1 + 150 * d, dtype=dtype)
        for x in (room[1:].view(1, 150, d), room[:-1].view(1, 150, d)):
            x.copy_(clustered_features(1, 150, d, seed=d))
            picks = kernels.id_selection_in_rounds(x, importance, 20)
            assert selection_shortfall(picks, x, importance) <= TOLERANCE


def test_id_selection_in_rounds_of_huge_tiny_and_absent_tokens(seed):
    x, importance = hostile_features(300), random_importance(2, 300)
    for features in (x, x.bfloat16(), x * 1e-12):
        picks = kernels.id_selection_in_rounds(features, importance, 200)
        assert selection_shortfall(picks, features, importance) <= 2 * TOLERANCE


# ---------------------------------------------------------------------------------------------------------------- psca


def agreement(labels, loadings, x, groups, center):
    """The share of tokens grouped as by float64 eigenvectors; the loadings of these must agree."""
    shares = []
    for image in range(len(x)):
        wanted, wanted_loadings = oracle.psca(oracle.as_float64(x[image]), groups, center)
        same = labels[image].numpy() == wanted
        assert abs(loadings[image].numpy() - wanted_loadings)[same].max(initial=0.0) < 5e-3
        shares.append(float(same.mean()))
    return min(shares)


@pytest.mark.parametrize(
    ("n", "d", "groups", "center"),
    [
        (1, 64, 1, "feature"),
        (2, 9, 2, "feature"),
        (31, 64, 4, "token"),
        (33, 64, 32, "feature"),
        (90, 64, 8, "token"),  # more tokens than features: by way of the features
        (110, 128, 52, "feature"),
        (140, 150, 3, "feature"),  # several blocks share a step
    ],
)
def test_psca_groups_like_float64(n, d, groups, center):
    kernels.module().set_seed(n)
    x = clustered_features(1, n, d, seed=n, dtype=DTYPES[n % 3])
    assert agreement(*kernels.psca(x, groups, center), x, groups, center) >= 0.99


@pytest.mark.parametrize("center", ["feature", "token"])
def test_psca_with_fewer_clusters_than_groups(seed, center):
    x = clustered_features(1, 70, 96, seed=1, clusters=3)
    assert agreement(*kernels.psca(x, 12, center), x, 12, center) >= 0.99


@pytest.mark.parametrize("center", ["feature", "token"])
@pytest.mark.parametrize("groups", [4, 8, 16, 32, 48, 64, 144])
@pytest.mark.parametrize("features", ["photograph", "clustered"])
def test_psca_groups_like_float64_at_full_size(features, groups, center):
    if (groups not in (16, 48) or center == "token") and not os.environ.get("LVTP_EMULATION_ALL"):
        pytest.skip("takes minutes; LVTP_EMULATION_ALL=1 runs it")
    kernels.module().set_seed(groups)
    x = photograph_features() if features == "photograph" else clustered_features(1, 576, 128, groups, clusters=24)
    assert agreement(*kernels.psca(x, groups, center), x, groups, center) >= 0.99


def with_spectrum(*eigenvalues):
    """[1, N, N] with these eigenvalues, and vectors drawn at random."""
    values = torch.cat([torch.as_tensor(v, dtype=torch.float64).flatten() for v in eigenvalues])
    g = torch.Generator().manual_seed(len(values))
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q
    matrix = q * values @ q.mT
    return (matrix + matrix.mT)[None] / 2


def residual(vectors, matrices):
    """The largest of |G v - (v G v) v|, over the largest eigenvalue, and how far the vectors are from orthonormal."""
    products = vectors @ matrices
    left_over = products - (products * vectors).sum(-1, keepdim=True) * vectors
    unit = torch.eye(vectors.shape[1], dtype=torch.float64)
    return (left_over.norm(dim=-1).amax() / matrices.diagonal(dim1=1, dim2=2).sum(1).amax()).item(), (
        vectors @ vectors.mT - unit
    ).abs().max().item()


@pytest.mark.parametrize("count", [2, 16, 40])
@pytest.mark.parametrize("spectrum", ["steep", "clusters", "noise"])
def test_subspace_iteration_finds_eigenvectors_that_stand_apart(spectrum, count):
    kernels.module().set_seed(count)
    n = 263
    falling = torch.arange(1, n + 1, dtype=torch.float64)
    matrix = {
        "steep": lambda: with_spectrum(1e3 * falling**-2.0),
        "clusters": lambda: with_spectrum(100 - 2 * falling[:20], 1 - 1e-3 * falling[20:]),
        "noise": lambda: with_spectrum(2 - falling / n),
    }[spectrum]()
    matrices = torch.cat([matrix, matrix.flip(1, 2) * 1e-8])
    vectors, direct = kernels.leading_eigenvectors(matrices, count)
    assert not direct.any()
    for vector, given in zip(vectors, matrices, strict=True):
        assert residual(vector[None], given[None]) < (1e-6, 1e-6)
        exact = torch.linalg.eigh(given).eigenvectors.flip(1)[:, :count].mT
        assert ((vector * exact).sum(-1).abs() > 0.9999).all()


@pytest.mark.parametrize(("seed", "count"), [(0, 3), (1, 3)])
def test_what_iteration_cannot_find_is_found_directly(seed, count):
    """Eigenvalues that are equal, one rank less than wanted, nothing at all: in one launch with others."""
    kernels.module().set_seed(seed)
    apart = torch.linspace(9, 1, 260, dtype=torch.float64)
    equal, low = apart.clone(), apart.clone()
    equal[1] = equal[2] = equal[0]
    low[count - 1 :] = 0
    matrices = torch.cat([with_spectrum(v) for v in (equal, apart, low, 0 * low, apart, equal)])
    vectors, direct = kernels.leading_eigenvectors(matrices, count)
    assert direct.tolist() == [True, False, True, False, False, True]  # nothing to overwrite in the zeros
    assert (vectors[3] == 0).all()
    for image in (0, 1, 2, 4, 5):
        there = vectors[image, : count - 1][None]
        assert residual(there, matrices[image][None]) < (1e-6, 1e-6)
        values = (there @ matrices[image] * there).sum(-1)
        assert_close(values[0], torch.linalg.eigvalsh(matrices[image]).flip(0)[: count - 1], rtol=1e-6, atol=1e-9)


def test_psca_of_a_photograph(seed):
    x = photograph_features()[:, seed::7]
    assert agreement(*kernels.psca(x, 16), x, 16, "feature") >= 0.99


@pytest.mark.parametrize("center", ["feature", "token"])
def test_psca_of_bad_features_and_with_a_mask(center):
    kernels.module().set_seed(3)
    x = hostile_features(40)
    x[0, 9] = 3.0  # a constant token is zero once centred over its features
    mask = some_mask(2, 40)
    mask[1] = True
    labels, loadings = kernels.psca(x, 3, center, mask)
    wanted_labels, wanted_loadings = lvtp.reference._psca(x, 3, center, mask)
    assert_close(loadings, wanted_loadings, rtol=0, atol=1e-4)
    assert ((loadings == 0) == (wanted_loadings == 0)).all()
    assert (labels == wanted_labels).float().mean() > 0.95


def test_psca_at_the_edges_of_rank_and_range():
    """Fewer components than groups, by either matrix; an eigenvalue of zero; sigmoids that are no normal numbers."""
    kernels.module().set_seed(4)
    g = torch.Generator().manual_seed(0)
    for n, d, groups in ((60, 17, 5), (30, 40, 6), (270, 24, 8)):
        x = (0.01 * torch.randn(2, n, 1, generator=g)).repeat(1, 1, d)
        x[:, n // 2] = 3
        verdicts.psca(kernels.psca(x, groups, "token"), x, groups, "token")
    _, loadings = kernels.psca(torch.randn(3, 2, 17, generator=g), 2, "token")
    assert_close(loadings, torch.full((3, 2), 0.5**0.5), rtol=0, atol=1e-4)
    labels, loadings = kernels.psca(-95 - clustered_features(1, 12, 4).abs(), 3)
    assert not labels.any()
    assert not loadings.any()


@pytest.mark.parametrize(("n", "d", "groups"), [(3, 1, 2), (40, 3, 20), (60, 16, 14)])
def test_psca_of_more_groups_than_half_the_features(n, d, groups):
    kernels.module().set_seed(n)
    x = clustered_features(1, n, d, seed=n)
    labels, loadings = kernels.psca(x, groups, "token")
    assert labels.max() < min(groups, d)
    assert agreement(labels, loadings, x, min(groups, d), "token") == 1


def test_psca_of_equal_tokens():
    kernels.module().set_seed(0)
    for value in (0.0, 1.0):
        labels, loadings = kernels.psca(torch.full((1, 20, 5), value), 3, "token")
        assert (labels == 0).all()
        assert (loadings == 0).all()
    x = clustered_features(1, 1, 16).expand(1, 20, 16)
    labels, loadings = kernels.psca(x, 3)
    assert (labels == 0).all()
    assert_close(loadings, torch.full((1, 20), 20**-0.5), rtol=1e-4, atol=0)


# ----------------------------------------------------------------------------------------------------------- prune_sid


def assert_prunes_like_the_oracle(picks, x, scores, labels, n, reserved=0, mask=None):
    compared = 0
    for image in range(len(x)):
        wanted, margin = oracle.prune_sid(
            oracle.as_float64(x[image]), oracle.as_float64(scores[image]), labels[image].numpy(), n, reserved,
            None if mask is None else mask[image].numpy(),
        )  # fmt: skip
        if margin > 1e-6:
            assert picks[image].tolist() == wanted
            compared += 1
    assert compared > 0


@pytest.mark.parametrize("tokens", SIZES)
def test_prune_sid_sizes(seed, tokens):
    n, reserved = (64, seed % 2) if tokens > 60 else (tokens + 2, 1)
    groups = max(1, min(n // 4, tokens))
    g = torch.Generator().manual_seed(tokens)
    x = clustered_features(2, tokens, 24, seed=tokens, dtype=DTYPES[seed % 3])
    scores = torch.rand(2, tokens, generator=g)
    labels = (torch.rand(2, tokens, generator=g) ** 2 * groups).long()
    picks = kernels.prune_sid(x, scores, n, reserved, labels=labels)
    assert_prunes_like_the_oracle(picks, x, scores, labels, n, reserved)


@pytest.mark.parametrize(
    ("tokens", "n", "reserved"), [(50, 12, 0), (50, 3, 2), (50, 40, 30), (50, 2**62, 5), (1100, 99, 1)]
)
def test_prune_sid_budgets_with_a_mask_and_bad_scores(tokens, n, reserved):
    kernels.module().set_seed(n)
    g = torch.Generator().manual_seed(tokens)
    x, mask = clustered_features(3, tokens, 16, seed=1), some_mask(3, tokens)
    scores = torch.randint(-1, 5, (3, tokens), generator=g).float()
    scores[0, :9] = torch.tensor([torch.nan, torch.inf, -torch.inf] * 3)
    groups = max(1, min(n // 4, tokens))
    labels = torch.randint(0, min(groups, 9), (3, tokens), generator=g)
    picks = kernels.prune_sid(x, scores, n, reserved, labels=labels, mask=mask)
    assert_prunes_like_the_oracle(picks, x, scores, labels, n, reserved, mask)
    far = torch.where(labels == groups - 1, labels + 1000, labels)  # counts as the nearest group
    assert torch.equal(kernels.prune_sid(x, scores, n, reserved, labels=far, mask=mask), picks)


def test_prune_sid_from_features_alone_and_with_more_groups_than_fit_in_shared_memory():
    kernels.module().set_seed(1)
    x = clustered_features(1, 120, 32, dtype=torch.bfloat16)
    labels, loadings = kernels.psca(x, 6, "token")
    picks = kernels.prune_sid(x, None, 25, 1, "token")
    assert torch.equal(picks, kernels.prune_sid(x, loadings, 25, 1, labels=labels))
    assert_prunes_like_the_oracle(picks, x, loadings, labels, 25, 1)
    wide = clustered_features(1, 330, 16)
    scores, each = random_importance(1, 330), torch.arange(330)[None] % 300
    picks = kernels.prune_sid(wide, scores, 1200, 900, labels=each)
    assert_prunes_like_the_oracle(picks, wide, scores, each, 1200, 900)


@pytest.mark.parametrize(("n", "reserved", "center"), [(32, 1, "feature"), (48, 0, "token")])
def test_prune_sid_picks_what_the_cpu_picks(seed, n, reserved, center):
    x = torch.cat([photograph_features()[:, 100:164, :80], clustered_features(1, 64, 80)])
    importance = random_importance(2, 64, n) if seed % 2 else None
    picks = kernels.prune_sid(x, importance, n, reserved, center)
    assert torch.equal(picks, lvtp.prune_sid(x, importance, n, reserved, center))


def test_no_kernel_relies_on_what_the_workspace_held(monkeypatch):
    kernels.module().set_seed(1)
    x, scores, matrix = clustered_features(2, 70, 40), random_importance(2, 70), with_spectrum(range(270, 0, -1))

    def run():
        return (
            kernels.mean_similarity(x),
            kernels.greedy_suppression(scores, lvtp.cosine_similarity(x), 9),
            kernels.id_selection_in_rounds(x, scores, 40),
            *kernels.leading_eigenvectors(matrix, 3),
            *kernels.psca(x, 5),
            kernels.prune_sid(x, scores, 20),
            kernels.dynamic_budget(x, 60),
        )

    clean = run()
    monkeypatch.setattr(kernels._Workspace, "content", 0xA5)
    assert all(map(torch.equal, run(), clean))


# ------------------------------------------------------------------------------------------------------ dynamic_budget


@pytest.mark.parametrize("total", [6, 7, 40, 119, 120])
def test_dynamic_budget_equals_the_cpus(seed, total):
    x = torch.cat([clustered_features(1, 20, seed=i, clusters=1 + 2 * i, noise=0.05 + 0.1 * i) for i in range(6)])
    x[4], x[5] = 1.0, torch.nan  # an image that repeats itself entirely, and one without any direction
    for minimum in (1, total // 12):
        assert torch.equal(kernels.dynamic_budget(x, total, minimum), lvtp.dynamic_budget(x, total, minimum))


def test_dynamic_budget_of_more_images_than_threads():
    kernels.module().set_seed(2)
    x = torch.rand(1100, 3, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernels.dynamic_budget(x, 2345, 0), lvtp.dynamic_budget(x, 2345, 0))
