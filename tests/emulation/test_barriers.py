"""Every barrier is needed, and the tests would notice its absence: each is removed in turn, by file and line."""

import re

import pytest
import torch
from conftest import clustered_features, random_importance

import lvtp

from . import kernels
from .build import ROOT

BARRIER = re.compile(r"^(?!\s*//).*\b(__syncthreads|__syncwarp|cluster_barrier)\w*\(")
SEEDS = 6


def barriers_in_the_sources():
    return [
        (path.name, number)
        for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BARRIER.match(line)
    ]


def work():
    """A little of everything that waits, in shapes with several warps and several steps."""
    x, scores = clustered_features(1, 95, 40), random_importance(1, 95)
    sim, labels = lvtp.cosine_similarity(x), torch.arange(95)[None] % 3
    wide = clustered_features(1, 4100, 5)
    wide_scores = random_importance(1, 4100)
    return {
        "cosine_similarity": lambda: (kernels.cosine_similarity(x) * 1e4).round(),
        "mean_similarity": lambda: (kernels.mean_similarity(x) * 1e4).round(),
        "greedy_suppression": lambda: kernels.greedy_suppression(scores * 95, sim, 20),
        "cluster_nms": lambda: kernels.cluster_nms(scores, labels, sim, 0.5),
        "id_selection": lambda: kernels.id_selection(x, scores * 50 - 3, 20),
        "id_selection, by rows": lambda: kernels.id_selection(wide, wide_scores, 3),
    }


@pytest.fixture(scope="module")
def expected():
    kernels.module().set_seed(0)
    return {name: run() for name, run in work().items()}


def first_failure(expected):
    """The operator and seed whose result differs, or that ends in an error."""
    for seed in range(SEEDS):
        kernels.module().set_seed(seed)
        for name, run in work().items():
            try:
                same = torch.equal(run(), expected[name])
            except RuntimeError as error:
                return f"seed {seed}, {name}: {error}"
            if not same:
                return f"seed {seed}, {name}: another result"
    return None


def test_the_work_reaches_every_barrier(expected):
    reached = {site for site in kernels.module().barriers() if site[0] != "probes.cu"}
    assert sorted(reached) == barriers_in_the_sources()


def test_with_all_barriers_in_place_every_seed_gives_the_same(expected):
    assert first_failure(expected) is None


@pytest.mark.parametrize("site", barriers_in_the_sources(), ids=lambda site: f"{site[0]}:{site[1]}")
def test_a_removed_barrier_is_noticed(expected, site):
    kernels.module().remove_barrier(*site)
    try:
        noticed = first_failure(expected)
    finally:
        kernels.module().remove_barrier("", 0)
    print(f"{site[0]}:{site[1]} removed: {noticed}")
    assert noticed is not None
