"""The results under a folder in one form: a CPU's from pytest-benchmark's JSON, a GPU's from bench.gpu's.

`python -m bench.runs FILE` puts pytest-benchmark's in its place, bench/results/<machine>-<date>/ops.json.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.shapes import WITHOUT_BUDGET, Shape

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One operator on one input: the seconds of "lvtp" and of whatever took turns with it."""

    name: str
    shape: Shape
    dtype: str
    input: str  # empty: as bench.shapes makes them
    seconds: dict[str, float]
    least: float | None = None  # seconds that the machine's peaks allow
    first: dict[str, float] = field(default_factory=dict)  # seconds until the first result
    memory: dict[str, int] = field(default_factory=dict)  # bytes on top of the inputs
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> str:
        return self.shape.size.split(",")[0] if self.name in WITHOUT_BUDGET else self.shape.size

    @property
    def model(self) -> str:
        return self.shape.model + (f": {self.input}" if self.input else "")

    @property
    def ours(self) -> float | None:
        return self.seconds.get("lvtp")


def commit() -> str:
    """The checkout's commit. Without .git, what the file COMMIT says, in the checkout or in the folder WHEELS, where
    `bench/gpu.sh wheels` writes it."""
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    for folder in (root, root / os.environ.get("WHEELS", ".")):
        if (folder / "COMMIT").is_file():
            return (folder / "COMMIT").read_text().strip()
    return "unknown"


def short(commit: str) -> str:
    """Twelve digits, and what else is said of it."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", commit)


class Run(NamedTuple):
    """All that was timed on one machine at one time; its figures are compared with each other and with no others."""

    folder: Path
    device: str  # CPU or GPU
    machine: str
    date: str
    commit: str
    software: str
    rows: list[Row]

    @property
    def caption(self) -> str:
        return f"{self.machine}, {self.date}, commit {self.commit}, {self.software}"


def cpu_run(path: Path, found: dict) -> Run:
    info = found["machine_info"]["cpu"]
    rows = []
    for each in found["benchmarks"]:
        extra = each["extra_info"]
        seconds = {"lvtp": each["stats"]["median"], **extra["baselines"]}
        rows.append(
            Row(
                extra["name"],
                Shape.of(extra),
                extra["dtype"],
                extra.get("input", ""),
                seconds,
                extra.get("least_seconds"),
            )
        )
    first = found["benchmarks"][0]["extra_info"]
    return Run(
        folder=path.parent,
        device="CPU",
        machine=f"{info['brand_raw']}, {info['count']} cores",
        date=found["datetime"][:10],
        commit=short(found["commit_info"]["id"]) + (", with changes" if found["commit_info"]["dirty"] else ""),
        software=f"torch {first['torch']}, {first['threads']} threads",
        rows=rows,
    )


def gpu_run(path: Path, found: dict) -> Run:
    about = found["machine"]
    return Run(
        folder=path.parent,
        device="GPU",
        machine=f"{about['device']}, driver {about['driver']}",
        date=about["date"],
        commit=short(about["commit"]),
        software=f"torch {about['torch']}, CUDA {about['cuda']}",
        rows=[
            Row(
                row["name"],
                Shape.of(row),
                row["dtype"],
                row.get("input", ""),
                row["seconds"],
                row["least_seconds"],
                row["first_seconds"],
                row["bytes"],
                row["errors"],
            )
            for row in found["rows"]
        ],
    )


def read(results: Path) -> list[Run]:
    """Those of every ops.json below `results`, by folder."""
    runs = []
    for path in sorted(results.glob("*/ops.json")):
        found = json.loads(path.read_text())
        if "benchmarks" in found:
            runs.append(cpu_run(path, found))
        elif "rows" in found:
            runs.append(gpu_run(path, found))
        else:
            raise ValueError(f"{path}: neither pytest-benchmark's JSON nor bench.gpu's")
    return [run for run in runs if run.rows]


def place(found: dict) -> Path:
    """Where pytest-benchmark's JSON belongs: "Intel(R) Xeon(R) Processor" with two cores is Xeon-2-cores."""
    cpu = found["machine_info"]["cpu"]
    brand = re.sub(r"\((R|TM)\)|Intel|AMD|CPU|Processor|\d+-Core|@.*", " ", cpu["brand_raw"] or "unknown")
    return RESULTS / "-".join([*brand.split(), f"{cpu['count']}-cores", found["datetime"][:10]]) / "ops.json"


if __name__ == "__main__":
    result = json.loads(Path(sys.argv[1]).read_text())
    target = place(result)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{target.relative_to(Path.cwd())} written; `make report` adds it to the page")
