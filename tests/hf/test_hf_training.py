"""Batches as trainers make them: padded on both sides, packed into one row, with labels."""

import pytest
import torch

import lvtp.hf

from .oracle import relative_error
from .tiny import visual
from .tiny_llava import batch

KEEP = 3
POSITIONS = ("compact", "original")


def with_completions(inputs, lengths):
    """The prompts, padded on the left; after each, a completion of that many random tokens, padded on the right."""
    generator = torch.Generator().manual_seed(5)
    new = torch.randint(2, 100, (len(lengths), max(lengths)), generator=generator)
    new = torch.nn.functional.pad(new, (0, 1))  # a column that none fills
    mask = (torch.arange(new.shape[1]) < torch.tensor(lengths)[:, None]).long()
    added = {"input_ids": new * mask, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(mask)}
    return {
        name: torch.cat([value, added[name].to(value.dtype)], dim=1) if name in added else value
        for name, value in inputs.items()
    }


# ------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("rows", ["ragged", "single"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_after_a_completion_stays_there(member, rows, positions):
    """Trainers that sample completions read the last columns of the logits."""
    model, prompts = member.model, member.batch(rows)
    lengths = [6, 2, 3] if rows == "ragged" else [4]
    inputs, width = with_completions(prompts, lengths), max(lengths) + 1  # no completion fills the last column
    with torch.no_grad(), lvtp.hf.prune(model, keep=KEEP, positions=positions):
        together = model(**inputs, logits_to_keep=width + 1).logits[:, -width - 1 : -1]
        for row, length in enumerate(lengths):
            alone = model(**member.alone(rows, row, inputs)).logits[0, -length - 1 : -1]
            assert relative_error(together[row, :length], alone) <= 1e-5


def test_labels_let_a_batch_be_as_narrow_as_its_longest_prompt(model):
    """Else a short prompt without images would keep the batch as wide as before."""
    inputs = batch(model, [3, "image", "image", 5], [9], side="right")
    wide = lvtp.hf.prepare(model, inputs, keep=KEEP)["attention_mask"]
    assert wide.tolist()[1] == [1] * 9 + [0] * 31
    labels = inputs["input_ids"].masked_fill(visual(inputs["input_ids"]), -100)
    narrow = lvtp.hf.prepare(model, {**inputs, "labels": labels}, keep=KEEP)["attention_mask"]
    assert narrow.tolist() == [[1] * 14, [1] * 9 + [0] * 5]
