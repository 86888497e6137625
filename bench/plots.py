"""How the plots of every report look: transparent, in mid-tones that read on a light page and on a dark one."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

TEXT = "#808080"
COLOURS = ("#2f7ed8", "#e4572e", "#2e9e5b", "#a463d6", "#c98a00", "#12a3b4", "#8c6d5a")
MARKERS = "osD^vPX"

plt.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "savefig.transparent": True,
        "savefig.dpi": 130,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
        "grid.color": TEXT,
    }
)


def save(figure, path: Path, caption: str) -> None:
    """The caption, below everything else, says where the figures come from."""
    figure.supxlabel(caption, fontsize=7, color=TEXT)
    figure.savefig(path)
    plt.close(figure)
