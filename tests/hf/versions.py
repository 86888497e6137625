"""Runs the tests of lvtp.hf with other versions of transformers, each laid over the packages that are installed,
together with what that version itself needs.

    python tests/hf/versions.py 5.19.0 5.23.0 [arguments of pytest]

Prints a line for each version; the exit code is 1 if one of them failed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FILELOCK = re.search(r'"(filelock[^"]*)"', (HERE.parents[1] / "pyproject.toml").read_text())[1]  # what lmms-eval takes


def run(version: str, arguments: list[str]) -> bool:
    """Whether the tests pass; prints what pytest says last, after what failed."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-conflicts", "--target", folder]
        subprocess.run([*install, f"transformers=={version}", FILELOCK], check=True)
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", str(HERE), *arguments],
            cwd=HERE.parents[1],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            text=True,
        )
    lines = done.stdout.splitlines() or ["nothing ran"]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print(*failures, f"transformers {version}: {lines[-1]}", sep="\n", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="as pip takes it: 5.19.0 or 5.19.*")
    known, arguments = parser.parse_known_args()
    passed = [run(version, arguments) for version in known.versions]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
