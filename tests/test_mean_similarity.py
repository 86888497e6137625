import oracle
import pytest
import torch
from conftest import clustered_features
from torch.testing import assert_close

import lvtp


def wanted(x, mask=None):
    masks = [None] * len(x) if mask is None else mask.cpu().numpy()
    pairs = zip(oracle.as_float64(x), masks, strict=True)
    return torch.tensor([oracle.mean_similarity(image, m) for image, m in pairs], dtype=torch.float32)


@pytest.mark.parametrize("n", [1, 2, 31, 577, 2881])
def test_equals_the_average_over_pairs(backend, device, dtype, n):
    x = clustered_features(2, n, 32, seed=n, dtype=dtype, device=device)
    rho = lvtp.mean_similarity(x)
    assert rho.dtype == torch.float32
    assert rho.device == x.device
    assert_close(rho.cpu(), wanted(x), rtol=0, atol=1e-6)


def test_range(backend, device):
    same = torch.ones(1, 50, 8, device=device)
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], device=device)
    apart = torch.eye(8, device=device)[None]
    for x, rho in ((same, 1.0), (opposite, -1.0), (apart, 0.0)):
        assert_close(lvtp.mean_similarity(x).cpu(), torch.tensor([rho]), rtol=0, atol=1e-6)


def test_mask(backend, device):
    x = clustered_features(4, 40, device=device)
    mask = torch.rand(4, 40, generator=torch.Generator().manual_seed(0)).to(device) > 0.4
    mask[2] = False
    mask[3] = False
    mask[3, 7] = True
    rho = lvtp.mean_similarity(x, mask)
    assert_close(rho.cpu(), wanted(x, mask), rtol=0, atol=1e-6)
    assert rho[2] == 0
    assert rho[3] == 0
    x[~mask] = torch.nan
    assert torch.equal(lvtp.mean_similarity(x, mask), rho)


def test_tokens_without_direction_count_with_similarity_zero(backend, device):
    x = torch.ones(3, 4, 8, device=device)
    x[0, 1] = 0
    x[1, 2, 3] = torch.nan
    x[2, 3, 0] = torch.inf
    # Six of the twelve ordered pairs are between tokens that are alike.
    assert_close(lvtp.mean_similarity(x).cpu(), torch.full((3,), 0.5))


def test_huge_features(backend, device):
    x = clustered_features(2, 33, device=device)
    assert_close(lvtp.mean_similarity(x * 1e30), lvtp.mean_similarity(x), rtol=0, atol=1e-6)


def test_views(backend, device, dtype, hostile):
    x = clustered_features(3, 33, 17, dtype=dtype, device=device)
    mask = torch.arange(33, device=device).expand(3, 33) % 3 > 0
    assert_close(lvtp.mean_similarity(hostile(x), hostile(mask)), lvtp.mean_similarity(x, mask), rtol=0, atol=1e-6)


def test_batch_equals_single(backend, device):
    x = clustered_features(3, 65, device=device)
    single = torch.cat([lvtp.mean_similarity(image[None]) for image in x])
    assert_close(lvtp.mean_similarity(x), single, rtol=0, atol=1e-6)


def test_empty_batch(backend, device):
    assert lvtp.mean_similarity(torch.empty(0, 5, 8, device=device)).shape == (0,)


def test_reference_has_the_gradient_of_the_definition(device):
    x = clustered_features(2, 6, 5, device=device).requires_grad_()
    lvtp.reference.mean_similarity(x).sum().backward()
    y = x.detach().double().requires_grad_()
    unit = y / y.norm(dim=-1, keepdim=True)
    ((unit @ unit.mT).sum((1, 2)) - 6).div(30).sum().backward()
    assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-6)
