import pytest
import torch
from conftest import clustered_features, random_importance
from verdicts import greedy_shortfall as shortfall

import lvtp

TOLERANCE = 2e-5


def problem(b, n, seed=0, device="cpu"):
    scores = random_importance(b, n, seed, device) * n
    return scores, lvtp.cosine_similarity(clustered_features(b, n, seed=seed, device=device))


@pytest.mark.parametrize("n", [1, 2, 31, 33, 575, 577])
def test_replays(backend, device, n):
    scores, sim = problem(2, n, seed=n, device=device)
    k = min(n, 64)
    picks = lvtp.greedy_suppression(scores, sim, k)
    assert picks.shape == (2, k)
    assert picks.dtype == torch.int64
    assert picks.device == scores.device
    assert shortfall(picks, scores, sim) <= TOLERANCE


@pytest.mark.large
@pytest.mark.parametrize("gamma", [0.0, 0.5, 20.0, 1e4, 1e300])
def test_gamma(backend, device, gamma):
    scores, sim = problem(2, 65, device=device)
    assert shortfall(lvtp.greedy_suppression(scores, sim, 65, gamma), scores, sim, gamma) <= TOLERANCE


@pytest.mark.parametrize("gamma", [1e30, 1e300])
def test_a_gamma_beyond_fp32_suppresses_twins_only(backend, device, gamma):
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]], device=device)
    sim = torch.eye(4, device=device)[None].clone()
    sim[0, 0, 1] = sim[0, 1, 0] = 1
    sim[0, 0, 2] = sim[0, 2, 0] = 1 - 1e-6
    assert lvtp.greedy_suppression(scores, sim, 4, gamma).tolist() == [[0, 2, 3, 1]]


def test_by_hand(backend, device):
    # 1 is 0's twin and pays 0's score in full, exp(-20 * 0) * 4; for 2 and 3 the price exp(-20 * 1) is next to nothing.
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]], device=device)
    sim = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], device=device)[None]
    assert lvtp.greedy_suppression(scores, sim, 4).tolist() == [[0, 2, 3, 1]]


def test_a_pick_suppresses_by_its_row(backend, device):
    # similarity[0, 1] = 1: picking 0 suppresses 1, although similarity[1, 0] = 0.
    scores = torch.tensor([[3.0, 2.0, 1.0]], device=device)
    sim = torch.eye(3, device=device)[None].clone()
    sim[0, 0, 1] = 1
    assert lvtp.greedy_suppression(scores, sim, 3).tolist() == [[0, 2, 1]]


def test_similarity_above_one_suppresses_like_one(backend, device):
    scores = torch.tensor([[4.0, 3.0, 2.5]], device=device)
    sim = torch.tensor([[1.0, 1.5, 1.0], [1.5, 1, 0], [1, 0, 1]], device=device)[None]
    assert lvtp.greedy_suppression(scores, sim, 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("n", [2, 33, 577])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, torch.nan, torch.inf, -torch.inf])
def test_ties_go_to_the_lowest_index(backend, device, n, value):
    scores = torch.full((2, n), value, device=device)
    for sim in (torch.ones(2, n, n, device=device), torch.zeros(2, n, n, device=device)):
        picks = lvtp.greedy_suppression(scores, sim, n, gamma=0.0)
        assert torch.equal(picks, torch.arange(n, device=device).expand(2, n))


def test_scores_never_rise_and_exhausted_tokens_keep_their_order(backend, device):
    # Negative scores suppress nothing: the order is that of the scores.
    scores = torch.tensor([[-3.0, -1.0, -2.0, 0.0]], device=device)
    assert lvtp.greedy_suppression(scores, torch.ones(1, 4, 4, device=device), 4).tolist() == [[3, 1, 2, 0]]


@pytest.mark.large
@pytest.mark.parametrize("k", [1, 2, 32, 64])
def test_prefix(backend, device, k):
    scores, sim = problem(2, 65, device=device)
    everything = lvtp.greedy_suppression(scores, sim, 65)
    assert torch.equal(lvtp.greedy_suppression(scores, sim, k), everything[:, :k])


def test_scores_that_are_not_finite(backend, device):
    scores = torch.tensor([[torch.nan, -torch.inf, 1.0, torch.inf, torch.nan, -5.0]], device=device)
    picks = lvtp.greedy_suppression(scores, torch.zeros(1, 6, 6, device=device), 6)
    assert picks.tolist() == [[3, 2, 5, 1, 0, 4]]


def test_similarity_that_is_not_finite(backend, device):
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]], device=device)
    sim = torch.zeros(1, 4, 4, device=device)
    sim[0, 0] = torch.tensor([1.0, torch.inf, torch.nan, -torch.inf])  # reads as 1, 1, 0, -1
    assert lvtp.greedy_suppression(scores, sim, 4).tolist() == [[0, 2, 3, 1]]
    for value in (torch.nan, torch.inf, -torch.inf, 3e38, -3e38):
        for gamma in (0.0, 20.0):
            picks = lvtp.greedy_suppression(scores, torch.full_like(sim, value), 4, gamma)
            assert sorted(picks[0].tolist()) == [0, 1, 2, 3]


def test_huge_scores_do_not_overflow(backend, device):
    scores = torch.tensor([[3e38, 2e38, 1.0, -3e38, torch.nan]], device=device)
    picks = lvtp.greedy_suppression(scores, torch.ones(1, 5, 5, device=device), 5)
    assert picks.tolist() == [[0, 1, 2, 3, 4]]  # 0 and 1 are both 2^100, 2 and 3 fall below by that and stay in order


@pytest.mark.parametrize("score_dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_floating_dtype(backend, device, score_dtype):
    scores, sim = problem(2, 40, device=device)
    scores, sim = scores.to(score_dtype), sim.to(score_dtype)
    picks = lvtp.greedy_suppression(scores, sim, 20)
    assert torch.equal(picks, lvtp.greedy_suppression(scores.float(), sim.float(), 20))


def test_mask(backend, device):
    scores, sim = problem(4, 50, device=device)
    mask = torch.rand(4, 50, generator=torch.Generator().manual_seed(3)).to(device) > 0.5
    mask[2] = False
    mask[3] = False
    mask[3, [4, 9]] = True
    picks = lvtp.greedy_suppression(scores, sim, 40, mask=mask)
    assert shortfall(picks, scores, sim, mask=mask) <= TOLERANCE
    for image in range(4):
        real = mask[image].nonzero()[:, 0]
        count = min(40, len(real))
        assert (picks[image, count:] == -1).all()
        if count > 0:  # as if the padding were not there
            alone = lvtp.greedy_suppression(scores[image, real][None], sim[image][real][:, real][None], count)
            assert torch.equal(picks[image, :count], real[alone[0]])
    scores[~mask] = torch.nan
    sim.masked_fill_(~mask[:, None, :] | ~mask[:, :, None], torch.nan)
    assert torch.equal(lvtp.greedy_suppression(scores, sim, 40, mask=mask), picks)


def test_views(backend, device, hostile):
    scores, sim = problem(3, 33, device=device)
    mask = torch.arange(33, device=device).expand(3, 33) % 4 > 0
    wanted = lvtp.greedy_suppression(scores, sim, 20, mask=mask)
    assert torch.equal(lvtp.greedy_suppression(hostile(scores), hostile(sim), 20, mask=hostile(mask)), wanted)


def test_expanded_inputs(backend, device):
    scores, sim = problem(1, 33, device=device)
    picks = lvtp.greedy_suppression(scores.expand(3, 33), sim.expand(3, 33, 33), 10)
    assert torch.equal(picks, lvtp.greedy_suppression(scores, sim, 10).expand(3, 10))


@pytest.mark.large
def test_batch_equals_single(backend, device):
    scores, sim = problem(3, 65, device=device)
    single = torch.cat([lvtp.greedy_suppression(s[None], r[None], 30) for s, r in zip(scores, sim, strict=True)])
    assert torch.equal(lvtp.greedy_suppression(scores, sim, 30), single)


@pytest.mark.large
def test_repeats_itself(backend, device):
    scores, sim = problem(2, 100, device=device)
    assert torch.equal(lvtp.greedy_suppression(scores, sim, 100), lvtp.greedy_suppression(scores, sim, 100))


def test_empty_batch(backend, device):
    empty = torch.empty(0, 5, device=device)
    picks = lvtp.greedy_suppression(empty, torch.empty(0, 5, 5, device=device), 3)
    assert picks.shape == (0, 3)
    assert picks.dtype == torch.int64
