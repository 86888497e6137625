"""What a user installs: the libraries' symbols, the wheel, an empty environment, the words of a failed import."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lvtp

ROOT = Path(__file__).parents[1]
LIBRARIES = sorted(lvtp.ops._LIBRARIES.glob("*.so"))

# Symbols of the C and C++ runtimes carry a version; those of the loader are weak.
RUNTIME = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")
STABLE = re.compile(r"^(aoti_torch_|torch_)\w+$")


def run(*command, **kwargs) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="reads ELF symbols with nm")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_undefined_symbols_are_torchs_stable_abi_and_nothing_else(library):
    undefined = [line.split() for line in run("nm", "-D", "--undefined-only", library).splitlines()]
    wanted = {name for kind, name in undefined if kind == "U" and not RUNTIME.search(name)}
    assert {name for name in wanted if not STABLE.match(name)} == set()
    no_torch = library.stem == "liblvtp_jax_cuda"  # kernels and XLA alone
    assert any(map(STABLE.match, wanted)) != no_torch


def test_a_cpp_user_builds_the_library_with_cmake_alone_and_without_nvcc(tmp_path):
    run(
        "cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja",
        f"-DPython3_EXECUTABLE={sys.executable}", "-DLVTP_CUDA=OFF",
    )  # fmt: skip
    run("cmake", "--build", tmp_path, "--parallel")
    assert (tmp_path / "liblvtp.so").exists()
    assert not (tmp_path / "liblvtp_cuda.so").exists()
    script = "import sys, torch; torch.ops.load_library(sys.argv[1]); x = torch.randn(1, 9, 4); "
    script += "print(torch.ops.lvtp.id_selection(x, x[..., 0], 3).shape)"
    assert "[1, 3]" in run(sys.executable, "-c", script, tmp_path / "liblvtp.so", cwd=tmp_path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel built from the sdist, not from the checkout: what the sdist lacks is found out here."""
    out = tmp_path_factory.mktemp("dist")
    env = {**os.environ, "TORCH_CUDA_ARCH_LIST": "8.0;9.0a+PTX", "MAX_JOBS": "2"}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, env=env)
    assert len(list(out.glob("lvtp-*.tar.gz"))) == 1
    (built,) = out.glob("lvtp-*.whl")
    return built


def test_the_wheel_serves_every_python_and_every_torch(wheel):
    assert re.fullmatch(r"lvtp-[\d.]+-py3-none-\w+\.whl", wheel.name)


@pytest.mark.skipif(torch.version.cuda is not None, reason="would download a CUDA build of torch")
def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "env")
    run(python, "-m", "pip", "install", "-q", f"torch=={torch.__version__.split('+')[0]}")
    run(python, "-m", "pip", "install", "-q", wheel)
    script = textwrap.dedent("""
        import importlib.util, lvtp, lvtp.triton_kernels, torch
        assert importlib.util.find_spec("triton_kernels") is None  # that name is the Triton project's
        assert importlib.util.find_spec("triton") is None
        x = torch.randn(2, 33, 8)
        with lvtp.use_backend("native"):
            print(lvtp.id_selection(x, x[..., 0], 5).shape, lvtp.prune_sid(x, None, 12).shape)
        info = lvtp.build_info()
        print(lvtp.__file__, info["cuda_architectures"], info["backends"])
        try:
            lvtp.hf
        except ImportError as error:
            print(error)
    """)
    said = run(python, "-W", "error::ImportWarning", "-c", script, cwd=tmp_path)
    assert "[2, 5]" in said
    assert "[2, 12]" in said
    assert str(tmp_path / "env") in said
    assert "triton does not import" in said
    assert "is built without CUDA" in said
    assert "transformers" in said
    if shutil.which("nvcc"):
        assert "['80-real', '90a']" in said


def test_importing_lvtp_imports_neither_transformers_nor_matplotlib():
    script = "import lvtp, sys; print({'transformers', 'matplotlib', 'PIL'} & set(sys.modules))"
    assert run(sys.executable, "-c", script).strip() == "set()"


def test_a_torch_that_is_too_old_is_named_with_the_range_and_the_remedy():
    script = "import torch; torch.__version__ = '2.9.1+cpu'; import lvtp"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert re.search(r"ImportError: lvtp needs torch >=2\.10, found torch 2\.9\.1\+cpu in .*Remedy: pip", done.stderr)


def test_a_missing_library_is_an_import_error_with_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(lvtp.ops, "_LIBRARIES", tmp_path)
    with pytest.raises(ImportError, match=r"liblvtp\.\w+ does not exist\. Remedy"):
        lvtp.ops._load_libraries()


def test_a_library_that_does_not_load_is_an_import_error_with_a_remedy(monkeypatch, tmp_path):
    (tmp_path / f"liblvtp{lvtp.ops._SUFFIX}").write_text("not a library")
    shutil.copy(lvtp.ops._LIBRARIES / "build.json", tmp_path)
    monkeypatch.setattr(lvtp.ops, "_LIBRARIES", tmp_path)
    with pytest.raises(ImportError, match=r"wants torch >=2\.10; found torch .* Remedy"):
        lvtp.ops._load_libraries()


def test_build_info_says_what_is_missing_and_why(monkeypatch, tmp_path):
    monkeypatch.setattr(lvtp.ops, "_missing", {})
    lvtp.ops._load_cuda_library(tmp_path / "liblvtp_cuda.so")
    assert lvtp.build_info()["backends"]["native_cuda"].startswith("built without nvcc")
    assert lvtp.build_info()["backends"]["native_cpu"] == "loaded"


def test_constraints_pin_everything_that_make_installs():
    """A dependency added without `make lock` would be whatever its newest release is on the day of the run."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras, groups = project["project"]["optional-dependencies"], project["dependency-groups"]
    lists = [names for extra, names in extras.items() if extra != "eval"]  # lmms-eval comes without what it needs
    lists += [project["project"]["dependencies"], *groups.values()]
    wanted = [Requirement(r) for names in lists for r in names if not r.startswith("lvtp[")]
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate():
                pinned[canonicalize_name(pin.name)] = pin.specifier
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate():
            (pin,) = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin.version), requirement


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("transformers-5.17.0.dist-info/METADATA", "Name: transformers\nVersion: 5.17.0\n", "found 5.17.0"),
        ("transformers.py", "raise ModuleNotFoundError('it is not there')", "it is not there"),
    ],
    ids=["too old", "missing"],
)
def test_without_a_transformers_for_lvtp_hf_all_other_tests_run(tmp_path, file, content, said):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    tests = [path for path in ROOT.glob("tests/**/test_*.py") if re.search("transformers|lvtp.hf", path.read_text())]
    assert len(tests) > 10
    collect = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", "-rs", *tests]
    report = run(*collect, ROOT / "tests" / "test_cpu.py", cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    skipped = re.findall(r"^SKIPPED \[\d+\] tests/(?:hf/conftest|test_demo).py:\d+: (.*)", report, re.M)
    assert len(skipped) == 2
    assert all(said in why for why in skipped)
