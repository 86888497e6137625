"""Compiles what includes torch's headers against those of other torches, without generating code: seconds a version.

    python tests/torch_headers.py 2.11.0 2.15.0     these, and the oldest that pyproject.toml allows

The commands are those of the latest editable build (`make test` makes one). With an nvcc on the machine they include
the CUDA launchers. The headers come from torch's wheel for macOS, a tenth of the size of the one for Linux; those of
the stable ABI are the same in both. Prints a line for each version; the exit code is 1 if a file does not compile.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = ROOT / "build" / "editable" / "compile_commands.json"


def headers(version: str) -> Path:
    """The include folder of that torch, downloaded once into out/torch-headers."""
    folder = ROOT / "out" / "torch-headers" / version
    if not folder.exists():
        with tempfile.TemporaryDirectory() as wheels:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            pip += ["--python-version", "3.12", "--platform", "macosx_11_0_arm64", "--platform", "macosx_14_0_arm64"]
            no_constraints = {**os.environ, "PIP_CONSTRAINT": os.devnull}
            subprocess.run([*pip, "--dest", wheels, f"torch=={version}"], check=True, env=no_constraints)
            (wheel,) = Path(wheels).glob("torch-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith("torch/include/")]
                unpacked = folder.with_name(f"{version}.part")
                archive.extractall(unpacked, names)
        unpacked.rename(folder)
    return folder / "torch" / "include"


def units() -> list[dict]:
    """The compile commands that see torch's headers: those of kernels do not."""
    if not COMMANDS.exists():
        sys.exit(f"torch_headers: {COMMANDS} is missing: pip install --no-build-isolation -e . writes it")
    found = [unit for unit in json.loads(COMMANDS.read_text()) if "TORCH_TARGET_VERSION" in unit["command"]]
    assert found, f"no command of {COMMANDS} names TORCH_TARGET_VERSION"
    return found


def compile_unit(unit: dict, include: Path) -> str:
    """What the compiler says where it fails; empty where it does not."""
    words = shlex.split(unit["command"])
    del words[words.index("-o") : words.index("-o") + 2]
    torch = next(i for i, word in enumerate(words) if word == "-isystem" and words[i + 1].endswith("torch/include"))
    words[torch + 1] = str(include)
    done = subprocess.run([*words, "-fsyntax-only"], cwd=unit["directory"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"{unit['file']}:\n{done.stderr}"


def main() -> int:
    floor = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    failed = 0
    for version in (f"{floor}.0", *sys.argv[1:]):
        include, wanted = headers(version), units()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            errors = list(filter(None, pool.map(partial(compile_unit, include=include), wanted)))
        launchers = sum("USE_CUDA" in unit["command"] for unit in wanted)  # none without an nvcc
        summary = f"{len(wanted) - len(errors)} of {len(wanted)} files compile, {launchers} CUDA launchers among them"
        print(*errors, f"torch {version}: {summary}", sep="\n", flush=True)
        failed += bool(errors)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
