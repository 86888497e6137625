"""A run's plots: latency as one dimension of the input grows, and how many times faster than what else there is."""

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from bench import plots
from bench.runs import Row, Run
from bench.shapes import OPERATORS, SELECTORS, SHAPES, WITHOUT_BUDGET, Shape

AXES = {"images": "images B", "tokens": "tokens N", "keep": "kept k"}
# A colour and a marker each, in every plot; what a graph replays and what is called one by one share them.
FAMILIES = ("lvtp", "reference", "eager", "published", "triton", "compiled")
PLAIN = StrMethodFormatter("{x:g}")  # 0.1, 1, 10
FEWEST = 3  # points of a curve


def style(variant: str) -> dict:
    if variant == "roofline":
        return {"color": plots.TEXT, "linestyle": ":"}
    if variant == "one thread":
        return {"color": plots.COLOURS[0], "linestyle": ":"}
    at = next((i for i, family in enumerate(FAMILIES) if variant.startswith(family)), len(FAMILIES))
    line = "--" if variant.endswith(", call") else "-." if variant.endswith(", cold") else "-"
    return {"color": plots.COLOURS[at], "marker": plots.MARKERS[at], "linestyle": line, "zorder": 3 if at == 0 else 2}


def sweep(run: Run, name: str, field: str) -> list[Row]:
    """The longest series of rows of one dtype and kind of input that differ in `field` alone."""
    series: dict[tuple, dict[int, Row]] = {}
    for row in run.rows:
        if row.name == name and not (field == "keep" and name in WITHOUT_BUDGET):
            same = row.shape._replace(model="", **{field: 0})
            # A GPU's compiled variants come in a second row, which has the first one's variants, too.
            series.setdefault((row.dtype, row.input, same), {})[getattr(row.shape, field)] = row
    longest = max(series.values(), key=len, default={})
    return [longest[value] for value in sorted(longest)] if len(longest) >= FEWEST else []


def sweeps(run: Run, name: str) -> dict[str, list[Row]]:
    return {field: rows for field in ("tokens", "keep", "images") if (rows := sweep(run, name, field))}


def points(rows: list[Row], field: str) -> dict[str, list[tuple[int, float]]]:
    """Variant -> its (value of the field, milliseconds)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        least = {} if row.least is None else {"roofline": row.least}
        for variant, seconds in (*row.seconds.items(), *least.items()):
            found.setdefault(variant, []).append((getattr(row.shape, field), 1e3 * seconds))
    return found


def legend(figure: Figure) -> None:
    """One for all panels, above them."""
    entries = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=6, fontsize=8, handlelength=3)


def latency(run: Run, name: str) -> Figure:
    """A panel for each dimension that a series of rows goes along."""
    found = sweeps(run, name)
    size = (max(7, 1.2 + 2.9 * len(found)), 3.9)  # captions take 7
    figure, axes = plots.plt.subplots(1, len(found), figsize=size, squeeze=False, sharey=True)
    for axis, (field, rows) in zip(axes[0], found.items(), strict=True):
        for variant, line in points(rows, field).items():
            axis.plot(*zip(*line, strict=True), label=variant, **style(variant))
        shape, dtype = rows[0].shape._asdict(), rows[0].dtype
        dimensions = [f for f in AXES if f != "keep" or name not in WITHOUT_BUDGET]
        fixed = [f"{AXES[f][-1]} = {shape[f]}" for f in dimensions if f != field]
        kind = [rows[0].input] if rows[0].input else []
        axis.set_title(", ".join([*fixed, f"D = {shape['features']}", dtype, *kind]), fontsize=8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        values = [getattr(row.shape, field) for row in rows]
        axis.set_xticks(values, [str(v) for v in values])
        axis.minorticks_off()
        axis.set_xlabel(AXES[field])
        low, high = axis.get_ylim()  # shared
        if high < 100 * low:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(PLAIN)
    axes[0, 0].set_ylabel(f"{name}: median latency, ms")
    legend(figure)
    return figure


def others(row: Row) -> list[str]:
    return [variant for variant in row.seconds if variant not in ("lvtp", "one thread")]


def compared(run: Run) -> dict[str, dict[Shape, Row]]:
    """The selectors' rows of registered shapes, in the run's first dtype, that have something beside ours."""
    found: dict[str, dict[Shape, Row]] = {}
    for row in run.rows:
        plain = row.shape in SHAPES and not row.input and row.dtype == run.rows[0].dtype
        if row.name in SELECTORS and plain and row.ours is not None and others(row):
            found.setdefault(row.name, {})[row.shape] = row
    return found


def speedups(run: Run) -> Figure:
    """For each shape, a bar for each variant: its time over that of ours."""
    found = compared(run)
    shapes = [shape for shape in SHAPES if any(shape in rows for rows in found.values())]
    bars = {shape: max(len(others(rows[shape])) for rows in found.values() if shape in rows) + 1 for shape in shapes}
    size = (8.6, 1.2 + 0.12 * sum(bars.values()))
    figure, axes = plots.plt.subplots(1, len(found), figsize=size, squeeze=False, sharey=True)
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        top, ticks = 0, []
        for shape in shapes:
            ticks.append(top + bars[shape] / 2 - 1)
            row = rows.get(shape)
            for at, variant in enumerate(others(row) if row else [], top):
                ratio, look = row.seconds[variant] / row.ours, style(variant)
                hatch = "////" if look["linestyle"] == "--" else None
                axis.barh(at, ratio - 1, left=1, height=0.9, color=look["color"], hatch=hatch, label=variant)
                axis.text(max(ratio, 1) * 1.05, at, f"{ratio:.3g}", va="center", fontsize=6)
            top += bars[shape]
        axis.set_yticks(ticks, [f"{shape.model}\n{shape.size}" for shape in shapes], fontsize=7)
        axis.tick_params(axis="y", length=0)
        axis.set_title(f"{name}, {run.rows[0].dtype}")
        axis.grid(axis="y", visible=False)
        axis.axvline(1, color=plots.TEXT, linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(PLAIN)
        axis.margins(x=0.12, y=0.01)
        axis.set_xlabel("how many times what lvtp takes")
    axes[0, 0].invert_yaxis()
    legend(figure)
    return figure


def files(run: Run) -> dict[str, str]:
    """Name of each plot's file -> what it shows."""
    found = {f"latency-{name}.png": f"{name}: latency by size" for name in OPERATORS if sweeps(run, name)}
    return found | ({"speedup.png": "speed-up over each alternative"} if compared(run) else {})


def draw(run: Run) -> None:
    for name in files(run):
        figure = speedups(run) if name == "speedup.png" else latency(run, name[len("latency-") : -len(".png")])
        how = "; a CUDA graph's replay, or, where it says so, a call" if run.device == "GPU" else ""
        plots.save(figure, run.folder / name, run.caption + how)
