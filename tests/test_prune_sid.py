import oracle
import pytest
import torch
from conftest import clustered_features, photograph_features, random_importance

import lvtp

# A comparison closer than this may be decided by rounding in fp32; inputs are chosen so that none is.
MARGIN = 1e-6


def problem(b, tokens, n, seed=0, dtype=torch.float32, device="cpu"):
    x, s = (
        clustered_features(b, tokens, seed=seed, dtype=dtype, device=device),
        random_importance(b, tokens, seed, device),
    )
    groups = max(1, min(n // 4, tokens))
    labels = torch.randint(groups, (b, tokens), generator=torch.Generator().manual_seed(seed)).to(device)
    return x, s, labels


def wanted(x, s, labels, n, reserved=0, mask=None):
    masks = [None] * len(x) if mask is None else mask.cpu().numpy()
    images = zip(oracle.as_float64(x), oracle.as_float64(s), labels.cpu().numpy(), masks, strict=True)
    answers = [oracle.prune_sid(a, b, c, n, reserved, m) for a, b, c, m in images]
    assert min(margin for _, margin in answers) > MARGIN, "choose another seed"
    return [picks for picks, _ in answers]


def assert_is_a_selection(picks, b, tokens, n, reserved=0, mask=None):
    """Exactly min(n - reserved, real tokens) different real tokens in ascending order, then -1."""
    assert picks.shape == (b, min(n - reserved, tokens))
    assert picks.dtype == torch.int64
    for image, row in enumerate(picks.tolist()):
        real = set(range(tokens) if mask is None else mask[image].nonzero()[:, 0].tolist())
        count = min(n - reserved, len(real))
        assert row[count:] == [-1] * (len(row) - count)
        assert row[:count] == sorted(set(row[:count]))
        assert set(row[:count]) <= real


SIZES = [
    (576, 64, 0),
    (576, 64, 1),
    (576, 192, 1),
    (577, 33, 2),
    (33, 5, 1),
    (31, 31, 0),
    (40, 64, 0),
    (2, 4, 1),
    (1, 1, 0),
]


@pytest.mark.parametrize(("tokens", "n", "reserved"), SIZES)
def test_equals_the_oracle_for_given_groups(backend, device, dtype, tokens, n, reserved):
    x, s, labels = problem(2, tokens, n, tokens + n, dtype, device)
    picks = lvtp.prune_sid(x, s, n, reserved, labels=labels)
    assert_is_a_selection(picks, 2, tokens, n, reserved)
    assert picks.tolist() == wanted(x, s, labels, n, reserved)


@pytest.mark.large
def test_equals_the_oracle_on_many_tokens(backend, device):
    x, s, labels = problem(1, 2881, 128, device=device)
    assert lvtp.prune_sid(x, s, 128, labels=labels).tolist() == wanted(x, s, labels, 128)


@pytest.mark.large
@pytest.mark.parametrize("groups_used", [1, 2, 15, 16])
def test_equals_the_oracle_for_unequal_groups(backend, device, groups_used):
    x, s, labels = problem(2, 300, 64, device=device)
    labels = (labels.float() / 16).pow(3).mul(groups_used).long()  # most tokens in the first, some groups empty
    assert lvtp.prune_sid(x, s, 64, 1, labels=labels).tolist() == wanted(x, s, labels, 64, 1)


@pytest.mark.large
@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_equals_the_oracle_where_little_is_kept(backend, device, noise):
    x, s, labels = problem(2, 300, 24, device=device)
    x = clustered_features(2, 300, noise=noise, clusters=3, device=device)
    assert lvtp.prune_sid(x, s, 24, labels=labels).tolist() == wanted(x, s, labels, 24)


@pytest.mark.large
@pytest.mark.parametrize("reserved", [0, 1, 30, 47, 48, 49, 50, 60, 62, 63])
def test_equals_the_oracle_however_much_is_reserved(backend, device, reserved):
    x, s, labels = problem(2, 300, 64, device=device)
    assert lvtp.prune_sid(x, s, 64, reserved, labels=labels).tolist() == wanted(x, s, labels, 64, reserved)


@pytest.mark.large
@pytest.mark.parametrize("kept", [0, 1, 3, 20])
def test_equals_the_oracle_with_zeros_in_the_importance(backend, device, kept):
    x, s, labels = problem(2, 200, 32, device=device)
    s[:, torch.randperm(200, generator=torch.Generator().manual_seed(0))[kept:].to(device)] = 0
    picks = lvtp.prune_sid(x, s, 32, 1, labels=labels)
    assert_is_a_selection(picks, 2, 200, 32, 1)
    assert picks.tolist() == wanted(x, s, labels, 32, 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -1.0])
def test_equals_the_oracle_with_odd_importance(backend, device, value):
    x, s, labels = problem(2, 100, 32, device=device)
    s[0, ::3] = value
    s[1] = value
    assert lvtp.prune_sid(x, s, 32, 1, labels=labels).tolist() == wanted(x, s, labels, 32, 1)


def test_a_token_without_a_score_is_used_last(backend, device):
    x, s, labels = problem(1, 20, 19, device=device)
    s[0, 7] = torch.nan
    s[0, 8] = -torch.inf
    picks = lvtp.prune_sid(x, s, 19, labels=torch.zeros_like(labels))
    assert picks.tolist() == [[i for i in range(20) if i != 7]]
    picks = lvtp.prune_sid(x, s, 18, labels=torch.zeros_like(labels))
    assert picks.tolist() == [[i for i in range(20) if i not in (7, 8)]]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 32, 33, 64])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_ties_go_to_the_lowest_index(backend, device, n, value):
    """Tokens and scores all equal, one group: the first n."""
    x, s = torch.ones(2, 65, 64, device=device), torch.full((2, 65), value, device=device)
    picks = lvtp.prune_sid(x, s, n, labels=torch.zeros(2, 65, dtype=torch.int64, device=device))
    assert torch.equal(picks, torch.arange(n, device=device).expand(2, n))


@pytest.mark.parametrize("seed", [1, 2, 3, 5, 8, 13])
def test_nothing_is_suppressed_from_a_threshold_of_one_up(backend, device, seed):
    # One direction, many lengths: rho is 1 and for n = 32 so is tau, while rounding makes some similarities larger.
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(1, 1, 64, generator=g) * torch.rand(1, 64, 1, generator=g)).to(device)
    s, labels = torch.rand(1, 64, generator=g).to(device), torch.zeros(1, 64, dtype=torch.int64, device=device)
    assert lvtp.mean_similarity(x) == 1
    assert lvtp.reference.cosine_similarity(x).max() > 1
    assert torch.equal(lvtp.prune_sid(x, s, 32, labels=labels), s.topk(32).indices.sort().values)


def test_tokens_that_cannot_be_kept_are_used_by_score(backend, device):
    x, s, labels = problem(2, 60, 12, device=device)
    s = -10 * s.argsort(1).float() - 1
    picks = lvtp.prune_sid(x, s, 12, labels=torch.zeros_like(labels))
    assert torch.equal(picks, s.topk(12).indices.sort().values)


@pytest.mark.large
@pytest.mark.parametrize("center", ["feature", "token"])
@pytest.mark.parametrize("use_importance", [True, False])
@pytest.mark.parametrize("n", [4, 32, 64, 192])
def test_groups_and_scores_come_from_psca(backend, device, n, center, use_importance):
    x, s = clustered_features(2, 200, seed=n, device=device), random_importance(2, 200, n, device)
    labels, loadings = lvtp.psca(x, n // 4, center)
    given = lvtp.prune_sid(x, s if use_importance else loadings, n, 1, labels=labels)
    picks = lvtp.prune_sid(x, s if use_importance else None, n, 1, center)
    assert torch.equal(picks, given)


INVARIANTS = [(n, tokens) for tokens in (1, 2, 5, 31) for n in (1, 2, 3, 4, 5, 7, 30, 31, 33, 1000)] + [
    (577, 576), (576, 577), (576, 576), (63, 65), (101, 577)
]  # fmt: skip
FEW = [(2, 1), (5, 31), (33, 31)]  # for Triton's interpreter
INVARIANTS = FEW + [pytest.param(*pair, marks=pytest.mark.large) for pair in INVARIANTS if pair not in FEW]


@pytest.mark.parametrize(("n", "tokens"), INVARIANTS)
def test_always_exactly_the_budget(backend, device, n, tokens):
    x, s = clustered_features(2, tokens, 16, device=device), random_importance(2, tokens, device=device)
    for reserved in {0, min(1, n - 1), n // 2, n - 1}:
        assert_is_a_selection(lvtp.prune_sid(x, s, n, reserved), 2, tokens, n, reserved)
    assert_is_a_selection(lvtp.prune_sid(x, None, n), 2, tokens, n)
    s[:, ::2] = 0
    s[1] = 0
    assert_is_a_selection(lvtp.prune_sid(x, s, n, center="token"), 2, tokens, n)


@pytest.mark.large
def test_a_budget_beyond_reason_takes_everything(backend, device):
    x, s = clustered_features(2, 10, device=device), random_importance(2, 10, device=device)
    assert torch.equal(lvtp.prune_sid(x, s, 2**40), torch.arange(10, device=device).expand(2, 10))


@pytest.mark.large
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_features_without_direction(backend, device, dtype, bad):
    x, s = clustered_features(2, 60, dtype=dtype, device=device), random_importance(2, 60, device=device)
    x[0, ::4] = bad
    x[1] = bad
    for importance in (s, None):
        for center in ("feature", "token"):
            assert_is_a_selection(lvtp.prune_sid(x, importance, 24, 1, center), 2, 60, 24, 1)
    labels = torch.zeros(2, 60, dtype=torch.int64, device=device)
    labels[:, ::3] = 5
    assert lvtp.prune_sid(x, s, 24, 1, labels=labels).tolist() == wanted(x, s, labels, 24, 1)


@pytest.mark.large
def test_huge_features(backend, device):
    x, s, labels = problem(2, 65, 24, device=device)
    assert torch.equal(lvtp.prune_sid(x * 1e30, s, 24, labels=labels), lvtp.prune_sid(x, s, 24, labels=labels))
    assert_is_a_selection(lvtp.prune_sid(x * 1e30, s, 24), 2, 65, 24)


@pytest.mark.large
def test_mask(backend, device, dtype):
    x, s, labels = problem(5, 80, 32, dtype=dtype, device=device)
    mask = torch.rand(5, 80, generator=torch.Generator().manual_seed(3)).to(device) > 0.4
    mask[2] = False
    mask[3] = False
    mask[3, [4, 9]] = True
    mask[4] = True
    picks = lvtp.prune_sid(x, s, 32, 1, labels=labels, mask=mask)
    assert_is_a_selection(picks, 5, 80, 32, 1, mask)
    assert picks.tolist() == wanted(x, s, labels, 32, 1, mask)
    by_psca = lvtp.prune_sid(x, s, 32, 1, mask=mask)
    by_loading = lvtp.prune_sid(x, None, 32, 1, "token", mask=mask)
    for image in (0, 1, 4):  # as if the padding were not there
        real = mask[image].nonzero()[:, 0]
        alone = lvtp.prune_sid(x[image, real][None], s[image, real][None], 32, 1)
        assert torch.equal(by_psca[image], real[alone[0]])
        alone = lvtp.prune_sid(x[image, real][None], None, 32, 1, "token")
        assert torch.equal(by_loading[image], real[alone[0]])
    for value in (torch.nan, torch.inf, 99.0):  # what padding holds does not matter
        x[~mask] = value
        s[~mask] = value
        labels[~mask] = -1
        assert torch.equal(lvtp.prune_sid(x, s, 32, 1, labels=labels, mask=mask), picks)
        assert torch.equal(lvtp.prune_sid(x, s, 32, 1, mask=mask), by_psca)
        assert torch.equal(lvtp.prune_sid(x, None, 32, 1, "token", mask=mask), by_loading)


@pytest.mark.large
@pytest.mark.parametrize("importance_dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_importance_of_every_floating_dtype(backend, device, importance_dtype):
    x, s, labels = problem(2, 60, 24, device=device)
    s = s.to(importance_dtype)
    assert torch.equal(lvtp.prune_sid(x, s, 24, labels=labels), lvtp.prune_sid(x, s.float(), 24, labels=labels))


@pytest.mark.large
def test_views(backend, device, dtype, hostile):
    x, s, labels = problem(3, 65, 24, dtype=dtype, device=device)
    mask = torch.arange(65, device=device).expand(3, 65) % 4 > 0
    given = lvtp.prune_sid(hostile(x), hostile(s), 24, labels=hostile(labels), mask=hostile(mask))
    assert torch.equal(given, lvtp.prune_sid(x, s, 24, labels=labels, mask=mask))
    found = lvtp.prune_sid(hostile(x), hostile(s), 24, mask=hostile(mask))
    assert torch.equal(found, lvtp.prune_sid(x, s, 24, mask=mask))


@pytest.mark.large
def test_batch_equals_single(backend, device):
    x, s = clustered_features(3, 129, device=device), random_importance(3, 129, device=device)
    single = torch.cat([lvtp.prune_sid(a[None], b[None], 32, 1) for a, b in zip(x, s, strict=True)])
    assert torch.equal(lvtp.prune_sid(x, s, 32, 1), single)


@pytest.mark.large
def test_repeats_itself(backend, device):
    x, s = clustered_features(2, 300, device=device), random_importance(2, 300, device=device)
    assert torch.equal(lvtp.prune_sid(x, s, 64), lvtp.prune_sid(x, s, 64))


@pytest.mark.parametrize("n", [16, 64, 192])
def test_backends_agree_on_a_photograph(device, n):
    x, s = photograph_features().to(device), random_importance(1, 576, device=device)
    for importance in (s, None):
        with lvtp.use_backend("reference"):
            reference = set(lvtp.prune_sid(x, importance, n)[0].tolist())
        picks = set(lvtp.prune_sid(x, importance, n)[0].tolist())
        assert len(picks & reference) >= 0.97 * len(picks | reference)


@pytest.mark.large
def test_autocast_changes_nothing(backend, device):
    x, s = clustered_features(2, 129, device=device), random_importance(2, 129, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        picks = lvtp.prune_sid(x, s, 32)
    assert torch.equal(picks, lvtp.prune_sid(x, s, 32))


@pytest.mark.large
def test_inputs_that_require_grad(backend, device):
    x, s = clustered_features(1, 40, device=device), random_importance(1, 40, device=device)
    for importance in (s, None):
        picks = lvtp.prune_sid(x.clone().requires_grad_(), importance, 8)
        assert not picks.requires_grad
        assert torch.equal(picks, lvtp.prune_sid(x, importance, 8))


def test_empty_batch(backend, device, dtype):
    x, s = torch.empty(0, 5, 8, dtype=dtype, device=device), torch.empty(0, 5, device=device)
    for picks in (
        lvtp.prune_sid(x, s, 4, 1),
        lvtp.prune_sid(x, None, 4, 1),
        lvtp.prune_sid(x, s, 4, 1, labels=s.long()),
    ):
        assert picks.shape == (0, 3)
        assert picks.dtype == torch.int64


@pytest.mark.parametrize("n", [2**62, 2**63 - 40, 2**63 - 1])
def test_a_budget_beyond_any_number_of_tokens(backend, device, n):
    x, s, labels = problem(2, 9, 64, device=device)
    everything = torch.arange(9, device=device).expand(2, 9)
    assert torch.equal(lvtp.prune_sid(x, s, n, labels=labels % 2), everything)
    assert torch.equal(lvtp.prune_sid(x, s, n, n - 9, labels=labels % 2), everything)
