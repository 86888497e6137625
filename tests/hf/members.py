"""The families that go through the shared tests: a tiny model each, its inputs, and its pruned prompts made by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from . import tiny_anyres, tiny_internvl, tiny_llava


@dataclass(frozen=True)
class Member:
    name: str
    build: Callable  # (**options) -> model
    inputs: Callable  # (model, *rows, side, seed) -> the arguments of a call
    pruned: Callable  # (model, inputs, k, positions, method, scope, newline) -> Oracle
    batches: dict  # single, padded, two_and_one, text_only_row, ragged: rows for `inputs`
    everything: int  # a `keep` that no image has more tokens than
    variants: tuple[dict, ...] = ({},)  # the scopes and newline policies it has, as options of prune; default first
    original: bool = True  # whether positions="original" is tested too
    pixels: tuple[str, ...] = field(default=("pixel_values",))

    @cached_property
    def model(self):
        """One for all tests, which leave it as it is."""
        return self.build()

    def batch(self, rows, **options):
        """`rows`: a name out of `batches`, or rows."""
        return self.inputs(self.model, *(self.batches[rows] if isinstance(rows, str) else rows), **options)

    def assemble(self, inputs, k, positions="compact", method="id_selection", scope="image", newline=None):
        return self.pruned(self.model, inputs, k, positions, method, scope, newline)


_NEWLINES = ({"newline": "drop"}, {"newline": "all"})

MEMBERS = (
    Member("llava", tiny_llava.build, tiny_llava.batch, tiny_llava.assemble, tiny_llava.BATCHES, 16),
    Member(
        "llava_next", tiny_anyres.build_next, tiny_anyres.batch, tiny_anyres.assemble, tiny_anyres.BATCHES_NEXT, 80,
        variants=({}, *_NEWLINES, {"scope": "crop"}),
    ),
    Member(
        "llava_onevision", tiny_anyres.build_onevision, tiny_anyres.batch, tiny_anyres.assemble,
        tiny_anyres.BATCHES_ONEVISION, 41, variants=({}, *_NEWLINES, {"scope": "crop"}, {"scope": "frame"}),
        pixels=("pixel_values", "pixel_values_videos"),
    ),
    Member("internvl", tiny_internvl.build, tiny_internvl.batch, tiny_internvl.assemble, tiny_internvl.BATCHES, 16),
)  # fmt: skip
