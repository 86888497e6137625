"""Compiles the emulator, the project's .cu files and the bindings with the host compiler, by ninja.

`python tests/emulation/build.py [--asan]` builds into out/emulation and prints the module's path; `load()` does that
and imports it. LVTP_EMULATION_ASAN=1 chooses the build under AddressSanitizer, whose runtime must be in the process
first: run pytest with LD_PRELOAD set to what `asan_runtime()` returns.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ASAN = bool(os.environ.get("LVTP_EMULATION_ASAN"))


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def asan_runtime() -> str:
    """With the C++ runtime, as AddressSanitizer looks for what it intercepts, exceptions included, when it starts."""
    wanted = [[compiler(), f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    return " ".join(subprocess.run(c, capture_output=True, text=True).stdout.strip() for c in wanted)


def xla_headers() -> str | None:
    """Where jaxlib, if it is here, has the headers of XLA's custom calls."""
    spec = importlib.util.find_spec("jaxlib")
    return f"{spec.submodule_search_locations[0]}/include" if spec else None


def build(asan: bool = ASAN) -> Path:
    """Two libraries: the kernels with the machine, whose thread-local variables are all __shared__, and the module."""
    import fcntl

    import pybind11

    name = "lvtp_emulation_asan" if asan else "lvtp_emulation"
    folder = ROOT / "out" / "emulation" / ("asan" if asan else "plain")
    folder.mkdir(parents=True, exist_ok=True)
    flags = f"-std=c++17 -g1 {'-O1' if asan else '-O2'} -fPIC -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-function"
    if asan:
        flags += " -fsanitize=address -fno-omit-frame-pointer"
    includes = f"-I{HERE / 'include'} -I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
    cuda = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "probes.cu"]
    kernels = [(path, "-x c++ -include cuda_runtime.h") for path in cuda] + [(HERE / "simt.cpp", "")]
    lines = [
        f"cxx = {compiler()}",
        f"flags = {flags} {includes}",
        "rule compile\n  command = $cxx $flags -MMD -MF $out.d $extra -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cxx $flags -shared $in -o $out $extra",
    ]
    for path, extra in [*kernels, (HERE / "bindings.cpp", f"-DMODULE_NAME={name} -fvisibility=hidden")]:
        lines.append(f"build {path.name}.o: compile {path}\n  extra = {extra}")
    lines.append(f"build libkernels.so: link {' '.join(f'{path.name}.o' for path, _ in kernels)}\n  extra = -pthread")
    lines.append(f"build {name}.so: link bindings.cpp.o libkernels.so\n  extra = -Wl,-rpath,{folder}")
    if xla := xla_headers():
        calls = [ROOT / "csrc" / "jax" / "cuda.cpp", HERE / "jax_calls.cpp"]
        lines += [f"build {path.name}.o: compile {path}\n  extra = -isystem {xla}" for path in calls]
        inputs = " ".join(f"{path.name}.o" for path in calls)
        lines.append(f"build jax_calls.so: link {inputs} libkernels.so\n  extra = -Wl,-rpath,{folder}")
    with (folder / "lock").open("w") as lock:  # of several test processes one builds, and the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        done = subprocess.run(["ninja", "-C", folder, "-j", "2"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulation does not build:\n{done.stdout}\n{done.stderr}")
    return folder / f"{name}.so"


def load():
    path = build()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build("--asan" in sys.argv[1:]))
