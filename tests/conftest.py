"""What the tests share: one `backend` and one `device` parametrisation for all of them, and features to select from."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from problems import VIEWS

import lvtp

# Triton reads TRITON_INTERPRET when it defines a kernel, so the CPU's turn is a process of its own (test_triton.py).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("triton",) if INTERPRETED else ("native", "reference", "triton")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ("cpu",) if INTERPRETED else ("cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = 70  # tokens; what the interpreter is given

# A small, repeatable number of random cases by default; LVTP_HYPOTHESIS_EXAMPLES=10000 looks for new ones.
_examples = os.environ.get("LVTP_HYPOTHESIS_EXAMPLES")
hypothesis.settings.register_profile(
    "lvtp",
    max_examples=int(_examples or (4 if INTERPRETED else 100)),
    derandomize=_examples is None,
    deadline=None,
    print_blob=True,
)
hypothesis.settings.load_profile("lvtp")


def pytest_collection_modifyitems(config, items):
    """Triton serves the CPU only in its interpreter, which is slow: there, what it serves, at small sizes."""

    def wanted(item):
        if not hasattr(item, "callspec"):
            return not INTERPRETED
        params = item.callspec.params
        triton = "triton" in (params.get("backend"), params.get("name"))
        if not INTERPRETED:
            return not triton or params.get("device") == "cuda"
        if item.get_closest_marker("large") or params.get("hostile", "strided") != "strided":
            return False
        if params.get("dtype", torch.float32) != torch.float32 and item.path.stem != "test_cosine_similarity":
            return False  # that kernel is the one that tells them apart
        sizes = [v for k, v in params.items() if k in ("n", "tokens") and type(v) is int]
        return triton and max(sizes, default=0) <= SMALL and params.get("groups", 0) <= 4

    dropped = [item for item in items if not wanted(item)]
    items[:] = [item for item in items if wanted(item)]
    config.hook.pytest_deselected(items=dropped)


_failed = False  # the test before, in this process


def pytest_runtest_logreport(report):
    global _failed
    _failed = report.failed if report.when == "setup" else _failed or report.failed


def pytest_runtest_logstart():
    """After an illegal access nothing runs on the device any more: the worker ends, and another one goes on."""
    if _failed and os.environ.get("PYTEST_XDIST_WORKER") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(autouse=INTERPRETED)
def small_blocks(monkeypatch):
    """So that loops over blocks take several turns at the sizes an interpreter can do."""
    from lvtp.triton_kernels import common

    for name, size in {"BLOCK": 32, "TILE": 16, "DEPTH": 16}.items():
        monkeypatch.setattr(common, name, size)


if INTERPRETED:
    from triton.runtime.interpreter import InterpretedFunction

    # Triton patches its language again at every call of one kernel's function by another, which takes half of the time;
    # for functions that see the same names as the kernel, the patch that came with the launch holds.
    _patch_and_call = InterpretedFunction.__call__

    def _call(self, *args, **kwargs):
        if self.fn.__module__.startswith("lvtp."):
            return self.rewrite()(*args, **kwargs)
        return _patch_and_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = _call


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    """Every call in the test is served by this backend, or raises."""
    with lvtp.use_backend(request.param):
        yield request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(scope="session")
def cpp_example(tmp_path_factory):
    """examples/cpp, built as its users build it."""
    if not (shutil.which("c++") or os.environ.get("CXX")):
        pytest.skip("no C++ compiler")
    folder, source = tmp_path_factory.mktemp("cpp"), Path(__file__).parents[1] / "examples" / "cpp"
    where = subprocess.check_output([sys.executable, "-m", "lvtp", "--cmake-path"], text=True).strip()
    prefixes = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path};{where}"
    subprocess.run(["cmake", "-S", source, "-B", folder / "build", "-G", "Ninja", prefixes], check=True)
    subprocess.run(["cmake", "--build", folder / "build"], check=True)
    return Path(shutil.copy(folder / "build" / "select_tokens", folder))  # a test links another in build


# ---------------------------------------------------------------------------------------------------------- inputs


def clustered_features(b, n, d=64, seed=0, clusters=12, noise=0.5, dtype=torch.float32, device="cpu"):
    """[B, N, D] like the output of a vision transformer: a direction common to all tokens, clusters of unequal size
    and strength, and noise."""
    g = torch.Generator().manual_seed(seed)
    strength = torch.linspace(2.0, 0.5, clusters)[:, None]
    centres = torch.randn(b, clusters, d, generator=g) * strength + 0.5 * torch.randn(b, 1, d, generator=g)
    member = (torch.rand(b, n, generator=g) ** 1.5 * clusters).long()
    x = centres.gather(1, member[..., None].expand(b, n, d)) + noise * torch.randn(b, n, d, generator=g)
    return x.to(device=device, dtype=dtype)


def random_importance(b, n, seed=0, device="cpu"):
    """[B, N] fp32 like CLS attention: positive, adding up to 1, few large values."""
    g = torch.Generator().manual_seed(seed + 1)
    return torch.softmax(2 * torch.randn(b, n, generator=g), dim=1).to(device)


def photograph_features():
    """[1, 576, 588]: the 24 x 24 patches of 14 x 14 pixels of the photograph that comes with matplotlib."""
    cbook = pytest.importorskip("matplotlib.cbook")
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        pixels = numpy.asarray(image.open(file).convert("RGB").resize((336, 336)), dtype="float32")
    x = torch.from_numpy(pixels.copy()).view(24, 14, 24, 14, 3).transpose(1, 2).reshape(1, 576, 588)
    return (x - x.mean()) / x.std()


# --------------------------------------------------------------------------------------------------- hostile memory


@pytest.fixture(params=list(VIEWS))
def hostile(request):
    """hostile(t) has the values of t in awkward memory with sentinels around; at the end that memory is unchanged."""
    buffers = []

    def view_of(t):
        view, buffer = VIEWS[request.param](t)
        buffers.append((buffer, buffer.clone()))
        return view

    yield view_of
    for buffer, before in buffers:
        torch.testing.assert_close(buffer, before, rtol=0, atol=0, equal_nan=True)
