"""The families that go through the shared tests: a tiny model each, its inputs, and its pruned prompts made by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType

import torch

from . import oracle_qwen, tiny_anyres, tiny_internvl, tiny_llava, tiny_qwen


@dataclass(frozen=True)
class Member:
    name: str
    # Holds `batch(model, *rows, side, seed)`: the arguments of a call; `shares(row)`: how many entries of each argument
    # that is not along the prompt are a row's.
    tiny: ModuleType
    build: Callable  # (**options) -> model
    oracle: Callable  # (model, inputs, k, positions, method, **variant) -> Oracle
    batches: dict  # single, padded, two_and_one, text_only_row, ragged: rows for `batch`
    everything: int  # a `keep` that no image has more tokens than
    scored: str  # the layer of the tower whose attention is the importance
    variants: tuple[dict, ...] = ({},)  # the scopes and newline policies it has, as options of prune; default first
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    axes: bool = False  # whether positions have several, which are passed on with every pruned call

    @cached_property
    def model(self):
        """One for all tests, which leave it as it is."""
        model = self.build()
        with torch.no_grad():  # transformers leaves hooks of its own at the first call
            model(**self.tiny.batch(model, *self.batches["ragged"]))
        return model

    def module(self, name):
        """ "tower", "projector", "scored" or "language_model"."""
        return self.model.model.get_submodule(getattr(self, name, name))

    def batch(self, rows, **options):
        return self.tiny.batch(self.model, *self.batches[rows], **options)

    def alone(self, rows, row, inputs):
        """The call of one prompt of the batch `inputs`, without its padding; `rows`: as for `tiny.batch`, or a name."""
        rows = self.batches[rows] if isinstance(rows, str) else rows
        real, shares = inputs["attention_mask"][row].nonzero(), list(map(self.tiny.shares, rows))
        alone = {}
        for name, value in inputs.items():
            if value.shape == inputs["input_ids"].shape:
                alone[name] = value[row : row + 1, real.min() : real.max() + 1]
            elif shares[row][name]:
                start = sum(share[name] for share in shares[:row])
                alone[name] = value[start : start + shares[row][name]]
        return alone

    def assemble(self, inputs, k, *args, **options):
        return self.oracle(self.model, inputs, k, *args, **options)


_NEWLINES = ({}, {"newline": "drop"}, {"newline": "all"}, {"scope": "crop"})

LLAVA = Member(
    "llava", tiny_llava, tiny_llava.build, tiny_llava.assemble, tiny_llava.BATCHES, 16,
    "vision_tower.encoder.layers.1.self_attn",
)  # fmt: skip
NEXT = Member(
    "llava_next", tiny_anyres, tiny_anyres.build_next, tiny_anyres.assemble, tiny_anyres.BATCHES_NEXT, 80,
    "vision_tower.encoder.layers.1.self_attn", _NEWLINES,
)  # fmt: skip
ONEVISION = Member(
    "llava_onevision", tiny_anyres, tiny_anyres.build_onevision, tiny_anyres.assemble, tiny_anyres.BATCHES_ONEVISION,
    41, "vision_tower.encoder.layers.2.self_attn", (*_NEWLINES, {"scope": "frame"}),
)  # fmt: skip
INTERNVL = Member(
    "internvl", tiny_internvl, tiny_internvl.build, tiny_internvl.assemble, tiny_internvl.BATCHES, 16,
    "vision_tower.encoder.layer.2.attention",
)  # fmt: skip


def _qwen(family, scored):
    return Member(
        family, tiny_qwen, partial(tiny_qwen.build, family), oracle_qwen.assemble, tiny_qwen.BATCHES, 18,
        f"visual.blocks.{scored}.attn", ({}, {"scope": "frame"}), "visual", "visual.merger", axes=True,
    )  # fmt: skip


QWENS = (_qwen("qwen2", 3), _qwen("qwen2_5", 2), _qwen("qwen3", 3), _qwen("qwen3_moe", 3))
TOWERS = (LLAVA, NEXT, ONEVISION, INTERNVL)  # with a CLIP-like tower and a projector
MEMBERS = (*TOWERS, *QWENS)
