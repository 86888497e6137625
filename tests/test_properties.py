"""What holds for any input at all, on random ones: odd shapes, ties, NaN and Inf, padding, strides, every dtype.

Exact where the definition leaves nothing to rounding, by replay or with a margin where it does. The number of examples
is the profile's (see conftest.py): LVTP_HYPOTHESIS_EXAMPLES=10000 looks much harder.
"""

import math

import oracle
import pytest
import torch
from conftest import BACKENDS, DEVICES, DTYPES, VIEWS
from hypothesis import given
from hypothesis import strategies as st

import lvtp

pytestmark = [pytest.mark.parametrize("backend", BACKENDS), pytest.mark.parametrize("device", DEVICES)]

SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0)


def sprinkle(draw, t, g, rows=False):
    """Replace some elements, or something in some tokens, by a special value."""
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=2)):
        where = torch.rand(t.shape[:2] if rows else t.shape, generator=g) < 0.2
        if rows and value != 0:
            t[..., -1][where] = value
        else:
            t[where] = value
    return t


@st.composite
def scores_strategy(draw, b, n, g):
    """[B, N]: distinct, with many ties, all alike or of many magnitudes; some of them special."""
    kind = draw(st.sampled_from(["distinct", "ties", "alike", "magnitudes"]))
    s = torch.randn(b, n, generator=g)
    if kind == "ties":
        s = (2 * s).round()
    elif kind == "alike":
        s = s[:, :1].repeat(1, n)
    elif kind == "magnitudes":
        s = s.sign() * (4 * s).exp()
    return sprinkle(draw, s if draw(st.booleans()) else s.abs(), g)


@st.composite
def features_strategy(draw, b, n, d, g):
    """[B, N, D]: unrelated, near or exact copies of a few, or all alike; at any scale, in any dtype, some special."""
    kind = draw(st.sampled_from(["unrelated", "near", "copies", "alike"]))
    x = torch.randn(b, n, d, generator=g)
    if kind == "alike":
        x = x[:, :1].repeat(1, n, 1)
    elif kind != "unrelated":
        x = x[:, torch.randint(min(n, 3), (n,), generator=g)] + (0.1 * x if kind == "near" else 0)
    x = sprinkle(draw, x * draw(st.sampled_from([1.0, 1.0, 1e-3, 1e3, 1e30])), g, rows=True)
    return x.to(draw(st.sampled_from(DTYPES)))


@st.composite
def problems(draw):
    """Features, scores, labels and mask of one batch, each in memory of any layout."""
    b, n, d = draw(st.integers(0, 3)), draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 3, 8, 17, 64]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(b, n, generator=g) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    budget = draw(st.integers(1, 2 * n + 3))
    used = draw(st.integers(1, max(1, min(budget // 4, n))))  # groups
    return {
        "features": draw(features_strategy(b, n, d, g)),
        "scores": draw(scores_strategy(b, n, g)),
        "labels": torch.randint(used, (b, n), generator=g),
        "mask": mask,
        "k": draw(st.integers(1, n)),
        "n": budget,
        "reserved": draw(st.integers(0, budget - 1)),
        "center": draw(st.sampled_from(["feature", "token"])),
        "gamma": draw(st.sampled_from([0.0, 0.1, 1.0, 20.0, 20.0, 1e3])),
        "view": VIEWS[draw(st.sampled_from(list(VIEWS)))] if draw(st.booleans()) else lambda t: (t, t),
    }  # fmt: skip


def arguments(problem, device, *names):
    """Those of the problem's values, its tensors laid out as it says and on the device."""
    values = (problem[name] for name in names)
    return [problem["view"](v.to(device))[0] if torch.is_tensor(v) else v for v in values]


def images(problem, *tensors):
    """One image at a time, in float64, with its mask."""
    masks = [None] * len(problem["scores"]) if problem["mask"] is None else problem["mask"].numpy()
    return zip(*(oracle.as_float64(t) for t in tensors), masks, strict=True)


def assert_real_and_unique(picks, problem, places):
    b, n = problem["scores"].shape
    assert picks.shape == (b, places)
    assert picks.dtype == torch.int64
    for image, row in enumerate(picks.tolist()):
        real = range(n) if problem["mask"] is None else problem["mask"][image].nonzero()[:, 0].tolist()
        count = min(places, len(real))
        assert row[count:] == [-1] * (places - count)
        assert len(set(row[:count])) == count
        assert set(row[:count]) <= set(real)


@given(problems())
def test_similarity(backend, device, problem):
    x, mask = arguments(problem, device, "features", "mask")
    with lvtp.use_backend(backend):
        sim, rho = lvtp.cosine_similarity(x), lvtp.mean_similarity(x, mask)
        assert torch.equal(sim, lvtp.cosine_similarity(x))
    assert sim.dtype == rho.dtype == torch.float32
    for image, (values, real) in enumerate(images(problem, x)):
        assert abs(sim[image].cpu().double().numpy() - oracle.similarity(values)).max() < 2e-6
        assert abs(float(rho[image]) - oracle.mean_similarity(values, real)) < 2e-6


@given(problems(), st.sampled_from([torch.float32, torch.float64]))
def test_greedy_suppression(backend, device, problem, dtype):
    # Any matrix will do: not symmetric, nothing on the diagonal, beyond [-1, 1], not finite.
    g = torch.Generator().manual_seed(problem["k"])
    b, n = problem["scores"].shape
    problem["similarity"] = 1 - torch.randn(b, n, n, generator=g).abs()
    problem["similarity"][torch.rand(b, n, n, generator=g) < 0.05] = SPECIAL[problem["n"] % 4]
    scores, sim, k, gamma, mask = arguments(problem, device, "scores", "similarity", "k", "gamma", "mask")
    with lvtp.use_backend(backend):
        everything = lvtp.greedy_suppression(scores, sim, n, gamma, mask)
        assert torch.equal(lvtp.greedy_suppression(scores.to(dtype), sim.to(dtype), k, gamma, mask), everything[:, :k])
        for i in range(b):
            one = slice(i, i + 1)
            alone = lvtp.greedy_suppression(scores[one], sim[one], n, gamma, None if mask is None else mask[one])
            assert torch.equal(alone, everything[one])
    assert_real_and_unique(everything, problem, n)
    for picks, (s, r, real) in zip(everything.tolist(), images(problem, scores, sim), strict=True):
        assert oracle.replay(picks, s, r, gamma, real) <= 2e-5


@given(problems(), st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.875, 1.0, math.inf, math.nan]), st.booleans())
def test_cluster_nms(backend, device, problem, tau, per_image):
    g = torch.Generator().manual_seed(problem["k"])
    b, n = problem["scores"].shape
    problem["similarity"] = torch.randint(-8, 9, (b, n, n), generator=g) / 8  # often equal to tau
    problem["similarity"][torch.rand(b, n, n, generator=g) < 0.05] = SPECIAL[problem["n"] % 4]
    scores, labels, sim, mask = arguments(problem, device, "scores", "labels", "similarity", "mask")
    threshold = torch.full((b,), tau, device=device) if per_image else tau
    with lvtp.use_backend(backend):
        kept = lvtp.cluster_nms(scores, labels, sim, threshold, mask)
    assert kept.shape == (b, n)
    assert kept.dtype == torch.bool
    for image, (s, group, r, real) in enumerate(images(problem, scores, labels, sim)):
        assert kept[image].tolist() == oracle.nms(s, group, r, tau, real)[0].tolist()


@given(problems())
def test_id_selection(backend, device, problem):
    x, s, k, gamma, mask = arguments(problem, device, "features", "scores", "k", "gamma", "mask")
    n = s.shape[1]
    with lvtp.use_backend(backend):
        everything = lvtp.id_selection(x, s, n, gamma, mask)
        assert torch.equal(lvtp.id_selection(x, s, n, gamma, mask), everything)
        assert torch.equal(lvtp.id_selection(x, s, k, gamma, mask), everything[:, :k])
        alone = [
            lvtp.id_selection(x[i : i + 1], s[i : i + 1], n, gamma, None if mask is None else mask[i : i + 1])
            for i in range(len(x))
        ]
    assert_real_and_unique(everything, problem, n)
    # A rounding of the similarity, 1e-7 or so, weighs more the steeper exp(-gamma d^2) is.
    tolerance = 2e-5 * (1 + math.sqrt(gamma) / 10)
    for image, (values, importance, real) in enumerate(images(problem, x, s)):
        scaled, sim = oracle.scale_importance(importance, real), oracle.similarity(values)
        for picks in (everything[image], alone[image][0]):
            assert oracle.replay(picks.tolist(), scaled, sim, gamma, real) <= tolerance


@given(problems())
def test_psca(backend, device, problem):
    x, n, center = arguments(problem, device, "features", "n", "center")
    groups = min(n, x.shape[1])
    with lvtp.use_backend(backend):
        labels, loadings = lvtp.psca(x, groups, center)
        again = lvtp.psca(x, groups, center)
    assert torch.equal(labels, again[0])
    assert torch.equal(loadings, again[1])
    assert labels.shape == loadings.shape == x.shape[:2]
    assert labels.dtype == torch.int64
    assert loadings.dtype == torch.float32
    assert ((labels >= 0) & (labels < groups)).all()
    assert ((loadings >= 0) & (loadings <= 1 + 1e-5)).all()
    unusable = ~x.float().isfinite().all(-1)
    assert (labels[unusable] == 0).all()
    assert (loadings[unusable] == 0).all()


@given(problems())
def test_prune_sid_with_given_groups(backend, device, problem):
    x, s, n, reserved, labels, mask = arguments(
        problem, device, "features", "scores", "n", "reserved", "labels", "mask"
    )
    with lvtp.use_backend(backend):
        picks = lvtp.prune_sid(x, s, n, reserved, labels=labels, mask=mask)
    assert_real_and_unique(picks, problem, min(n - reserved, s.shape[1]))
    for row, (values, scores, group, real) in zip(picks.tolist(), images(problem, x, s, labels), strict=True):
        wanted, margin = oracle.prune_sid(values, scores, group, n, reserved, real)
        assert row == wanted or margin < 1e-6  # a comparison with tau that rounding may decide


@given(problems(), st.booleans())
def test_prune_sid(backend, device, problem, use_importance):
    x, s, n, reserved, center, mask = arguments(
        problem, device, "features", "scores", "n", "reserved", "center", "mask"
    )
    importance = s if use_importance else None
    with lvtp.use_backend(backend):
        picks = lvtp.prune_sid(x, importance, n, reserved, center, None, mask)
        assert torch.equal(lvtp.prune_sid(x, importance, n, reserved, center, None, mask), picks)
    assert_real_and_unique(picks, problem, min(n - reserved, s.shape[1]))
    for row in picks.tolist():
        found = [i for i in row if i >= 0]
        assert found == sorted(found)


@given(problems(), st.data())
def test_dynamic_budget(backend, device, problem, data):
    (x,) = arguments(problem, device, "features")
    b, n = x.shape[:2]
    minimum = data.draw(st.integers(0, n), label="minimum")
    total = data.draw(st.integers(b * minimum, b * n), label="total")
    with lvtp.use_backend(backend):
        budget = lvtp.dynamic_budget(x, total, minimum)
        assert torch.equal(lvtp.dynamic_budget(x, total, minimum), budget)
    assert budget.shape == (b,)
    assert budget.dtype == torch.int64
    assert int(budget.sum()) == total
    assert ((budget >= minimum) & (budget <= n)).all()
