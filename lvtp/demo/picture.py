"""The picture: the photograph, the importance map, and what each selector keeps at each budget."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageFilter
from torch import Tensor

from lvtp.demo.photo import GRID

CELL = 18  # output pixels a patch; with GRID, the side of a panel
DPI = 100
SIDE, MARGIN, GAP, TITLE, HEADER = CELL * GRID, 28, 24, 34, 92  # pixels
BACKGROUND, TEXT, MUTED = "#12161d", "#f1f3f5", "#9aa5b1"
DIM = 0.4  # brightness of a dropped patch
NUMBERED = 16  # at most as many picks get their number drawn: more would not be read


@dataclass(frozen=True)
class Panel:
    """The kept patches of one selector at one budget."""

    title: str
    note: str  # what the frames mean
    picks: Tensor  # int64 [K], in the order to number them
    colours: list[tuple[float, ...]]  # one RGBA a pick
    numbered: bool = False


def order_panel(title: str, picks: Tensor) -> Panel:
    """Frames run from yellow (first pick) to violet (last): for a selector whose order means something."""
    ramp = matplotlib.colormaps["plasma_r"](np.linspace(0.05, 0.65, len(picks)))
    numbered = len(picks) <= NUMBERED
    note = "numbered as picked" if numbered else "yellow first, violet last"
    return Panel(title, note, picks, [tuple(c) for c in ramp], numbered)


def group_panel(title: str, picks: Tensor, labels: Tensor) -> Panel:
    """Frames of one colour share a group. labels: int64 [N]."""
    groups = int(labels.max()) + 1
    wheel = matplotlib.colormaps["hsv"](np.arange(groups) / groups)
    wheel[:, :3] = 0.3 + 0.7 * wheel[:, :3]  # pastel: pure blue is unreadable on dark
    return Panel(title, "frame colour: group", picks, [tuple(wheel[g]) for g in labels[picks]])


def draw(path: Path, photo: Image.Image, importance: Tensor, rows: list[list[Panel]], title: str, source: str) -> None:
    """Write a PNG: photograph and importance map on the left, one row of panels a selector beside them.

    importance [N], any scale; `source` says where features and importance come from.
    """
    columns = 1 + len(rows[0])
    width = 2 * MARGIN + columns * SIDE + (columns - 1) * GAP
    height = HEADER + len(rows) * (TITLE + SIDE) + (len(rows) - 1) * GAP + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    figure.text(MARGIN / width, 1 - 22 / height, title, color=TEXT, size=20, weight="bold", va="top")
    figure.text(MARGIN / width, 1 - 58 / height, source, color=MUTED, size=12.5, va="top")

    def axes(row: int, column: int, heading: str, note: str = "") -> Axes:
        left, top = panel_origin(row, column)
        ax = figure.add_axes((left / width, 1 - (top + SIDE) / height, SIDE / width, SIDE / height))
        ax.set_axis_off()
        ax.text(0, -9, heading, color=TEXT, size=13.5, weight="bold", va="bottom")
        ax.text(SIDE, -9, note, color=MUTED, size=10, va="bottom", ha="right")
        return ax

    rgb, dimmed = _bright_and_dim(photo)
    _show(axes(0, 0, f"Photograph, {GRID * GRID} tokens"), rgb)
    _show(axes(1, 0, "Importance"), _heat(importance, dimmed))
    for r, panels in enumerate(rows):
        for c, panel in enumerate(panels, 1):
            _show_panel(axes(r, c, panel.title, panel.note), panel, rgb, dimmed)
    _save(figure, path)


def panel_origin(row: int, column: int) -> tuple[int, int]:
    """Left and top pixel of a panel's image."""
    return MARGIN + column * (SIDE + GAP), HEADER + TITLE + row * (SIDE + TITLE + GAP)


def keep_patches(rgb: np.ndarray, dimmed: np.ndarray, picks: Tensor) -> np.ndarray:
    """`rgb` where a patch is picked, `dimmed` elsewhere; both uint8 [SIDE, SIDE, 3]."""
    kept = torch.zeros(GRID * GRID, dtype=torch.bool)
    kept[picks] = True
    mask = kept.view(GRID, GRID).numpy().repeat(CELL, 0).repeat(CELL, 1)
    return np.where(mask[..., None], rgb, dimmed)


def _bright_and_dim(photo: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """The photograph at panel size, and its grey, dark, slightly blurred twin (blur also keeps the PNG small)."""
    large = photo.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    grey = large.convert("L").filter(ImageFilter.GaussianBlur(1.5))
    dim = _posterise(np.asarray(grey, dtype=np.float32) * DIM + 14)
    return np.asarray(large), dim[..., None].repeat(3, -1)


def _heat(importance: Tensor, dimmed: np.ndarray) -> np.ndarray:
    """Importance [N] as colour over the dim photograph, uint8 [SIDE, SIDE, 3]."""
    low, high = importance.aminmax()
    unit = ((importance - low) / (high - low).clamp_min(1e-9)).float().view(GRID, GRID).numpy()
    colour = matplotlib.colormaps["inferno"](unit)[..., :3].repeat(CELL, 0).repeat(CELL, 1) * 255
    return _posterise((0.7 * colour + 0.75 * dimmed).clip(0, 255))


def _posterise(pixels: np.ndarray) -> np.ndarray:
    """To uint8 in steps of 4: not seen in these backgrounds, and it takes a sixth off the PNG."""
    return (pixels.astype(np.uint8) // 4) * 4


def _show(ax: Axes, pixels: np.ndarray) -> None:
    ax.imshow(pixels, interpolation="none", extent=(0, SIDE, SIDE, 0))


def _show_panel(ax: Axes, panel: Panel, rgb: np.ndarray, dimmed: np.ndarray) -> None:
    _show(ax, keep_patches(rgb, dimmed, panel.picks))
    tokens = panel.picks.tolist()
    for token, colour in zip(tokens, panel.colours, strict=True):
        y, x = divmod(token, GRID)
        corner = (x * CELL + 0.5, y * CELL + 0.5)
        ax.add_patch(Rectangle(corner, CELL - 1, CELL - 1, fill=False, edgecolor=colour, linewidth=0.8))
    if panel.numbered:
        for order, (y, x) in enumerate(number_cells(tokens), 1):
            ax.text((x + 0.5) * CELL, (y + 0.5) * CELL, order, color=TEXT, size=8, weight="bold", ha="center",
                    va="center_baseline")  # fmt: skip


def number_cells(tokens: list[int]) -> list[tuple[int, int]]:
    """(row, column) of a free cell beside each token, where its number hides neither a kept patch nor a number."""
    busy = {divmod(token, GRID) for token in tokens}
    cells = []
    for y, x in map(divmod, tokens, [GRID] * len(tokens)):
        beside = [(y, x + 1), (y, x - 1), (y - 1, x), (y + 1, x), (y - 1, x + 1), (y + 1, x + 1), (y - 1, x - 1)]
        inside = [c for c in beside if 0 <= c[0] < GRID and 0 <= c[1] < GRID]
        cells.append(next((c for c in inside if c not in busy), (y, x)))
        busy.add(cells[-1])
    return cells


def _save(figure: Figure, path: Path) -> None:
    """PNG with Pillow's optimiser: 13% smaller than matplotlib's own."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    Image.fromarray(pixels).save(path, optimize=True)
