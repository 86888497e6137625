"""What holds for any input at all, on random calls (problems.py) by the verdicts of the oracle (verdicts.py).

The number of examples is the profile's (see conftest.py): LVTP_HYPOTHESIS_EXAMPLES=10000 looks much harder, and so does
`python -m bench.soak`, on larger calls, with every backend on each.
"""

import pytest
import torch
import verdicts
from conftest import BACKENDS, DEVICES
from hypothesis import given
from hypothesis import strategies as st
from problems import random_call

import lvtp

pytestmark = [pytest.mark.parametrize("backend", BACKENDS), pytest.mark.parametrize("device", DEVICES)]
RANDOM = st.randoms(use_true_random=False)  # hypothesis decides what it draws, and finds the simplest that fails
GREEDY = ("greedy_suppression", "id_selection")


@pytest.mark.parametrize("op", [op for op in lvtp.ops.OPS if op not in GREEDY])
@given(random=RANDOM)
def test_follows_the_definition(backend, device, op, random):
    args, buffers = random_call(random, op).on(device)
    before = [buffer.clone() for buffer in buffers]
    with lvtp.use_backend(backend):
        result = getattr(lvtp, op)(*args)
        again = getattr(lvtp, op)(*args)
        getattr(verdicts, op)(result, *args)
    torch.testing.assert_close(result, again, rtol=0, atol=0)
    torch.testing.assert_close(buffers, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", GREEDY)
@given(random=RANDOM)
def test_follows_the_definition_for_any_prefix_and_batch(backend, device, op, random):
    (first, second, k, gamma, mask), _ = random_call(random, op).on(device)
    n = first.shape[1]
    with lvtp.use_backend(backend):
        everything = getattr(lvtp, op)(first, second, n, gamma, mask)
        getattr(verdicts, op)(everything, first, second, n, gamma, mask)
        assert torch.equal(getattr(lvtp, op)(first, second, k, gamma, mask), everything[:, :k])
        for i in range(len(first)):
            one = slice(i, i + 1)
            args = first[one], second[one], n, gamma, None if mask is None else mask[one]
            alone = getattr(lvtp, op)(*args)
            if op == "greedy_suppression":  # no similarity to round
                assert torch.equal(alone, everything[one])
            getattr(verdicts, op)(alone, *args)
