import oracle
import pytest
import torch
import verdicts
from conftest import clustered_features, photograph_features
from torch.testing import assert_close

import lvtp
from lvtp.reference import centred_sigmoid


def agreement(x, groups, center):
    """The smallest share, over the images, of tokens grouped as by a float64 eigendecomposition."""
    labels, loadings = lvtp.psca(x, groups, center)
    shares = []
    for image, values in enumerate(oracle.as_float64(x)):
        wanted, wanted_loadings = oracle.psca(values, groups, center)
        same = labels[image].cpu().numpy() == wanted
        shares.append(float(same.mean()))
        assert abs(loadings[image].cpu().numpy() - wanted_loadings)[same].max(initial=0.0) < 5e-3
    return min(shares)


@pytest.mark.parametrize("center", ["feature", "token"])
@pytest.mark.parametrize("groups", [4, 8, 16, 32, 48])
def test_groups_like_float64_on_clustered_features(backend, device, groups, center):
    x = clustered_features(2, 576, 128, seed=groups, clusters=24, device=device)
    assert agreement(x, groups, center) >= 0.99


@pytest.mark.parametrize("center", ["feature", "token"])
@pytest.mark.parametrize("groups", [4, 16, 48, 100, 144])
def test_groups_like_float64_on_a_photograph(backend, device, groups, center):
    assert agreement(photograph_features().to(device), groups, center) >= 0.99


@pytest.mark.large
@pytest.mark.parametrize("gap", [1e-3, 2e-4])
def test_neighbouring_eigenvalues_are_told_apart(backend, device, gap):
    """The third and fourth of eight eigenvalues are a small gap apart: no vector is a mixture of both."""
    g = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(2000, 8, 8, generator=g, dtype=torch.float64))
    # Features without a mean, so that centring leaves the matrix as it is made.
    columns = torch.cat([torch.ones(2000, 16, 1), torch.randn(2000, 16, 8, generator=g)], 2).double()
    r = torch.linalg.qr(columns)[0][:, :, 1:]
    values = torch.tensor([1.0, 0.86, 0.7, 0.7, 0.5, 0.36, 0.22, 0.1], dtype=torch.float64)
    values = values + 0.04 * (torch.rand(2000, 8, generator=g, dtype=torch.float64) - 0.5)
    values[:, 3] = values[:, 2] - gap
    m = q @ torch.diag_embed(values.sqrt()) @ r.mT
    x = torch.logit(0.5 + m * (0.4 / m.abs().amax((1, 2), keepdim=True))).float()
    a, _ = centred_sigmoid(x, "feature", None)
    wanted = torch.linalg.eigh(a @ a.mT)[1].abs().amax(2)
    loadings = lvtp.psca(x.to(device), 8)[1].cpu()
    assert (loadings - wanted).abs().max() < 0.02


@pytest.mark.parametrize("shift", [-25, -30, -60])
@pytest.mark.parametrize("n", [64, 400])
def test_tiny_sigmoids(backend, device, n, shift):
    """Squares of squares of exp(-30) leave fp32."""
    x = clustered_features(1, n, 128, device=device) + shift
    assert agreement(x, 4, "feature") >= 0.99


def test_below_the_smallest_sigmoid_features_are_alike(backend, device):
    """exp(-95) is no normal float32; whether it is one at all must not make groups."""
    x = -95 - clustered_features(1, 12, 4, device=device).abs()
    labels, loadings = lvtp.psca(x, 3)
    assert not labels.any()
    assert not loadings.any()


def test_an_eigenvalue_at_zero(backend, device):
    """Of two tokens about their mean the second component is zero, which bisection tries first."""
    g = torch.Generator().manual_seed(0)
    _, loadings = lvtp.psca(torch.randn(9, 2, 17, generator=g).to(device), 2, "token")
    assert_close(loadings.cpu(), torch.full((9, 2), 0.5**0.5), rtol=0, atol=1e-4)


@pytest.mark.large
@pytest.mark.parametrize(("n", "d", "groups"), [(40, 17, 5), (200, 64, 16), (500, 128, 50)])
def test_more_groups_than_components(backend, device, n, d, groups):
    """Tokens of one value throughout, so one component: what rounding leaves beside it takes no token from it."""
    g = torch.Generator().manual_seed(n)
    x = (0.01 * torch.randn(2, n, 1, generator=g)).repeat(1, 1, d).to(device)
    x[:, n // 2] = 3
    verdicts.psca(lvtp.psca(x, groups, "token"), x, groups, "token")


@pytest.mark.parametrize("center", ["feature", "token"])
@pytest.mark.parametrize(("n", "d", "groups"), [(3, 1, 2), (40, 3, 39), (70, 24, 13), (100, 24, 24), (100, 24, 60)])
def test_more_tokens_than_features(backend, device, n, d, groups, center):
    """The components are found by way of the features: as exactly, and groups beyond their number stay empty."""
    x = clustered_features(2, n, d, seed=n, device=device)
    components = d - (center == "feature")  # rows without a mean have one dimension less
    labels, loadings = lvtp.psca(x, groups, center)
    assert labels.max() < max(1, min(groups, components))
    verdicts.psca((labels, loadings), x, groups, center)
    if components:
        assert agreement(x, min(groups, components), center) == 1
        assert torch.equal(labels, lvtp.psca(x, min(groups, components), center)[0])


@pytest.mark.parametrize("n", [31, 33, 575, 577])
def test_odd_sizes(backend, device, dtype, n):
    x = clustered_features(1, n, seed=n, dtype=dtype, device=device)
    labels, loadings = lvtp.psca(x, 8)
    assert labels.shape == loadings.shape == (1, n)
    assert labels.dtype == torch.int64
    assert loadings.dtype == torch.float32
    assert labels.device == loadings.device == x.device
    assert agreement(x, 8, "feature") >= 0.99


def test_many_tokens(device):
    x = clustered_features(1, 2881, device=device)
    assert agreement(x, 16, "feature") >= 0.99


@pytest.mark.parametrize("center", ["feature", "token"])
def test_by_hand(backend, device, center):
    # Tokens 0 to 2 vary together, more than 3 and 4 do, and the two patterns have nothing in common.
    one, two = torch.tensor([3.0, -3, 0, 0]), torch.tensor([0.0, 0, 1, -1])
    x = torch.stack([one, -one, one, two, -two, -one])[None].to(device)
    labels, loadings = lvtp.psca(x, 2, center)
    assert labels.tolist() == [[0, 0, 0, 1, 1, 0]]
    assert_close(loadings[0].cpu(), torch.tensor([0.5, 0.5, 0.5, 0.5**0.5, 0.5**0.5, 0.5]))


def test_loadings_are_absolute_and_columns_have_length_one(backend, device):
    x = clustered_features(2, 65, device=device)
    labels, loadings = lvtp.psca(x, 1)
    assert (labels == 0).all()
    assert (loadings >= 0).all()
    assert_close(loadings.square().sum(1).cpu(), torch.ones(2))


@pytest.mark.parametrize("center", ["feature", "token"])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_as_many_groups_as_tokens(backend, device, n, center):
    labels, loadings = lvtp.psca(clustered_features(2, n, device=device), n, center)
    assert ((labels >= 0) & (labels < n)).all()
    assert ((loadings >= 0) & (loadings <= 1 + 1e-6)).all()


@pytest.mark.large
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, -2.5, 1e30, -1e30])
@pytest.mark.parametrize("d", [1, 4, 7, 588])
def test_nothing_is_left_once_centred(backend, device, value, d):
    """Constant tokens, or tokens all alike, are rows of exact zeros, whatever the roundings on the way: group 0."""
    constant = clustered_features(1, 12, d, device=device)
    constant[0, 3:5] = value
    for x, center, rows in (
        (constant, "feature", slice(3, 5)),
        (torch.full((1, 12, d), value, device=device), "feature", slice(None)),
        (torch.full((1, 12, d), value, device=device), "token", slice(None)),
        (clustered_features(1, 1, d, device=device).expand(1, 12, d), "token", slice(None)),
    ):
        labels, loadings = lvtp.psca(x, 3, center)
        assert (labels[0, rows] == 0).all()
        assert (loadings[0, rows] == 0).all()


@pytest.mark.large
@pytest.mark.parametrize("center", ["feature", "token"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_tokens_that_are_not_finite_have_no_part(backend, device, center, bad):
    x = clustered_features(1, 40, device=device)
    wrong = torch.zeros(40, dtype=torch.bool, device=device)
    wrong[::7] = True
    wanted_labels, wanted_loadings = lvtp.psca(x[:, ~wrong], 4, center)
    x[0, wrong, 3] = bad
    labels, loadings = lvtp.psca(x, 4, center)
    assert (labels[0, wrong] == 0).all()
    assert (loadings[0, wrong] == 0).all()
    assert torch.equal(labels[:, ~wrong], wanted_labels)
    assert_close(loadings[:, ~wrong], wanted_loadings, rtol=0, atol=1e-3)


@pytest.mark.parametrize("center", ["feature", "token"])
def test_no_token_is_finite(backend, device, center):
    labels, loadings = lvtp.psca(torch.full((1, 6, 4), torch.nan, device=device), 3, center)
    assert (labels == 0).all()
    assert (loadings == 0).all()


@pytest.mark.large
@pytest.mark.parametrize("d", [2, 8, 64])
def test_tokens_all_alike_beside_tokens_without_a_part(backend, device, d):
    """A blank image: the Gram matrix has rank one, on which an eigensolver in fp32 may give NaN or not converge."""
    g = torch.Generator().manual_seed(d)
    for n in range(2, 61):
        blank = torch.rand(n, generator=g) < 0.5
        blank[0] = False
        x = torch.randn(1, 1, d, generator=g).repeat(1, n, 1)
        x[0, blank] = torch.nan
        labels, loadings = lvtp.psca(x.to(device), 1)
        assert (labels == 0).all()
        alike = (~blank / (~blank).sum() ** 0.5)[None]  # of length 1, equal in every token that counts
        assert_close(loadings.cpu(), alike, rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", [8342, 15121, 18131])
def test_few_different_tokens(backend, device, seed):
    """Three Gram matrices on which LAPACK's eigensolver does not converge, in float64 either, as they are."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 2, generator=g)[:, torch.randint(4, (64,), generator=g)]
    x[0, torch.rand(64, generator=g) < 0.9] = torch.nan
    _, loadings = lvtp.psca(x.to(device), 1, "token")
    _, wanted = oracle.psca(oracle.as_float64(x)[0], 1, "token")
    assert_close(loadings[0].cpu().double(), torch.from_numpy(wanted), rtol=0, atol=1e-4)


@pytest.mark.large
def test_huge_features(backend, device):
    labels, loadings = lvtp.psca(clustered_features(1, 33, device=device) * 1e30, 3)
    assert ((labels >= 0) & (labels < 3)).all()
    assert loadings.isfinite().all()


@pytest.mark.large
def test_views(backend, device, dtype, hostile):
    x = clustered_features(2, 33, 17, dtype=dtype, device=device)
    labels, loadings = lvtp.psca(hostile(x), 4)
    wanted_labels, wanted_loadings = lvtp.psca(x, 4)
    assert torch.equal(labels, wanted_labels)
    assert_close(loadings, wanted_loadings, rtol=0, atol=1e-4)


@pytest.mark.large
def test_batch_equals_single(backend, device):
    x = clustered_features(3, 65, device=device)
    labels, loadings = lvtp.psca(x, 6)
    for image in range(3):
        single_labels, single_loadings = lvtp.psca(x[image][None], 6)
        assert torch.equal(labels[image], single_labels[0])
        assert_close(loadings[image], single_loadings[0], rtol=0, atol=1e-4)


@pytest.mark.large
def test_repeats_itself(backend, device):
    x = clustered_features(2, 200, device=device)
    for a, b in zip(lvtp.psca(x, 16), lvtp.psca(x, 16), strict=True):
        assert torch.equal(a, b)


@pytest.mark.large
def test_autocast_changes_nothing(backend, device):
    x = clustered_features(1, 65, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        labels, loadings = lvtp.psca(x, 6)
    assert torch.equal(labels, lvtp.psca(x, 6)[0])
    assert loadings.dtype == torch.float32


def test_empty_batch(backend, device, dtype):
    labels, loadings = lvtp.psca(torch.empty(0, 5, 8, dtype=dtype, device=device), 3)
    assert labels.shape == loadings.shape == (0, 5)


@pytest.mark.large
@pytest.mark.parametrize("center", ["feature", "token"])
@pytest.mark.parametrize("groups", [64, 144])
def test_many_groups(backend, device, groups, center):
    """Trailing components lie close together: arithmetic in fp32 would mix them."""
    assert agreement(clustered_features(1, 576, 1024, device=device), groups, center) >= 0.99
