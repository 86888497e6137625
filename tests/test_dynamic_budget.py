import numpy as np
import pytest
import torch
from conftest import clustered_features, photograph_features
from verdicts import dynamic_budget as check

import lvtp


def images(b, tokens, seed=0, device="cpu"):
    """From nearly uniform to nearly unrelated tokens."""
    x = [clustered_features(1, tokens, seed=seed + i, clusters=1 + 2 * i, noise=0.05 + 0.1 * i) for i in range(b)]
    return torch.cat(x).to(device)


@pytest.mark.parametrize("total", [5, 6, 31, 100, 320, 499, 500])
def test_follows_the_shares(backend, device, total):
    x = images(5, 100, device=device)
    check(lvtp.dynamic_budget(x, total), x, total)


@pytest.mark.large
@pytest.mark.parametrize("minimum", [0, 1, 7, 100])
def test_minimum(backend, device, minimum):
    x = images(5, 100, device=device)
    for total in {5 * minimum, min(5 * minimum + 1, 500), 500}:
        check(lvtp.dynamic_budget(x, total, minimum), x, total, minimum)


@pytest.mark.large
@pytest.mark.parametrize("b", [1, 2, 33, 64])
@pytest.mark.parametrize("tokens", [1, 2, 31])
def test_every_total(backend, device, b, tokens):
    x = images(b, tokens, device=device)
    for total in sorted({b, b + 1, b * tokens // 2 + b, b * tokens - 1, b * tokens}):
        if b <= total <= b * tokens:
            check(lvtp.dynamic_budget(x, total), x, total)


@pytest.mark.large
def test_proportional_where_no_bound_is_reached(backend, device):
    x = images(4, 576, device=device)
    budget = lvtp.dynamic_budget(x, 512)
    phi = 1 - lvtp.mean_similarity(x).double()
    assert ((budget - 512 * phi / phi.sum()).abs() < 1).all()
    assert budget[0] < budget[1] < budget[2] < budget[3]


def test_largest_remainder(backend, device):
    apart = torch.eye(4)  # phi = 1
    half = torch.tensor([[1.0, 0, 0, 0]]).expand(4, 4).clone()
    half[3] = 0  # 6 of the 12 ordered pairs are alike: phi = 1/2
    x = torch.stack([apart, apart, half]).to(device)
    assert lvtp.dynamic_budget(x, 6).tolist() == [3, 2, 1]  # 2.4, 2.4, 1.2
    assert lvtp.dynamic_budget(x.flip(0), 6).tolist() == [1, 3, 2]
    assert lvtp.dynamic_budget(x, 10).tolist() == [4, 4, 2]
    assert lvtp.dynamic_budget(x, 11).tolist() == [4, 4, 3]  # the first two are full


@pytest.mark.parametrize("total", [3, 10, 11, 29, 30])
def test_uniform_images_share_equally(backend, device, total):
    budget = lvtp.dynamic_budget(torch.ones(3, 10, 64, device=device), total)
    assert budget.tolist() == sorted(budget.tolist(), reverse=True)
    assert budget.max() - budget.min() <= 1
    assert budget.sum() == total


def test_a_uniform_image_takes_only_what_no_other_can(backend, device):
    x = torch.stack([torch.eye(8), torch.ones(8, 8), torch.eye(8), torch.ones(8, 8)]).to(device)
    assert lvtp.dynamic_budget(x, 10).tolist() == [4, 1, 4, 1]
    assert lvtp.dynamic_budget(x, 18).tolist() == [8, 1, 8, 1]
    assert lvtp.dynamic_budget(x, 21).tolist() == [8, 3, 8, 2]
    assert lvtp.dynamic_budget(x, 32).tolist() == [8, 8, 8, 8]
    assert lvtp.dynamic_budget(x, 3, 0).tolist() == [2, 0, 1, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_features_without_direction(backend, device, dtype, bad):
    x = images(4, 20, device=device).to(dtype)
    x[1, ::2] = bad
    x[2] = bad
    check(lvtp.dynamic_budget(x, 40), x, 40)


@pytest.mark.large
def test_a_photograph_against_a_blank_page(backend, device):
    x = torch.cat([photograph_features(), torch.ones(1, 576, 588)]).to(device)
    assert lvtp.dynamic_budget(x, 128).tolist() == [127, 1]


@pytest.mark.large
def test_views(backend, device, dtype, hostile):
    x = images(4, 33, device=device).to(dtype)
    assert torch.equal(lvtp.dynamic_budget(hostile(x), 50), lvtp.dynamic_budget(x, 50))


def test_repeats_itself(backend, device):
    x = images(16, 50, device=device)
    assert torch.equal(lvtp.dynamic_budget(x, 333), lvtp.dynamic_budget(x, 333))


def test_empty_batch(backend, device):
    budget = lvtp.dynamic_budget(torch.empty(0, 5, 8, device=device), 0)
    assert budget.shape == (0,)
    assert budget.dtype == torch.int64


# ---------------------------------------------------------------------------------------------- lvtp.Budget, its shares


@pytest.mark.parametrize("total", [5, 33, 100, 499, 500])
def test_a_budget_of_equal_images_is_the_operator(total):
    x = images(5, 100)
    assert lvtp.Budget(total).share(list(x)) == lvtp.dynamic_budget(x, total).tolist()


@pytest.mark.parametrize("total", [3, 40, 90, 150])
def test_a_budget_of_images_of_several_sizes(total):
    """Proportional to phi, whatever the sizes; what a full one cannot take goes to the others."""
    x = [images(3, 100)[i, :tokens] for i, tokens in enumerate((100, 40, 15))]
    given = lvtp.Budget(total).share(x)
    assert sum(given) == total
    phi = [1 - lvtp.mean_similarity(image[None]).item() for image in x]
    open_ = [i for i in range(3) if 1 < given[i] < len(x[i])]
    scale = [given[i] / phi[i] for i in open_]
    for i, one in zip(open_, scale, strict=True):
        assert all(abs(phi[i] * (one - other)) <= 2 for other in scale)
    assert all(1 <= tokens <= len(image) for tokens, image in zip(given, x, strict=True))
    assert lvtp.Budget(1000).share(x) == [100, 40, 15]


def test_a_static_budget_looks_at_no_features():
    x = [torch.full((tokens, 0), float("nan")) for tokens in (100, 4, 50)]
    assert lvtp.Budget(30, dynamic=False).share(x) == [13, 4, 13]


def test_a_budget_of_numpys_integer_under_another_default_device():
    x = list(images(3, 10))
    want = lvtp.Budget(20).share(x)
    with torch.device("meta"):
        assert lvtp.Budget(np.int64(20)).share(x) == want
        assert lvtp.Budget(20, dynamic=False).share(x) == [7, 7, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": 0}, "total must be an int of at least 1, got 0"),
        ({"total": 2.5}, "total must be an integer, got 2.5"),
        ({"total": True}, "total must be an integer, got True"),
        ({"total": 3, "dynamic": "yes"}, "dynamic must be True or False, got 'yes'"),
    ],
    ids=str,
)
def test_budgets_are_checked(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lvtp.Budget(**arguments)
    with pytest.raises(ValueError, match="total must be at least 1 for each of the 3 images"):
        lvtp.Budget(2).share(list(images(3, 10)))
