"""`python -m bench.report`: every JSON file under bench/results in one page, bench/results/README.md, with plots.

Each run is a section of its own, and a figure is only compared with others of its run. What is registered in
bench.shapes and not in a run is named. The page holds nothing but what the files hold: a second run changes nothing.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from bench import charts, runs
from bench.runs import Row, Run
from bench.shapes import DTYPES, OPERATORS, SELECTORS, SHAPES, fp32_only

UNITS = {"CPU": ("ms", 1e3), "GPU": ("us", 1e6)}

PAGE = """# Benchmarks

Made by `python -m bench.report` from the JSON files in this folder. Each section is one run on one machine, and no
figure is compared with another section's. Times are medians; in brackets, how many times what lvtp takes. The variants
of a row take turns, so each call finds the caches full of the others' data. A dash: not timed there.

**at least** is the roofline: the longer of the rule's bytes (its input read once, its result written) at the speed of a
copy, and its products at the speed of a large matrix product, both as measured on that machine (`work` in
[shapes.py](../shapes.py) counts them). The percentage is its share of what lvtp takes; above 100%, the input came from
a cache or products were skipped, as ID-Selection's lazy loop does.

## CPU

{cpu}

## GPU

{gpu}

## In a model

{models}

## What the picks keep

Measured on photographs, without weights: [quality](quality/README.md).
"""
NOTHING = {
    "CPU": "Not measured yet: `make bench` does it.",
    "GPU": "Not measured yet: no GPU has run this version. `bench/gpu.sh` builds, tests and times it on a machine that "
    "has one.",
    "models": "Not measured yet. Time to first token at 7B needs a GPU and has not been measured at all.",
}


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    exponent = int(f"{value:.2e}".split("e")[1])  # of what it rounds to: 99.96 is 100
    return f"{value:.{max(0, 2 - exponent)}f}"


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def variants(rows: list[Row]) -> list[str]:
    """Ours first, then the others as they come."""
    return list(dict.fromkeys(["lvtp", *(v for row in rows for v in (*row.seconds, *row.errors))]))


def label(row: Row) -> list[str]:
    return [row.model, row.size, row.dtype]


def cell(row: Row, variant: str, scale: float) -> str:
    seconds = row.seconds.get(variant)
    if seconds is None:
        return "failed" if variant in row.errors else "-"
    text = digits(seconds * scale)
    return f"{text} ({digits(seconds / row.ours)}x)" if variant != "lvtp" and row.ours else text


def roofline(row: Row, scale: float) -> str:
    if row.least is None:
        return "-"
    share = f" ({100 * row.least / row.ours:.0f}%)" if row.ours else ""
    return digits(row.least * scale) + share


def grid(rows: list[Row], run: Run, about: list[str], names: Callable[[Row], list[str]], shown: list[str]) -> str:
    """Latencies: for each row its names, under `about`, then the variants shown and the roofline, where it is known."""
    unit, scale = UNITS[run.device]
    known = any(row.least is not None for row in rows)
    head = [*about, f"lvtp, {unit}", *shown[1:], *["at least"] * known]
    return table(head, [[*names(r), *(cell(r, v, scale) for v in shown), *[roofline(r, scale)] * known] for r in rows])


def times(run: Run, rows: list[Row]) -> str:
    return grid(rows, run, ["model", "B x N x D", "dtype"], label, variants(rows))


def headline(run: Run) -> str:
    """The selectors at the registered shapes, in the run's first dtype."""
    found = {}
    for row in run.rows:
        if row.name in SELECTORS and row.dtype == run.rows[0].dtype and row.shape in SHAPES and not row.input:
            found[row.name, row.shape] = row
    rows = sorted(found.values(), key=lambda row: SELECTORS.index(row.name))
    shown = [variant for variant in variants(rows) if variant != "one thread"]
    about = [run.rows[0].dtype, "model", "B x N x D"]
    return grid(rows, run, about, lambda r: [f"`{r.name}`", r.model, r.size], shown) if rows else ""


def costs(rows: list[Row]) -> str:
    """Memory and first calls, where a run has them."""
    rows = [row for row in rows if row.memory or row.first]
    if not rows:
        return ""
    shown = list(dict.fromkeys(v for row in rows for v in (*row.first, *row.memory)))

    def both(row: Row, variant: str) -> str:
        first, memory = row.first.get(variant), row.memory.get(variant)
        parts = [] if first is None else [f"{digits(first)} s"]
        parts += [] if memory is None else [f"{digits(memory / 2**20)} MiB"]
        return ", ".join(parts) or "-"

    head = ["model", "B x N x D", "dtype", *shown]
    about = "Until the first result, compiling and capturing included; and memory on top of the inputs."
    return f"\n\n{about}\n\n" + table(head, [[*label(row), *(both(row, v) for v in shown)] for row in rows])


def failures(rows: list[Row]) -> str:
    lines = [
        f"- {', '.join(label(row))}: {variant} failed: {why.splitlines()[0]}"
        for row in rows
        for variant, why in row.errors.items()
    ]
    return "\n\n" + "\n".join(lines) if lines else ""


def missing(run: Run) -> str:
    """What bench.shapes registers and this run does not have, by operator."""
    found = {row.dtype for row in run.rows}
    lines = [f"- {dtype}: any operator" for dtype in DTYPES if dtype not in found]
    timed = {(row.name, row.dtype, row.size) for row in run.rows if row.ours and not row.input}
    for name in OPERATORS:
        dtypes = [dtype for dtype in DTYPES if dtype in found and (dtype == "float32" or not fp32_only(name))]
        sizes = dict.fromkeys(Row(name, shape, "", "", {}).size for shape in SHAPES)
        left = {size: [d for d in dtypes if (name, d, size) not in timed] for size in sizes}
        some = [size + (f" in {' and '.join(d)}" if len(d) < len(dtypes) else "") for size, d in left.items() if d]
        if all(len(d) == len(dtypes) for d in left.values()):
            lines.append(f"- `{name}`: any shape")
        elif some:
            lines.append(f"- `{name}`: {'; '.join(some)}")
    about = "Registered, and not timed in this run"
    if run.device == "CPU":
        about += " (`make bench` leaves out what takes minutes or a matrix of 1 GiB; Triton runs on GPUs alone)"
    return f"{about}:\n\n" + "\n".join(lines) if lines else ""


def section(run: Run) -> str:
    names = [name for name in OPERATORS if any(row.name == name for row in run.rows)]
    parts = [f"### {run.machine}, {run.date}", f"Commit {run.commit}, {run.software}."]
    if run.device == "GPU":
        parts.append(
            "A time is of one replay of a CUDA graph or, where it says so, of one call. The features have just been "
            "written, as after a vision tower; *cold*: nothing of them is in a cache."
        )
    parts += [f"![{title}]({run.folder.name}/{name})" for name, title in charts.files(run).items()]
    parts += [headline(run), "Every operator, shape and dtype that was timed:"]
    for name in names:
        rows = [row for row in run.rows if row.name == name]
        parts.append(folded(f"<code>{name}</code>, {len(rows)} rows", times(run, rows) + costs(rows) + failures(rows)))
    return "\n\n".join(filter(None, (*parts, missing(run))))


def models(results: Path) -> list[str]:
    """Every prefill.json as it is: its rows' fields are the columns."""
    found = []
    for path in sorted(results.glob("*/prefill.json")):
        result = json.loads(path.read_text())
        head = list(dict.fromkeys(field for row in result["rows"] for field in row))
        values = [[row.get(field, "-") for field in head] for row in result["rows"]]
        lines = [[digits(v) if isinstance(v, float) else str(v) for v in each] for each in values]
        rest = {field: v for field, v in result.items() if field not in ("machine", "date", "commit", "rows")}
        about = (
            ", ".join([f"Commit {runs.short(result['commit'])}", *(f"{field} {v}" for field, v in rest.items())]) + "."
        )
        found.append(f"### {result['machine']}, {result['date']}\n\n{about}\n\n{table(head, lines)}")
    return found


def page(results: Path) -> str:
    found = runs.read(results)
    parts = {device: [section(run) for run in found if run.device == device] for device in UNITS}
    parts["models"] = models(results)
    text = {part: "\n\n".join(sections) or NOTHING[part] for part, sections in parts.items()}
    return PAGE.format(cpu=text["CPU"], gpu=text["GPU"], models=text["models"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=runs.RESULTS)
    results = parser.parse_args().results
    for run in runs.read(results):
        charts.draw(run)
    (results / "README.md").write_text(page(results))
    print(results / "README.md")


if __name__ == "__main__":
    main()
