import pytest
import torch
from conftest import clustered_features, random_importance
from verdicts import selection_shortfall as shortfall

import lvtp

TOLERANCE = 2e-5


@pytest.mark.parametrize("n", [1, 2, 31, 33, 575, 576, 577, 729])
def test_replays(backend, device, dtype, n):
    x, s = clustered_features(2, n, seed=n, dtype=dtype, device=device), random_importance(2, n, n, device)
    k = min(n, 64)
    picks = lvtp.id_selection(x, s, k)
    assert picks.shape == (2, k)
    assert picks.dtype == torch.int64
    assert picks.device == x.device
    assert shortfall(picks, x, s) <= TOLERANCE


@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_many_tokens(backend, device, dtype):
    x, s = clustered_features(1, 2881, dtype=dtype, device=device), random_importance(1, 2881, device=device)
    assert shortfall(lvtp.id_selection(x, s, 64), x, s) <= TOLERANCE


@pytest.mark.large
def test_replays_llava(backend, device):
    x, s = (
        clustered_features(1, 576, 1024, dtype=torch.float16, device=device),
        random_importance(1, 576, device=device),
    )
    assert shortfall(lvtp.id_selection(x, s, 192), x, s) <= TOLERANCE


@pytest.mark.large
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_replays_near_duplicates(backend, device, noise):
    x = clustered_features(2, 200, noise=noise, device=device)
    s = random_importance(2, 200, device=device)
    assert shortfall(lvtp.id_selection(x, s, 200), x, s) <= 2 * TOLERANCE  # 200 subtractions instead of 64


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1e4])
def test_gamma(backend, device, gamma):
    x, s = clustered_features(2, 65, device=device), random_importance(2, 65, device=device)
    assert shortfall(lvtp.id_selection(x, s, 32, gamma), x, s, gamma) <= TOLERANCE


@pytest.mark.large
@pytest.mark.parametrize("n", [1, 2, 33, 577])
@pytest.mark.parametrize("value", [0.0, 0.25, 1.0, torch.nan, torch.inf, -torch.inf])
def test_ties_go_to_the_lowest_index(backend, device, n, value):
    # A power of two as the number of features, so that the length is exact and every similarity exactly 1.
    x, s = torch.ones(2, n, 64, device=device), torch.full((2, n), value, device=device)
    everything = torch.arange(n, device=device).expand(2, n)
    assert torch.equal(lvtp.id_selection(x, s, n), everything)
    assert torch.equal(lvtp.id_selection(torch.zeros_like(x), s, n), everything)


def test_equal_importance_is_used_as_it_is(backend, device):
    x = torch.tensor([[[1.0, 0], [1, 0], [0, 1]]], device=device)  # 0 and 1 are twins
    assert lvtp.id_selection(x, torch.full((1, 3), 0.5, device=device), 3).tolist() == [[0, 2, 1]]
    assert lvtp.id_selection(x, torch.full((1, 3), -0.5, device=device), 3).tolist() == [[0, 1, 2]]
    # Up to 1e-9 apart is alike: 1 falls to -0.5e-10, above 2. Scaled, it falls from 0.94 to -0.06, below 2's 0.
    s = torch.tensor([[2e-10, 1.5e-10, -7e-10]], device=device)
    assert lvtp.id_selection(x, s, 3).tolist() == [[0, 1, 2]]
    assert lvtp.id_selection(x, 10 * s, 3).tolist() == [[0, 2, 1]]


def test_scaling_makes_the_largest_one_and_the_smallest_zero(backend, device):
    # Scaled: 1, 0.5, 0. 1 is 0's twin and falls to -0.5, below 2.
    x = torch.tensor([[[1.0, 0], [1, 0], [0, 1]]], device=device)
    s = torch.tensor([[103.0, 102.0, 101.0]], device=device)
    assert lvtp.id_selection(x, s, 3).tolist() == [[0, 2, 1]]


def test_importance_that_is_not_finite(backend, device):
    s = torch.tensor([[torch.nan, 0.5, torch.inf, 0.25, -torch.inf, torch.nan, 0.75]], device=device)
    picks = lvtp.id_selection(torch.eye(7, device=device)[None], s, 7)
    # Scaled: NaN, 0.5, 2, 0, 0, NaN, 1, and nothing resembles anything.
    assert picks.tolist() == [[2, 6, 1, 3, 4, 0, 5]]
    s[0, [1, 3, 6]] = 0.5  # nothing to scale: 0.5 stays, Inf is 2 and -Inf 0 all the same
    assert lvtp.id_selection(torch.eye(7, device=device)[None], s, 7).tolist() == [[2, 1, 3, 6, 4, 0, 5]]


def test_importance_whose_range_overflows(backend, device):
    s = torch.tensor([[-3e38, 3e38, 0.0, 1e38]], device=device)
    assert lvtp.id_selection(torch.eye(4, device=device)[None], s, 4).tolist() == [[1, 3, 2, 0]]


@pytest.mark.large
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_features_without_direction(backend, device, dtype, bad):
    x, s = clustered_features(2, 40, dtype=dtype, device=device), random_importance(2, 40, device=device)
    x[0, ::3] = bad
    x[1] = bad
    picks = lvtp.id_selection(x, s, 40)
    assert shortfall(picks, x, s) <= TOLERANCE
    # Where nothing resembles anything, importance alone decides.
    assert torch.equal(picks[1], s[1].argsort(descending=True, stable=True))


@pytest.mark.large
def test_huge_features(backend, device):
    x, s = clustered_features(2, 65, device=device), random_importance(2, 65, device=device)
    assert torch.equal(lvtp.id_selection(x * 1e30, s, 32), lvtp.id_selection(x, s, 32))


@pytest.mark.large
@pytest.mark.parametrize("k", [1, 2, 17, 64])
def test_prefix(backend, device, k):
    x, s = clustered_features(2, 65, device=device), random_importance(2, 65, device=device)
    assert torch.equal(lvtp.id_selection(x, s, k), lvtp.id_selection(x, s, 65)[:, :k])


@pytest.mark.large
@pytest.mark.parametrize("importance_dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_importance_of_every_floating_dtype(backend, device, importance_dtype):
    x, s = clustered_features(2, 40, device=device), random_importance(2, 40, device=device).to(importance_dtype)
    assert torch.equal(lvtp.id_selection(x, s, 20), lvtp.id_selection(x, s.float(), 20))


def test_mask(backend, device, dtype):
    x, s = clustered_features(5, 50, dtype=dtype, device=device), random_importance(5, 50, device=device)
    mask = torch.rand(5, 50, generator=torch.Generator().manual_seed(3)).to(device) > 0.5
    mask[2] = False
    mask[3] = False
    mask[3, [4, 9]] = True
    mask[4] = True
    picks = lvtp.id_selection(x, s, 40, mask=mask)
    assert shortfall(picks, x, s, mask=mask) <= TOLERANCE
    for image in range(5):
        real = mask[image].nonzero()[:, 0]
        count = min(40, len(real))
        assert (picks[image, count:] == -1).all()
        if count > 0:  # as if the padding were not there
            alone = lvtp.id_selection(x[image, real][None], s[image, real][None], count)
            assert torch.equal(picks[image, :count], real[alone[0]])
    for value in (torch.nan, torch.inf, 99.0, -99.0):  # what padding holds does not matter, to the scaling either
        x[~mask] = value
        s[~mask] = value
        assert torch.equal(lvtp.id_selection(x, s, 40, mask=mask), picks)


def test_views(backend, device, dtype, hostile):
    x, s = clustered_features(3, 33, 17, dtype=dtype, device=device), random_importance(3, 33, device=device)
    mask = torch.arange(33, device=device).expand(3, 33) % 4 > 0
    wanted = lvtp.id_selection(x, s, 20, mask=mask)
    assert torch.equal(lvtp.id_selection(hostile(x), hostile(s), 20, mask=hostile(mask)), wanted)


@pytest.mark.large
def test_batch_equals_single(backend, device):
    x, s = clustered_features(3, 129, device=device), random_importance(3, 129, device=device)
    single = torch.cat([lvtp.id_selection(a[None], b[None], 30) for a, b in zip(x, s, strict=True)])
    assert torch.equal(lvtp.id_selection(x, s, 30), single)


@pytest.mark.large
def test_repeats_itself(backend, device):
    x, s = clustered_features(2, 300, device=device), random_importance(2, 300, device=device)
    assert torch.equal(lvtp.id_selection(x, s, 300), lvtp.id_selection(x, s, 300))


def test_backends_agree(device):
    x, s = clustered_features(4, 577, device=device), random_importance(4, 577, device=device)
    with lvtp.use_backend("reference"):
        wanted = lvtp.id_selection(x, s, 64)
    assert torch.equal(lvtp.id_selection(x, s, 64), wanted)


@pytest.mark.large
def test_autocast_changes_nothing(backend, device):
    x, s = clustered_features(2, 129, device=device), random_importance(2, 129, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        picks = lvtp.id_selection(x, s, 64)
    assert torch.equal(picks, lvtp.id_selection(x, s, 64))


def test_inputs_that_require_grad(backend, device):
    x, s = clustered_features(1, 20, device=device), random_importance(1, 20, device=device)
    picks = lvtp.id_selection(x.clone().requires_grad_(), s.clone().requires_grad_(), 5)
    assert not picks.requires_grad
    assert torch.equal(picks, lvtp.id_selection(x, s, 5))


def test_empty_batch(backend, device, dtype):
    picks = lvtp.id_selection(torch.empty(0, 5, 8, dtype=dtype, device=device), torch.empty(0, 5, device=device), 3)
    assert picks.shape == (0, 3)
    assert picks.dtype == torch.int64
