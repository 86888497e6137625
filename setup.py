"""Builds the libraries with CMake and Ninja and puts them into the package; pyproject.toml holds everything else.

Environment: MAX_JOBS (compile jobs; sized from the cores and the memory when unset), TORCH_CUDA_ARCH_LIST (as torch's
own builds read it, for example "8.0;9.0a+PTX"; CMakeLists.txt has the default), CMAKE_ARGS (-DLVTP_CUDA=OFF builds for
the CPU alone).
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH = re.search(r'"(torch>=(\d+)\.(\d+))"', (ROOT / "pyproject.toml").read_text())  # where the floor is stated


def find_torch() -> Path | None:
    """The folder of a torch whose headers will do: the build's own, else that of the environment installed into.

    The libraries keep to torch's stable ABI, so any torch from the floor on serves, and an isolated build need not
    fetch a second one (gigabytes, by default) beside the one that is already there.
    """
    spec = importlib.util.find_spec("torch")
    candidates = list(spec.submodule_search_locations or []) if spec else []
    candidates += [os.path.join(sysconfig.get_path(name), "torch") for name in ("platlib", "purelib")]
    for folder in map(Path, candidates):
        version = folder / "version.py"
        found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text()) if version.exists() else None
        if found and (int(found[1]), int(found[2])) >= (int(TORCH[2]), int(TORCH[3])):
            return folder
    return None


def find_xla() -> Path | None:
    """The headers of XLA's custom calls in jaxlib, the build's own or that of the environment installed into."""
    spec = importlib.util.find_spec("jaxlib")
    candidates = list(spec.submodule_search_locations or []) if spec else []
    candidates += [os.path.join(sysconfig.get_path(name), "jaxlib") for name in ("platlib", "purelib")]
    folders = (Path(folder) / "include" for folder in candidates)
    return next((folder for folder in folders if (folder / "xla" / "ffi" / "api" / "ffi.h").exists()), None)


def max_jobs() -> int:
    """MAX_JOBS, else one job a core, but no more than fit in memory: nvcc takes up to 2 GiB a job."""
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    return max(1, min(os.cpu_count() or 1, memory // (2 << 30)))


def cmake_architectures(arch_list: str) -> str:
    """TORCH_CUDA_ARCH_LIST in CMake's words: "8.0;9.0a+PTX" -> "80-real;90a" (a bare number is code and PTX)."""
    architectures = []
    for arch in re.split(r"[;,\s]+", arch_list.strip()):
        parts = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if not parts:
            raise SystemExit(f'TORCH_CUDA_ARCH_LIST must be like "8.0;9.0a+PTX", got "{arch}" in "{arch_list}"')
        architectures.append(f"{parts[1]}{parts[2]}" + ("" if parts[3] else "-real"))
    return ";".join(architectures)


def run(*command) -> None:
    subprocess.run([str(word) for word in command], check=True)


class CMakeBuild(build_ext):
    def run(self):
        torch = find_torch()
        if torch is None:
            raise SystemExit(f"lvtp's build needs the headers of {TORCH[1]} and found none: pip install torch")
        in_place = self.inplace or self.editable_mode
        self.destination = (ROOT if in_place else Path(self.build_lib).resolve()) / "lvtp" / "lib"
        # Not setuptools' temporary folder, which is new every time: in one that stays, only what changed is compiled.
        build = ROOT / "build" / "editable" if in_place else Path(self.build_temp).resolve() / "cmake"
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja"]
        configure += ["-ULVTP_*", "-UCMAKE_CUDA_ARCHITECTURES"]  # options of an earlier build do not stay
        configure.append(f"-DLVTP_TORCH={torch}")
        configure.append(f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}")  # an isolated build's moves at every build
        configure.append(f"-DLVTP_XLA={find_xla() or ''}")
        if os.environ.get("TORCH_CUDA_ARCH_LIST"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={cmake_architectures(os.environ['TORCH_CUDA_ARCH_LIST'])}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        run(*configure)
        run("cmake", "--build", build, "--parallel", max_jobs())
        shutil.rmtree(self.destination, ignore_errors=True)  # no library of an earlier build stays
        run("cmake", "--install", build, "--prefix", self.destination)

    def get_outputs(self):
        built = getattr(self, "destination", ROOT / "lvtp" / "lib").rglob("*")
        return [str(path) for path in built if path.is_file()]

    def get_output_mapping(self):
        return {}  # the editable build writes straight into the source tree


class StableAbiWheel(bdist_wheel):
    """py3-none-<platform>: no Python ABI and no exact torch take part, so one wheel serves them all."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("lvtp.lib.liblvtp", sources=[])],  # makes the wheel a platform wheel
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": StableAbiWheel},
    # Read as a dynamic build requirement: only a build that finds no torch anywhere fetches one.
    setup_requires=[] if find_torch() or "clean" in sys.argv else [TORCH[1]],
)
