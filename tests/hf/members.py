"""The families that go through the shared tests: a tiny model each, its inputs, and its pruned prompts made by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch

from . import tiny_anyres, tiny_internvl, tiny_llava


@dataclass(frozen=True)
class Member:
    name: str
    # Holds `batch(model, *rows, side, seed)`: the arguments of a call; `assemble(model, inputs, k, positions, method,
    # scope, newline)`: its Oracle; `count(kind, row)`: how many of its pixel tensors, "image" or "video", are a row's.
    tiny: ModuleType
    build: Callable  # (**options) -> model
    batches: dict  # single, padded, two_and_one, text_only_row, ragged: rows for `batch`
    everything: int  # a `keep` that no image has more tokens than
    variants: tuple[dict, ...] = ({},)  # the scopes and newline policies it has, as options of prune; default first

    @cached_property
    def model(self):
        """One for all tests, which leave it as it is."""
        model = self.build()
        with torch.no_grad():  # transformers leaves hooks of its own at the first call
            model(**self.tiny.batch(model, *self.batches["ragged"]))
        return model

    def batch(self, rows, **options):
        return self.tiny.batch(self.model, *self.batches[rows], **options)

    def assemble(self, inputs, k, *args, **options):
        return self.tiny.assemble(self.model, inputs, k, *args, **options)


_NEWLINES = ({}, {"newline": "drop"}, {"newline": "all"}, {"scope": "crop"})

MEMBERS = (
    Member("llava", tiny_llava, tiny_llava.build, tiny_llava.BATCHES, 16),
    Member("llava_next", tiny_anyres, tiny_anyres.build_next, tiny_anyres.BATCHES_NEXT, 80, _NEWLINES),
    Member(
        "llava_onevision", tiny_anyres, tiny_anyres.build_onevision, tiny_anyres.BATCHES_ONEVISION, 41,
        (*_NEWLINES, {"scope": "frame"}),
    ),
    Member("internvl", tiny_internvl, tiny_internvl.build, tiny_internvl.BATCHES, 16),
)  # fmt: skip
