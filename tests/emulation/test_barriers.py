"""Every barrier and every wait for copies is needed: each is removed in turn, by file and line, and a test notices."""

import faulthandler
import os
import re
import signal

import pytest
import torch
from conftest import clustered_features, random_importance

import lvtp

from . import kernels
from .build import ROOT

BARRIER = re.compile(r"^(?!\s*//).*\b((__syncthreads|__syncwarp|team_barrier)\w*\(|cp_async_wait<)")
SEEDS = 3


def barriers_in_the_sources():
    return [
        (path.name, number)
        for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*"))
        if path.name != "ptx.cuh"  # the emulator has its twin
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BARRIER.match(line)
    ]


@pytest.fixture(scope="module")
def work():
    """A little of everything that waits, in shapes with several warps and several steps. Results are compared to the
    last bit, as every sum is in a fixed order."""
    x, scores = clustered_features(1, 95, 40), random_importance(1, 95)
    sim, labels = lvtp.cosine_similarity(x), torch.arange(95)[None] % 3
    wide, wide_scores = clustered_features(1, 350, 5), random_importance(1, 350)  # 5 blocks of two tiles
    many, many_scores = clustered_features(1, 1100, 4), random_importance(1, 1100)
    groups = torch.arange(1100)[None] % 24
    deep = clustered_features(1, 70, 200)  # seven stages, in four buffers
    deep[0, ::9] *= 1e30
    noise = torch.randn(1, 35, 60, generator=torch.Generator().manual_seed(0))  # eigenvalues close to each other
    wide_noise = torch.randn(1, 131, 140, generator=torch.Generator().manual_seed(2))  # blocks wait for each other
    falling = torch.diag(torch.arange(256.0, 0, -1, dtype=torch.float64) ** 3)
    rotated = torch.eye(256, dtype=torch.float64) - 2 / 256  # a reflection: every row takes part
    matrix = (rotated @ falling @ rotated)[None]
    frames = torch.rand(70, 9, 6, generator=torch.Generator().manual_seed(1))
    return {
        "cosine_similarity": lambda: kernels.cosine_similarity(deep),
        "mean_similarity": lambda: kernels.mean_similarity(x),
        "greedy_suppression": lambda: kernels.greedy_suppression(scores * 95, sim, 20),
        "cluster_nms": lambda: kernels.cluster_nms(scores, labels, sim, 0.5),
        "id_selection": lambda: kernels.id_selection(x, scores * 50 - 3, 20),
        "psca": lambda: kernels.psca(noise, 2)[1],
        "eigen": lambda: kernels.psca(noise, 2, "token")[1],
        "tridiagonal": lambda: kernels.psca(wide_noise, 2, "token")[1],
        "subspace": lambda: kernels.leading_eigenvectors(matrix, 2)[0],
        "prune_sid": lambda: kernels.prune_sid(many, many_scores, 99, labels=groups),
        "dynamic_budget": lambda: kernels.dynamic_budget(frames, 300),
        "rounds": lambda: kernels.id_selection_in_rounds(wide, wide_scores, 140),
    }


@pytest.fixture(scope="module")
def expected(work):
    kernels.module().set_seed(0)
    return {name: run() for name, run in work.items()}


def first_failure(work, expected, suspect=""):
    """The operator and seed whose result differs, or that ends in an error; the suspect's own operator goes first."""
    likely_first = sorted(work.items(), key=lambda item: not suspect.startswith(item[0]))
    for seed in range(SEEDS):
        kernels.module().set_seed(seed)
        for name, run in likely_first:
            try:
                same = torch.equal(run(), expected[name])
            except (AssertionError, RuntimeError) as error:
                return f"seed {seed}, {name}: {error}"
            if not same:
                return f"seed {seed}, {name}: another result"
    return None


def in_a_child(function):
    """What the function returns, in a process of its own: without a barrier a kernel may well write anywhere."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the pool's threads are the parent's
        faulthandler.disable()  # a crash is a result here
        signal.alarm(120)
        os.write(write, (function() or "").encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status != -signal.SIGALRM, "the child takes too long"
    return said or (f"the process ends with {signal.Signals(-status).name}" if status < 0 else None)


def test_the_work_reaches_every_barrier(expected):
    reached = {site for site in kernels.module().barriers() if site[0] != "probes.cu"}
    assert sorted(reached) == barriers_in_the_sources()


def test_with_all_barriers_in_place_every_seed_gives_the_same(work, expected):
    assert first_failure(work, expected) is None


@pytest.mark.parametrize("site", barriers_in_the_sources(), ids=lambda site: f"{site[0]}:{site[1]}")
def test_a_removed_barrier_is_noticed(work, expected, site):
    kernels.module().remove_barrier(*site)
    try:
        noticed = in_a_child(lambda: first_failure(work, expected, site[0]))
    finally:
        kernels.module().remove_barrier("", 0)
    print(f"{site[0]}:{site[1]} removed: {noticed}")
    assert noticed is not None
