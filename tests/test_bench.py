"""The baselines compute what the operators do, and the benchmarks' own tools do what their reports say."""

import sys
from pathlib import Path

import pytest
import torch

import lvtp

sys.path.append(str(Path(__file__).parents[1]))  # bench/ is not installed

from bench import baselines
from bench.shapes import Shape, arguments

SHAPE = Shape("small", 2, 200, 64, 32)


@pytest.mark.parametrize("name", ["cosine_similarity", "mean_similarity"])
def test_a_similarity_baseline_is_the_operator(name):
    args = arguments(name, SHAPE, torch.float32, "cpu")
    torch.testing.assert_close(getattr(baselines, name)(*args), getattr(lvtp, name)(*args), rtol=0, atol=1e-5)


@pytest.mark.parametrize("baseline", [baselines.id_selection, baselines.published_id_selection])
def test_an_id_selection_baseline_makes_the_same_picks(baseline):
    """All of them: no two of these tokens are as good as each other to within a rounding."""
    args = arguments("id_selection", SHAPE, torch.float32, "cpu")
    assert baseline(*args).tolist() == lvtp.id_selection(*args).tolist()


@pytest.mark.parametrize("n", [1, 16, 64])
def test_the_published_prune_sid_makes_the_same_picks_from_exact_vectors(n):
    features, importance, _ = arguments("prune_sid", SHAPE, torch.float32, "cpu")
    picks = baselines.published_prune_sid(features, importance, n, vectors=baselines.exact_vectors)
    assert picks.tolist() == lvtp.prune_sid(features, importance, n).tolist()


def test_the_randomised_prune_sid_makes_valid_picks_that_depend_on_the_seed():
    features, importance, n = arguments("prune_sid", SHAPE, torch.float32, "cpu")
    found = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(3):
            torch.manual_seed(seed)
            found.append(baselines.published_prune_sid(features, importance, n))
    for picks in found:
        assert picks.shape == (2, n)
        assert (picks.diff(dim=1) > 0).all()
        assert picks.min() >= 0
        assert picks.max() < 200
    assert not torch.equal(found[0], found[1]) or not torch.equal(found[0], found[2])


def test_quality_measures_what_it_says():
    quality = pytest.importorskip("bench.quality", reason="needs the bench extra", exc_type=ImportError)
    sim = torch.tensor([[1.0, 0.5, -0.2], [0.5, 1.0, 0.0], [-0.2, 0.0, 1.0]])
    found = quality.measures(torch.tensor([0, 1]), sim, torch.tensor([1.0, 2.0, 1.0]))
    assert found == pytest.approx({"coverage": 2 / 3, "worst": 0.0, "redundancy": 0.5, "importance": 0.75})
    assert quality.farthest_point(sim, torch.tensor([1.0, 0.0, 0.0]), 3).tolist() == [0, 2, 1]
    for k in quality.BUDGETS:
        picks = quality.grid(k)
        assert len(picks.unique()) == k
        assert 0 <= picks.min() <= picks.max() < 576
