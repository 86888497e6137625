import math

import oracle
import pytest
import torch
from conftest import clustered_features, random_importance

import lvtp


def problem(b, n, groups=4, seed=0, device="cpu"):
    scores = random_importance(b, n, seed, device)
    labels = torch.randint(groups, (b, n), generator=torch.Generator().manual_seed(seed)).to(device)
    return scores, labels, lvtp.cosine_similarity(clustered_features(b, n, seed=seed, device=device))


def wanted(scores, labels, similarity, threshold, mask=None):
    """The oracle's answer on the same fp32 similarity and threshold, where no rounding is left to decide anything."""
    b = len(scores)
    taus = threshold.float().cpu().double().tolist() if torch.is_tensor(threshold) else [float(threshold)] * b
    masks = [None] * b if mask is None else mask.cpu().numpy()
    images = zip(
        oracle.as_float64(scores), labels.cpu().numpy(), oracle.as_float64(similarity), taus, masks, strict=True
    )
    return torch.stack([torch.from_numpy(oracle.nms(*image)[0]) for image in images])


@pytest.mark.parametrize("n", [1, 2, 31, 33, 575, 577])
@pytest.mark.parametrize("threshold", [-1.0, 0.25, 0.5, 2.0])
def test_equals_the_oracle(backend, device, n, threshold):
    scores, labels, sim = problem(2, n, seed=n, device=device)
    kept = lvtp.cluster_nms(scores, labels, sim, threshold)
    assert kept.shape == (2, n)
    assert kept.dtype == torch.bool
    assert kept.device == scores.device
    assert torch.equal(kept.cpu(), wanted(scores, labels, sim, threshold))


def test_the_problems_above_have_something_to_suppress():
    scores, labels, sim = problem(2, 577)
    share = wanted(scores, labels, sim, 0.5).float().mean()
    assert 0.05 < share < 0.95


@pytest.mark.large
@pytest.mark.parametrize("threshold_dtype", [torch.float32, torch.float64, torch.float16])
def test_a_threshold_for_each_image(backend, device, threshold_dtype):
    scores, labels, sim = problem(3, 65, device=device)
    tau = torch.tensor([0.125, 0.5, 2.0], dtype=threshold_dtype, device=device)
    kept = lvtp.cluster_nms(scores, labels, sim, tau)
    assert torch.equal(kept.cpu(), wanted(scores, labels, sim, tau))
    assert kept[2].all()


def test_only_larger_similarity_suppresses(backend, device):
    scores = torch.tensor([[2.0, 1.0]], device=device)
    sim = torch.full((1, 2, 2), 0.5, device=device)
    labels = torch.zeros(1, 2, dtype=torch.int64, device=device)
    assert lvtp.cluster_nms(scores, labels, sim, 0.5).tolist() == [[True, True]]
    assert lvtp.cluster_nms(scores, labels, sim, 0.4999).tolist() == [[True, False]]


def test_a_kept_token_suppresses_by_its_row(backend, device):
    scores = torch.tensor([[2.0, 1.0]], device=device)
    labels = torch.zeros(1, 2, dtype=torch.int64, device=device)
    sim = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]], device=device)  # only from 1 to 0
    assert lvtp.cluster_nms(scores, labels, sim, 0.5).tolist() == [[True, True]]
    assert lvtp.cluster_nms(scores, labels, sim.mT, 0.5).tolist() == [[True, False]]


def test_a_suppressed_token_suppresses_nothing(backend, device):
    # 0 suppresses 1; 2 resembles only 1 and stays.
    scores = torch.tensor([[3.0, 2.0, 1.0]], device=device)
    labels = torch.zeros(1, 3, dtype=torch.int64, device=device)
    sim = torch.tensor([[[1.0, 0.9, 0.0], [0.9, 1.0, 0.9], [0.0, 0.9, 1.0]]], device=device)
    assert lvtp.cluster_nms(scores, labels, sim, 0.5).tolist() == [[True, False, True]]


def test_groups_do_not_interact(backend, device):
    scores, _, _ = problem(1, 33, device=device)
    labels = torch.arange(33, device=device)[None]
    assert lvtp.cluster_nms(scores, labels, torch.ones(1, 33, 33, device=device), 0.5).all()
    assert lvtp.cluster_nms(scores, labels + 2**40, torch.ones(1, 33, 33, device=device), 0.5).all()


@pytest.mark.parametrize("value", [1.0, 1e-30, torch.inf])
@pytest.mark.parametrize("n", [2, 33, 577])
def test_ties_keep_the_lowest_index(backend, device, value, n):
    labels = torch.arange(n, device=device)[None] % 2
    scores = torch.full((1, n), value, device=device)
    kept = lvtp.cluster_nms(scores, labels, torch.ones(1, n, n, device=device), 0.5)
    assert kept[0].nonzero()[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, -torch.inf, torch.nan])
def test_a_score_that_is_not_positive_is_never_kept(backend, device, value):
    scores = torch.tensor([[value, 1.0, value]], device=device)
    labels = torch.zeros(1, 3, dtype=torch.int64, device=device)
    assert lvtp.cluster_nms(scores, labels, torch.zeros(1, 3, 3, device=device), 0.5).tolist() == [[False, True, False]]
    assert not lvtp.cluster_nms(scores * 0 + value, labels, torch.zeros(1, 3, 3, device=device), 0.5).any()


def test_similarity_that_is_not_finite(backend, device):
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]], device=device)
    labels = torch.zeros(1, 4, dtype=torch.int64, device=device)
    sim = torch.zeros(1, 4, 4, device=device)
    sim[0, 0] = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    assert lvtp.cluster_nms(scores, labels, sim, 0.5).tolist() == [[True, True, False, True]]


@pytest.mark.parametrize("threshold", [math.nan, math.inf])
def test_a_threshold_nothing_exceeds(backend, device, threshold):
    scores, labels, _ = problem(1, 9, device=device)
    assert lvtp.cluster_nms(scores, labels, torch.ones(1, 9, 9, device=device), threshold).all()


def test_mask(backend, device):
    scores, labels, sim = problem(3, 60, device=device)
    mask = torch.rand(3, 60, generator=torch.Generator().manual_seed(3)).to(device) > 0.5
    mask[2] = False
    kept = lvtp.cluster_nms(scores, labels, sim, 0.3, mask)
    assert torch.equal(kept.cpu(), wanted(scores, labels, sim, 0.3, mask))
    assert not kept[~mask].any()
    for image in range(2):  # as if the padding were not there
        real = mask[image].nonzero()[:, 0]
        alone = lvtp.cluster_nms(
            scores[image, real][None], labels[image, real][None], sim[image][real][:, real][None], 0.3
        )
        assert torch.equal(kept[image, real], alone[0])
    scores[~mask] = torch.inf
    labels[~mask] = -1
    assert torch.equal(lvtp.cluster_nms(scores, labels, sim, 0.3, mask), kept)


@pytest.mark.large
@pytest.mark.parametrize("score_dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_floating_dtype(backend, device, score_dtype):
    scores, labels, sim = problem(2, 40, device=device)
    scores, sim = scores.to(score_dtype), sim.to(score_dtype)
    kept = lvtp.cluster_nms(scores, labels, sim, 0.3)
    assert torch.equal(kept, lvtp.cluster_nms(scores.float(), labels, sim.float(), 0.3))


def test_views(backend, device, hostile):
    scores, labels, sim = problem(3, 33, device=device)
    mask = torch.arange(33, device=device).expand(3, 33) % 4 > 0
    tau = torch.tensor([0.1, 0.3, 0.5], device=device)
    kept = lvtp.cluster_nms(hostile(scores), hostile(labels), hostile(sim), hostile(tau[:, None])[:, 0], hostile(mask))
    assert torch.equal(kept, lvtp.cluster_nms(scores, labels, sim, tau, mask))


@pytest.mark.large
def test_batch_equals_single(backend, device):
    batch = problem(3, 65, device=device)
    single = torch.cat([lvtp.cluster_nms(*(t[None] for t in image), 0.3) for image in zip(*batch, strict=True)])
    assert torch.equal(lvtp.cluster_nms(*batch, 0.3), single)


def test_empty_batch(backend, device):
    empty = torch.empty(0, 5, device=device)
    kept = lvtp.cluster_nms(empty, empty.long(), torch.empty(0, 5, 5, device=device), 0.5)
    assert kept.shape == (0, 5)
    assert lvtp.cluster_nms(empty, empty.long(), torch.empty(0, 5, 5, device=device), empty[:, 0]).dtype == torch.bool


@pytest.mark.parametrize("threshold", [1e300, float("inf"), float("nan"), -1e300])
def test_a_threshold_that_float32_does_not_hold(backend, device, threshold):
    scores, labels = torch.ones(1, 4, device=device), torch.zeros(1, 4, dtype=torch.int64, device=device)
    kept = lvtp.cluster_nms(scores, labels, torch.eye(4, device=device)[None], threshold)
    assert kept.tolist() == [[True] + [threshold != -1e300] * 3]
