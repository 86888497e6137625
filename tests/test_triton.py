"""The Triton backend: the suite in its interpreter, what runs where, and the parts of PSCA that are not a kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import clustered_features, photograph_features, random_importance

import lvtp
from lvtp import chips, ops, triton_kernels
from lvtp.reference import centred_sigmoid

HERE = Path(__file__).parent
# Two processes of about the same length: the interpreter uses one core.
INTERPRETED_FILES = (
    ("cosine_similarity", "mean_similarity", "greedy_suppression", "cluster_nms", "id_selection", "prune_sid"),
    ("psca", "dynamic_budget", "bad_input", "triton"),
)


def test_the_suite_in_the_interpreter():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", *(f"{HERE}/test_{name}.py" for name in names)],
            cwd=HERE.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for names in INTERPRETED_FILES
    ]  # fmt: skip
    for process in running:
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert " passed" in said.splitlines()[-1], said


# ------------------------------------------------------------------------------------------- inside the interpreter


@pytest.mark.parametrize("name", ["triton"])
def test_traces_without_a_break(name):
    def select(features, importance):
        return lvtp.id_selection(features, importance, 5), lvtp.prune_sid(features, importance, 12)

    x, s = clustered_features(2, 24, 16), random_importance(2, 24)
    torch._dynamo.reset()
    with lvtp.use_backend(name):
        compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
        for got, wanted in zip(compiled(x, s), select(x, s), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["triton"])
@pytest.mark.parametrize("op", triton_kernels.OPERATORS)
def test_opcheck(name, op):
    from test_torch import example

    torch.library.opcheck(getattr(torch.ops.lvtp_triton, op).default, example(op, b=1, n=12))


@pytest.mark.parametrize("name", ["triton"])
@pytest.mark.parametrize("m", [1, 2, 7, 33, 50])
def test_rotations_diagonalise(name, m):
    from lvtp.triton_kernels import psca

    g = torch.Generator().manual_seed(m)
    a = torch.randn(2, m, m, generator=g, dtype=torch.float64) * torch.logspace(0, -4, m, dtype=torch.float64)
    a[1] = 0
    x = torch.cat([a, torch.eye(m, dtype=torch.float64).expand(2, m, m)], 2)
    psca.orthogonalise_rows(x)
    rows, rotation = x[..., :m], x[..., m:]
    eye = torch.eye(m, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.mT, eye.expand(2, m, m), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation @ a, rows, rtol=0, atol=1e-12)
    products = rows[0] @ rows[0].mT
    length = products.diagonal().sqrt()
    assert (products / (length[:, None] * length) - eye).abs().max() < 1e-12


# ------------------------------------------------------------------------------------- PSCA's subspace, by torch alone


HARD = {
    "photograph": lambda: photograph_features(),
    "clusters": lambda: clustered_features(1, 576, 128, clusters=24),
    "fewer clusters than groups": lambda: clustered_features(1, 577, 1024, clusters=5),
    "fewer features than tokens": lambda: clustered_features(1, 729, 64),
}


@pytest.mark.parametrize("center", ["feature", "token"])
@pytest.mark.parametrize("features", HARD)
def test_the_subspace_holds_the_components(features, center):
    pytest.importorskip("triton")
    from lvtp.triton_kernels import psca

    a, _ = centred_sigmoid(HARD[features](), center, None)
    vectors = torch.linalg.eigh(a @ a.mT)[1].flip(-1)
    for groups in (4, 8, 16, 32, 48):
        y = psca._subspace(psca._gram(a), a.shape[1], groups + psca.OVERSAMPLING, a)
        eye = torch.eye(y.shape[2], dtype=y.dtype)[None]
        torch.testing.assert_close(y.mT @ y, eye, rtol=0, atol=1e-10)
        v = vectors[..., :groups]
        assert torch.linalg.vector_norm(v - y @ (y.mT @ v), dim=1).max() < 1e-5


# --------------------------------------------------------------------------------------------------- what runs where


def test_importing_lvtp_imports_neither_triton_nor_dynamo():
    script = "import lvtp, sys; print({'triton', 'torch._dynamo'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture
def fresh(monkeypatch):
    """Triton's state is found out again, in the test and after it."""
    ops._triton_trouble.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    ops._triton_trouble.cache_clear()


@pytest.mark.parametrize("error", [ImportError("no libcuda"), AttributeError("half an installation"), OSError("disk")])
def test_whatever_breaks_triton_is_named_and_breaks_nothing_else(fresh, error):
    def broken(name):
        raise error

    fresh.setattr(triton_kernels, "launcher", broken)
    assert str(error) in lvtp.build_info()["backends"]["triton"] or "does not import" in ops._triton_trouble()
    x = clustered_features(1, 9)
    with lvtp.use_backend("triton"), pytest.raises(RuntimeError, match='backend "triton" cannot run cosine_similarity'):
        lvtp.cosine_similarity(x)
    assert torch.equal(ops._without_compiled_kernel("cosine_similarity")(x), lvtp.reference.cosine_similarity(x))


def test_auto_prefers_triton_to_the_reference_where_it_runs(fresh):
    fresh.setattr(ops, "_triton_trouble", lambda: "")
    fresh.setattr(triton_kernels, "launcher", lambda name: lambda *args: (name, args))
    x = clustered_features(1, 9)
    assert ops._without_compiled_kernel("mean_similarity")(x) == ("mean_similarity", (x,))


def test_cpu_tensors_are_refused_outside_the_interpreter(fresh):
    fresh.setattr(ops, "_triton_trouble", lambda: "")
    with lvtp.use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        lvtp.cosine_similarity(clustered_features(1, 9))


@pytest.mark.parametrize("op", ops.OPS)
def test_cuda_tensors_have_a_kernel_of_their_own(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lvtp::{op}", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lvtp_triton::{op}", "CUDA")


@pytest.mark.parametrize(
    ("architectures", "chip", "runs"),
    [
        (["80-real"], (8, 0), True),
        (["80-real"], (8, 6), True),
        (["86-real"], (8, 0), False),
        (["80-real"], (9, 0), False),
        (["80"], (9, 0), True),
        (["80-virtual"], (12, 0), True),
        (["90a-real"], (9, 0), True),
        (["90a"], (10, 0), False),
        (["100f-real"], (10, 3), True),
        (["100f"], (12, 0), False),
        (["80-real", "120"], (7, 5), False),
        (["80-real", "120"], (12, 1), True),
        ([], (8, 0), False),
        (["native"], (7, 5), True),
    ],
)
def test_which_chips_a_library_runs_on(architectures, chip, runs):
    assert chips.runs_on(architectures, chip) == runs


def test_a_library_for_other_chips_is_not_loaded(monkeypatch, tmp_path):
    library = tmp_path / "liblvtp_cuda.so"
    library.touch()
    monkeypatch.setattr(ops, "_missing", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(chips, "capabilities", lambda: [(7, 5)])
    monkeypatch.setattr(ops, "_built", lambda: {"cuda_architectures": ["80-real", "120"]})
    monkeypatch.setattr(torch.ops, "load_library", pytest.fail)
    ops._load_cuda_library(library)
    assert ops._missing["native_cuda"] == "liblvtp_cuda was built for 80-real, 120, this machine has sm_75"
