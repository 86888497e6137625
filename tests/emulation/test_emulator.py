"""What the emulator itself promises (simt.h), shown on the small kernels of probes.cu."""

import os
import subprocess
import sys

import pytest
import torch

from . import build, kernels


def probe(name):
    out = torch.zeros(192, dtype=torch.int32)
    kernels.module().probe(name, out.data_ptr())
    return out.tolist()


def results_under_seeds(name, seeds=8):
    found = set()
    for seed in range(seeds):
        kernels.module().set_seed(seed)
        found.add(tuple(probe(name)))
    return found


def test_every_thread_of_every_block_runs_once(seed):
    assert probe("indices") == [t % 64 for t in range(192)]


def test_a_barrier_makes_shared_memory_visible(seed):
    assert probe("reversed")[:64] == list(range(63, -1, -1))


def test_a_missing_barrier_is_a_different_result_under_every_seed():
    found = results_under_seeds("missing_barrier")
    assert len(found) == 8
    assert tuple(range(63, -1, -1)) not in {result[:64] for result in found}


def test_a_barrier_can_be_removed_by_name():
    module = kernels.module()
    module.set_seed(0)
    probe("reversed")
    (site,) = [site for site in module.barriers() if site[0] == "probes.cu" and site[1] < 25]
    module.remove_barrier(*site)
    try:
        assert probe("reversed")[:64] != list(range(63, -1, -1))
    finally:
        module.remove_barrier("", 0)
    assert probe("reversed")[:64] == list(range(63, -1, -1))


@pytest.mark.skipif(build.ASAN, reason="AddressSanitizer's build does not poison static shared memory")
def test_static_shared_memory_is_poisoned_before_each_block(seed):
    assert 1 not in probe("stale_shared")


def test_dynamic_shared_memory_is_poisoned_before_each_block(seed):
    assert 1 not in probe("stale_dynamic")


def test_shuffles_votes_and_reductions(seed):
    assert probe("warp_operations")[:64] == [10] * 64


def test_votes_of_a_block(seed):
    assert probe("votes_of_a_block")[:64] == [1] * 64


def test_atomics(seed):
    count, highest, first, *_ = probe("atomics")
    assert (count, highest) == (128, 63)
    assert 1 <= first <= 64


def test_asynchronous_copies_arrive_when_they_are_waited_for_and_not_before(seed):
    assert probe("copies")[:64] == [1] * 64


def test_tensor_core_fragments_are_laid_out_as_ptx_says(seed):
    assert probe("tensor_cores")[:64] == [0] * 64


@pytest.mark.skipif(build.ASAN, reason="AddressSanitizer's build shares static memory between the blocks of a cluster")
def test_the_blocks_of_a_cluster_reach_each_others_shared_memory(seed):
    ring = [1, 2, 3, 0, 5, 6, 7, 4]
    assert probe("cluster_neighbours")[:16] == [v for block in ring for v in (block, 100 + block)]


def test_teams_of_blocks_wait_for_each_other(seed):
    assert probe("teams")[4:8] == [4, 4, 8, 8]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("some_threads_skip_a_barrier", r"deadlock: block \(0, 0, 0\): 1 threads, the first of them \(7, 0, 0\), have "
                                        r"exited; 63 threads, .* wait in __syncthreads at probes\.cu:\d+"),
        ("two_barriers_at_once", r"block .*, thread .*: __syncthreads at probes\.cu:\d+ meets threads of its block in "
                                 r"__syncthreads at probes\.cu:\d+"),
        ("a_lane_does_not_come", r"names a lane that has exited|1 threads, the first of them \(3, 0, 0\), have exited"),
        ("masks_differ", r"names a lane that waits, with a mask of its own, in __shfl_sync at probes\.cu:\d+"),
        ("misaligned_copy", r"cp_async at probes\.cu:\d+ is misaligned"),
        ("reads_an_unnamed_lane", r"__shfl_sync at probes\.cu:\d+ reads a lane that its mask does not name"),
        ("barrier_against_shuffle", r"deadlock: .*16 threads.*__shfl_sync at .*16 threads.*__syncthreads at"),
        ("teams_of_lone_blocks", r"deadlock: block \(0, 0, 0\): 64 threads, .* wait in team_barrier at probes\.cu"),
        ("half_a_cluster_waits", r"deadlock: block \(1, 0, 0\): 32 threads, .* wait in cluster barrier at probes\.cu"),
    ],
)  # fmt: skip
def test_a_wait_that_cannot_end_is_an_error_that_says_who_waits_where(seed, name, said):
    with pytest.raises(RuntimeError, match=said):
        probe(name)
    assert probe("reversed")[:64] == list(range(63, -1, -1))  # and the next launch is none the worse for it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stand_ins_are_torchs(dtype):
    name = "half" if dtype == torch.float16 else "bfloat16"
    widen, narrow = getattr(kernels.module(), f"from_{name}"), getattr(kernels.module(), f"to_{name}")
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    ours = torch.tensor([widen(bits) for bits in range(2**16)])
    assert torch.equal(ours.nan_to_num(nan=0.5), every.float().nan_to_num(nan=0.5))
    floats = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-10, 6, 4000)
    ties = (every[:0x7000:7].float() + every[1:0x7001:7].float()) / 2
    for values in (floats, ties[ties.isfinite()]):
        rounded = torch.tensor([widen(narrow(v)) for v in values.tolist()])
        assert torch.equal(rounded, values.to(dtype).float())


@pytest.mark.skipif(build.ASAN, reason="is the run under AddressSanitizer")
def test_address_sanitizer_sees_a_write_past_shared_memory_and_passes_the_kernels():
    """The same tests, those that are quick, in a process with AddressSanitizer."""
    env = {
        **os.environ,
        "LVTP_EMULATION_ASAN": "1",
        "LD_PRELOAD": build.asan_runtime(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    }
    chosen = "seed1 and (barrier or warp or votes or sizes or clusters) and not 57"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", build.HERE, "-k", chosen]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=build.ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    script = "from emulation.test_emulator import probe; probe('past_the_end')"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=build.HERE.parent)
    assert "AddressSanitizer: global-buffer-overflow" in done.stderr
    assert "probes.cu" in done.stderr
