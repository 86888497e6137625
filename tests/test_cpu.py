"""What only the CPU kernels must hold: every instruction set, any number of threads, two ways to one answer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import clustered_features, photograph_features, random_importance

import lvtp


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability):
    """Loops have a variant for each; torch's own switch chooses, and is read once, so each runs in its own process."""
    script = """
import torch
import lvtp, oracle, test_id_selection as t, test_psca
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for n, d in ((33, 1), (40, 15), (97, 130), (200, 1024)):
        x, s = t.clustered_features(2, n, d, dtype=dtype), t.random_importance(2, n)
        with lvtp.use_backend("native"):
            worst = t.shortfall(lvtp.id_selection(x, s, n // 2), x, s)
            sim, rho = lvtp.cosine_similarity(x), lvtp.mean_similarity(x)
        assert worst <= t.TOLERANCE, (dtype, n, d, worst)
        for image, values in enumerate(oracle.as_float64(x)):
            assert abs(sim[image].numpy() - oracle.similarity(values)).max() < 2e-6, (dtype, n, d)
            assert abs(rho[image].item() - oracle.mean_similarity(values)) < 1e-6, (dtype, n, d)
    for center in ("feature", "token"):
        for groups in (4, 60):  # by iteration, and directly in double
            assert test_psca.agreement(t.clustered_features(1, 336, 400, dtype=dtype), groups, center) >= 0.99
"""
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


CALLS = {
    "cosine_similarity": lambda x, s: lvtp.cosine_similarity(x),
    "mean_similarity": lambda x, s: lvtp.mean_similarity(x),
    "id_selection": lambda x, s: lvtp.id_selection(x, s, 100),
    "psca, few groups": lambda x, s: lvtp.psca(x, 8)[1],
    "psca, many groups": lambda x, s: lvtp.psca(x, 60, "token")[1],
    "prune_sid": lambda x, s: lvtp.prune_sid(x, s, 64),
}


@pytest.mark.parametrize("n", [300, 2100])  # from 2048 tokens on, threads share one image
@pytest.mark.parametrize("name", CALLS)
def test_any_number_of_threads_gives_the_same_bits(name, n):
    x, s = clustered_features(1, n, 700, clusters=60), random_importance(1, n)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(CALLS[name](x, s))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_a_matrix_shared_by_threads():
    """From 1024 rows on, threads share the steps of the tridiagonal form: here of a 1100 x 1100 matrix."""
    x = torch.randn(1, 1100, 1200, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        labels, loadings = lvtp.psca(x, 8)
        torch.set_num_threads(4)
        again, loadings_again = lvtp.psca(x, 8)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(labels, again)
    assert torch.equal(loadings, loadings_again)


def test_iteration_and_the_direct_way_agree():
    """8 groups of a photograph come from block Lanczos iteration, 49 from the tridiagonal form of the same matrix."""
    x = photograph_features()
    labels, loadings = lvtp.psca(x, 8)
    more, more_loadings = lvtp.psca(x, 49)
    first = more < 8  # tokens whose largest loading of all lies on one of the first 8
    assert first.sum() > 20
    assert (labels == more)[first].double().mean() >= 0.99
    torch.testing.assert_close(loadings[first], more_loadings[first], rtol=0, atol=5e-3)


def test_calls_from_several_python_threads():
    import concurrent.futures

    x, s = clustered_features(2, 2100, 64), random_importance(2, 2100)
    wanted = lvtp.id_selection(x, s, 64), lvtp.psca(x, 8)[0]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for picks, labels in pool.map(lambda _: (lvtp.id_selection(x, s, 64), lvtp.psca(x, 8)[0]), range(8)):
            assert torch.equal(picks, wanted[0])
            assert torch.equal(labels, wanted[1])


@pytest.mark.parametrize(("n", "groups"), [(64, 16), (512, 16), (1040, 16)])
def test_equal_eigenvalues_have_vectors_of_their_own(n, groups):
    """Orthogonal patterns, equally strong: in any basis of their space every token has a part."""
    x = torch.zeros(1, n, 2 * groups)
    token, pattern = torch.arange(n), torch.arange(n) % groups
    x[0, token, 2 * pattern], x[0, token, 2 * pattern + 1] = 1, -1
    _, loadings = lvtp.psca(x, groups)
    assert (loadings > 0.2 * (groups / n) ** 0.5).all()


@pytest.mark.skipif(sys.platform != "linux" or "asan" in os.environ.get("LD_PRELOAD", ""), reason="limits memory")
@pytest.mark.parametrize("threads", [1, 3])
def test_memory_that_runs_out_is_said_with_operator_and_size(threads):
    """For the answer, for a copy of the arguments, in a kernel: all threads on one image, or each on its own."""
    script = f"""
import resource, torch, lvtp
torch.set_num_threads({threads})
few, wide = torch.randn(1, 30000, 8), torch.randn({threads}, 3000, 3000).half()
lvtp.psca(wide[:, :8, :8], 2)  # all that a first call needs
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + 2**24
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for call, image in (
    (lvtp.cosine_similarity, few), (lvtp.mean_similarity, wide.mT), (lambda x: lvtp.psca(x, 8), wide),
    (lambda x: lvtp.psca(x, 8), wide[:1]), (lambda x: lvtp.prune_sid(x, None, 64), wide),
):
    try:
        call(image)
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["cosine_similarity", "mean_similarity", "psca", "psca", "prune_sid"]
    for line, name in zip(done.stdout.splitlines(), names, strict=True):
        said = re.fullmatch(rf"{name}: out of memory: (\d+) bytes could not be allocated", line)
        assert said, line
        assert int(said[1]) > 2**23
    assert int(re.search(r"\d+", done.stdout)[0]) == 4 * 30000**2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_tokens_of_few_features_need_no_matrix_of_their_pairs():
    script = """
import resource, torch, lvtp
features, importance = torch.randn(1, 30000, 8), torch.rand(1, 30000)
lvtp.prune_sid(features[:, :100], importance[:, :100], 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert lvtp.prune_sid(features, importance, 64).shape == (1, 64)
assert lvtp.psca(features, 16)[0].max() < 8
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)  # KiB
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 2**10 < 30000**2 / 10
