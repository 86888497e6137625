"""The table under the picture, as text."""

import textwrap
from dataclasses import dataclass

NOTE_WIDTH = 100  # characters


@dataclass(frozen=True)
class Row:
    """One selector at one budget. Times in seconds; `flops_removed` a share of 1."""

    selector: str
    tokens: int
    selection: float
    loop: float
    prefill_before: float
    prefill_after: float
    flops_removed: float

    def cells(self) -> list[str]:
        return [
            self.selector,
            str(self.tokens),
            milliseconds(self.selection),
            milliseconds(self.loop),
            f"{self.loop / self.selection:.1f}x",
            milliseconds(self.prefill_before),
            milliseconds(self.prefill_after),
            f"{self.flops_removed:.1%}",
        ]


HEADINGS = [
    ["", "", "selection", "plain loop", "", "prefill", "prefill", "visual FLOPs"],
    ["selector", "tokens", "lvtp [1]", "[2]", "ratio", "before [3]", "after [3]", "removed [4]"],
]


def milliseconds(seconds: float) -> str:
    """Three significant digits or so: 0.123 ms, 12.3 ms, 123 ms."""
    ms = seconds * 1e3
    digits = 3 if ms < 1 else 2 if ms < 10 else 1 if ms < 100 else 0
    return f"{ms:.{digits}f} ms"


def render(rows: list[Row], notes: list[str], machine: str) -> str:
    """Aligned columns, then the numbered notes that the headings refer to, then the machine."""
    lines = [*HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(HEADINGS[0]))]
    # The selector's name reads from the left, numbers align on the right.
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    text.insert(len(HEADINGS), "-" * len(text[0]))
    numbered = [
        textwrap.fill(f"[{i}] {note}", NOTE_WIDTH, subsequent_indent="    ", break_long_words=False)
        for i, note in enumerate(notes, 1)
    ]
    return "\n".join([*text, "", *numbered, f"Machine: {machine}."])
