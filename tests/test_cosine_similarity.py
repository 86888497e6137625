import oracle
import pytest
import torch
from conftest import clustered_features
from torch.testing import assert_close

import lvtp


@pytest.mark.parametrize("n", [1, 2, 31, 33, 577])
def test_equals_the_oracle(backend, device, dtype, n):
    x = clustered_features(2, n, 48, seed=n, dtype=dtype, device=device)
    sim = lvtp.cosine_similarity(x)
    assert sim.dtype == torch.float32
    assert sim.device == x.device
    wanted = torch.stack([torch.from_numpy(oracle.similarity(image)) for image in oracle.as_float64(x)])
    assert_close(sim.cpu().double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.large
def test_accumulates_many_features_in_fp32(backend, device):
    x = clustered_features(1, 33, 3584, dtype=torch.float16, device=device)
    wanted = torch.from_numpy(oracle.similarity(oracle.as_float64(x)[0]))
    assert_close(lvtp.cosine_similarity(x)[0].cpu().double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_or_zero_resembles_nothing(backend, device, dtype, bad):
    x = clustered_features(2, 9, 16, dtype=dtype, device=device)
    wanted = lvtp.cosine_similarity(x)
    x[0, 3, 5] = bad
    x[1, 7] = 0
    for image, token in ((0, 3), (1, 7)):
        wanted[image, token] = 0
        wanted[image, :, token] = 0
    assert_close(lvtp.cosine_similarity(x), wanted, rtol=0, atol=1e-6)
    assert (lvtp.cosine_similarity(x)[0, 3] == 0).all()
    assert (lvtp.cosine_similarity(x)[1, :, 7] == 0).all()


@pytest.mark.parametrize("d", [1, 3, 8, 12, 33, pytest.param(513, marks=pytest.mark.large)])
def test_rows_of_any_length(backend, device, dtype, d):
    x = clustered_features(2, 70, d, seed=d, dtype=dtype, device=device)
    wanted = torch.stack([torch.from_numpy(oracle.similarity(image)) for image in oracle.as_float64(x)])
    assert_close(lvtp.cosine_similarity(x).cpu().double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-35])
def test_length_does_not_matter_in_bfloat16(backend, device, scale):
    x = clustered_features(1, 100, 32, dtype=torch.bfloat16, device=device)
    assert_close(lvtp.cosine_similarity(x * scale), lvtp.cosine_similarity(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e30, 1e36, 1e-9])
def test_length_does_not_matter(backend, device, scale):
    x = clustered_features(1, 20, 32, device=device)
    assert_close(lvtp.cosine_similarity(x * scale), lvtp.cosine_similarity(x), rtol=0, atol=1e-5)


def test_below_the_norm_floor_similarity_fades(backend, device):
    x = torch.zeros(1, 2, 4, device=device)
    x[0, :, 0] = torch.tensor([1.0, 1e-13])
    assert_close(lvtp.cosine_similarity(x)[0].cpu(), torch.tensor([[1.0, 0.1], [0.1, 0.01]]))


def test_views(backend, device, dtype, hostile):
    x = clustered_features(2, 33, 17, dtype=dtype, device=device)
    assert_close(lvtp.cosine_similarity(hostile(x)), lvtp.cosine_similarity(x), rtol=0, atol=1e-6)


def test_batch_equals_single(backend, device):
    x = clustered_features(3, 65, 24, device=device)
    single = torch.cat([lvtp.cosine_similarity(image[None]) for image in x])
    assert_close(lvtp.cosine_similarity(x), single, rtol=0, atol=1e-6)


@pytest.mark.large
def test_repeats_itself(backend, device):
    x = clustered_features(2, 100, device=device)
    assert torch.equal(lvtp.cosine_similarity(x), lvtp.cosine_similarity(x))


def test_empty_batch(backend, device, dtype):
    assert lvtp.cosine_similarity(torch.empty(0, 5, 8, dtype=dtype, device=device)).shape == (0, 5, 5)


def test_autocast_does_not_round(backend, device):
    x = clustered_features(1, 33, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        sim = lvtp.cosine_similarity(x)
    assert_close(sim, lvtp.cosine_similarity(x), rtol=0, atol=1e-6)


def test_reference_has_the_gradient_of_the_definition(device):
    x = clustered_features(2, 6, 5, device=device).requires_grad_()
    weight = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0)).to(device)
    (lvtp.reference.cosine_similarity(x) * weight).sum().backward()
    y = x.detach().double().requires_grad_()
    unit = y / y.norm(dim=-1, keepdim=True)
    (unit @ unit.mT * weight).sum().backward()
    assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)


def test_reference_gradient_skips_tokens_that_are_not_finite(device):
    x = clustered_features(1, 6, 5, device=device)
    x[0, 2, 1] = torch.nan
    x.requires_grad_()
    lvtp.reference.cosine_similarity(x).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[0, 2] == 0).all()
