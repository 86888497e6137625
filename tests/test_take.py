"""lvtp.take: the tokens that a selector chose, zeros where it gave -1."""

import numpy as np
import pytest
import torch
from test_torch import DTYPES, example, inputs

import lvtp

D = 16
PADDED = torch.tensor([[3, 0, -1, 3], [-1, -1, -1, -1]])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_tokens_in_the_order_of_keep_and_zeros_for_minus_one(device, dtype, index):
    x = (torch.randn(2, 24, D, generator=torch.Generator().manual_seed(0)) * 8).to(device, dtype)
    tokens, valid = lvtp.take(x, PADDED.to(device, index))
    assert (tokens.dtype, valid.dtype) == (dtype, torch.bool)
    assert torch.equal(tokens[0], torch.stack((x[0, 3], x[0, 0], torch.zeros_like(x[0, 0]), x[0, 3])))
    assert torch.equal(tokens[1], torch.zeros_like(tokens[1]))
    assert torch.equal(valid.cpu(), PADDED >= 0)


def test_padding_stays_out_whatever_it_holds(device):
    x, importance = (t.to(device) for t in inputs(2, 24))
    mask = torch.arange(24, device=device) >= torch.tensor([[20], [0]], device=device)
    x = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    for keep in (lvtp.id_selection(x, importance, 8, mask=mask), lvtp.prune_sid(x, importance, 8, mask=mask)):
        tokens, valid = lvtp.take(x, keep)
        assert valid.sum(1).tolist() == [4, 8]
        (gradient,) = torch.autograd.grad(tokens.square().sum(), x)
        taken = torch.zeros_like(mask).scatter(1, keep.clamp_min(0), True) & mask
        assert torch.equal(gradient, torch.where(taken[..., None], 2 * x, 0))


def test_the_gradient_is_the_derivative():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lvtp.take(x, PADDED)[0], x, check_forward_ad=True)


def test_one_compiled_graph_for_every_shape():
    torch._dynamo.reset()

    def chosen(x, s, mask):
        return lvtp.take(x, lvtp.id_selection(x, s, 5, mask=mask))

    compiled = torch.compile(chosen, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for b, n in ((2, 24), (3, 24), (5, 33)):
            x, s, *_ = example("id_selection", b=b, n=n)
            mask = torch.arange(n) >= n - 3
            for got, want in zip(compiled(x, s, mask.expand(b, n)), chosen(x, s, mask.expand(b, n)), strict=True):
                assert torch.equal(got, want)


def test_no_value_is_looked_at():
    tokens, valid = lvtp.take(torch.empty(2, 24, D, device="meta"), PADDED.to("meta"))
    assert (tokens.shape, valid.shape) == ((2, 4, D), (2, 4))


def test_an_empty_batch_and_no_token_kept():
    assert lvtp.take(torch.ones(0, 24, D), torch.ones(0, 5, dtype=torch.long))[0].shape == (0, 5, D)
    assert lvtp.take(torch.ones(2, 24, D), torch.ones(2, 0, dtype=torch.long))[1].shape == (2, 0)


def test_arrays_are_answered_in_kind():
    x, keep = inputs(2, 24)[0], PADDED
    for features, picks in ((x.numpy(), keep.numpy()), (x.numpy(), keep), (x, keep.numpy())):
        tokens, valid = lvtp.take(features, picks)
        assert type(tokens) is type(valid) is type(features)
        assert np.array_equal(tokens, lvtp.take(x, keep)[0])
        assert np.array_equal(valid, keep >= 0)


@pytest.mark.parametrize(
    ("argument", "change", "takes", "got"),
    [
        ("features", lambda x, keep: (x[0], keep), "[B, N, D]", "[24, 16]"),
        ("keep", lambda x, keep: (x, keep[0]), "[B, k]", "[4]"),
        ("keep", lambda x, keep: (x, keep[..., None]), "[B, k]", "[2, 4, 1]"),
        ("keep", lambda x, keep: (x, keep.float()), "int64", "float32"),
        ("keep", lambda x, keep: (x, keep > 0), "int64", "bool"),
        ("keep", lambda x, keep: (x, keep[:1]), "2 images", "[1, 4]"),
        ("keep", lambda x, keep: (x, keep.to("meta")), "on cpu", "meta"),
        ("keep", lambda x, keep: (x, keep.to_sparse()), "a dense tensor", "sparse_coo"),
    ],
)
def test_bad_arguments_are_named(argument, change, takes, got):
    with pytest.raises(RuntimeError) as error:
        lvtp.take(*change(torch.ones(2, 24, D), PADDED))
    said_takes, said_got = str(error.value).splitlines()[0].rsplit(", got ", 1)
    assert said_takes.startswith(f"take: {argument} must be ")
    assert takes in said_takes
    assert got in said_got


@pytest.mark.parametrize("index", [-2, 24])
def test_an_index_out_of_range_is_an_error_of_gather(index):
    with pytest.raises((RuntimeError, IndexError), match=f"index {index} is out of bounds"):
        lvtp.take(torch.ones(2, 24, D), PADDED.masked_fill(PADDED == 3, index))
