"""Batches as trainers make them: padded on both sides, packed into one row, with labels."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.functional import scaled_dot_product_attention
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lvtp.hf

from .members import LLAVA, QWENS
from .oracle import relative_error
from .tiny import IMAGE_TOKEN, VIDEO_TOKEN, visual, with_completions
from .tiny_llava import batch

KEEP = 3
POSITIONS = ("compact", "original")


def samples(member, rows, inputs):
    """Every prompt of the batch alone, with labels of all its tokens."""
    alone = [member.alone(rows, row, inputs) for row in range(len(inputs["input_ids"]))]
    for sample in alone:
        del sample["attention_mask"]
        sample["labels"] = sample["input_ids"].clone()
    return alone


def check_mean(loss, outputs):
    """`loss` is the mean over all labels of the samples that gave the `outputs`; no first token is predicted."""
    counts = torch.tensor([out.logits.shape[1] - 1 for out in outputs])
    wanted = (torch.stack([out.loss for out in outputs]) * counts).sum() / counts.sum()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)


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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_padded_batch_is_its_samples_alone(member, positions, side):
    model, inputs = member.model, member.batch("ragged")
    alone = samples(member, "ragged", inputs)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0})), pad_token="<pad>")
    tokenizer.padding_side = side
    features = [{name: sample[name][0].tolist() for name in ("input_ids", "labels")} for sample in alone]
    together = dict(DataCollatorForSeq2Seq(tokenizer)(features))
    ids = together["input_ids"]
    together |= {name: value for name, value in inputs.items() if value.shape[-1] != inputs["input_ids"].shape[1]}
    if "mm_token_type_ids" in inputs:
        together["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int() + 2 * (ids == VIDEO_TOKEN).int()
    together["labels"][torch.arange(len(ids)), together["attention_mask"].argmax(1)] = -100  # as alone: not predicted
    with lvtp.hf.prune(model, keep=KEEP, positions=positions):
        loss, outputs = model(**together).loss, [model(**sample) for sample in alone]
    check_mean(loss, outputs)


@pytest.mark.parametrize("positions", POSITIONS)
def test_position_ids_that_number_tokens_through_change_nothing(model, positions):
    inputs = batch(model, [3, "image", 5], [2, "image", "image", 4])
    numbers = (inputs["attention_mask"].cumsum(1) - 1).masked_fill(inputs["attention_mask"] == 0, 1)
    with lvtp.hf.prune(model, keep=KEEP, positions=positions):
        wanted = model(**inputs).logits
        got = model(**inputs, position_ids=numbers).logits
    numbers[0, -1] += 1
    assert relative_error(got, wanted, lvtp.hf.prepare(model, inputs, keep=KEEP)["attention_mask"]) <= 1e-5
    if positions == "compact":
        with pytest.raises(ValueError, match=r"position_ids must be left out .* or number the tokens of every prompt"):
            lvtp.hf.prepare(model, {**inputs, "position_ids": numbers}, keep=KEEP, positions=positions)


# ------------------------------------------------------------------------------------------------------------- packing


def packed(member, rows, inputs, **options):
    """The prompts of a batch in one row, as transformers' collator packs them, and each of them alone."""
    alone = samples(member, rows, inputs)
    features = [{name: sample[name][0].tolist() for name in ("input_ids", "labels")} for sample in alone]
    row = dict(DataCollatorWithFlattening(return_tensors="pt", **options)(features))
    for name, value in inputs.items():
        if name == "mm_token_type_ids":
            row[name] = torch.cat([sample[name] for sample in alone], dim=1)
        elif value.shape != inputs["input_ids"].shape:
            row[name] = value
    return row, alone


def check_packed(model, row, alone, **options):
    """The logits of a packed row are those of its samples alone, and its loss is theirs."""
    with lvtp.hf.prune(model, **options) as pruning:
        together, kept = model(**row), pruning.last.kept
        outputs = [model(**sample) for sample in alone]
    logits = torch.cat([out.logits for out in outputs], dim=1)
    assert relative_error(together.logits, logits) <= 1e-5
    check_mean(together.loss, outputs)
    assert kept.shape == row["input_ids"].shape
    assert kept.sum() == logits.shape[1] < kept.numel()


FLASH = {"return_flash_attn_kwargs": True}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens", "seq_idx", "all"])
@pytest.mark.parametrize("rows", ["ragged", "single"])
def test_a_packed_row_is_its_samples_alone(member, rows, positions, told_by):
    """A row of one sample, too, as the last of an epoch may be."""
    inputs = member.batch(rows)
    options = FLASH if told_by in ("cu_seq_lens", "all") else {}
    row, alone = packed(member, rows, inputs, **options, return_seq_idx=told_by in ("seq_idx", "all"))
    if told_by in ("cu_seq_lens", "seq_idx"):
        del row["position_ids"]
    check_packed(member.model, row, alone, keep=KEEP, positions=positions)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("member", QWENS, ids=lambda member: member.name)
def test_a_packed_row_with_positions_on_all_axes(member, positions, axes):
    model, inputs = member.model, member.batch("ragged")
    row, alone = packed(member, "ragged", inputs)
    numbers = []
    for index, through in enumerate(sample["input_ids"].shape[1] for sample in alone):
        call = member.alone("ragged", index, inputs)
        known, _ = model.model.get_rope_index(**{name: call[name] for name in call if "pixel" not in name})
        numbers.append(torch.cat([torch.arange(through).expand(1, 1, -1), known])[-axes:])
    row["position_ids"] = torch.cat(numbers, dim=-1)
    check_packed(model, row, alone, keep=KEEP, positions=positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_budget_is_that_of_a_sample_and_no_sample_predicts_the_next(positions, attention):
    """The second sample begins with an image, of which the first token may drop."""
    model = LLAVA.build(attention=attention)
    rows = [[3, "image", 5], ["image", 4, "image", 2], [8]]
    row, alone = packed(LLAVA, rows, LLAVA.tiny.batch(model, *rows, seed=1))
    check_packed(model, row, alone, keep=lvtp.Budget(6), positions=positions)


@pytest.mark.parametrize("positions", POSITIONS)
def test_attention_is_told_where_the_samples_are_now(member, positions):
    """Kernels for rows of several lengths read by these, past the end of a row that is shorter."""
    model, inputs = member.model, member.batch("ragged")
    row, alone = packed(member, "ragged", inputs, return_seq_idx=True, **FLASH)
    seen = []
    layer = model.get_decoder().layers[0].self_attn
    hook = layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with lvtp.hf.prune(model, keep=KEEP, positions=positions) as pruning:
        model(**row)
    hook.remove()
    lengths = [part.sum() for part in pruning.last.kept[0].split([s["input_ids"].shape[1] for s in alone])]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    for name in ("q", "k"):
        assert seen[0][f"cu_seq_lens_{name}"].dtype == torch.int32
        assert torch.equal(seen[0][f"cu_seq_lens_{name}"].long(), ends)
        assert seen[0][f"max_length_{name}"] == max(lengths)
    assert torch.equal(seen[0]["seq_idx"][0].bincount(), ends.diff())


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("bounds", [True, False])
@pytest.mark.parametrize("member", [LLAVA, QWENS[1]], ids=lambda member: member.name)
def test_kernels_for_rows_of_several_lengths(member, positions, bounds):
    """As FlashAttention, they take bounds and no mask."""

    def attend(module, query, key, value, attention_mask, cu_seq_lens_q=None, **keywords):
        assert attention_mask is None
        if cu_seq_lens_q is None:
            cu_seq_lens_q = torch.tensor([0, query.shape[2]])
        parts = [states.split(cu_seq_lens_q.diff().tolist(), dim=2) for states in (query, key, value)]
        out = [
            scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in zip(*parts, strict=True)
        ]
        return torch.cat(out, dim=2).transpose(1, 2), None

    name = "lvtp_test_by_bounds"
    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        model = member.build()
        row, alone = packed(member, "ragged", member.batch("ragged"), **(FLASH if bounds else {}))
        model.set_attn_implementation({"text_config": name})
        check_packed(model, row, alone, keep=KEEP, positions=positions)
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def test_keeping_everything_is_bitwise_the_unpruned_packed_row(member):
    row, _ = packed(member, "ragged", member.batch("ragged"), **FLASH)
    with torch.no_grad():
        wanted = member.model(**row, use_cache=False)
        with lvtp.hf.prune(member.model, keep=1.0) as pruning:
            got = member.model(**row, use_cache=False)
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(got.loss, wanted.loss)
    assert pruning.last.kept.all()


def test_info_counts_samples(model):
    inputs = batch(model, [3, "image", 5], [2, "image", "image", 4])
    row, _ = packed(LLAVA, [[3, "image", 5], [2, "image", "image", 4]], inputs)
    wanted = lvtp.hf.info(model, inputs, keep=KEEP)
    got = lvtp.hf.info(model, row, keep=KEEP)
    assert got.prompt_tokens == wanted.prompt_tokens == ((24, 11), (38, 12))
    assert got.prefill_flops == wanted.prefill_flops
    assert [image.prompt for image in got.images] == [0, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cu_seq_lens_q": torch.tensor([0, 24, 60])},
            r"cu_seq_lens_q must rise from 0 to the 62 tokens .* got \[0, 24",
        ),
        ({"cu_seq_lens_k": torch.tensor([0, 20, 62])}, "cu_seq_lens_k must equal cu_seq_lens_q"),
        ({"seq_idx": torch.zeros(1, 9), "cu_seq_lens_q": None}, "seq_idx must have the shape of input_ids"),
        ({"attention_mask": torch.ones(1, 62).tril(60)}, "attention_mask must be left out, or hide nothing"),
    ],
    ids=["end", "keys", "shape", "mask"],
)
def test_bad_bounds_raise(model, change, message):
    rows = [[3, "image", 5], [2, "image", "image", 4]]
    row, _ = packed(LLAVA, rows, batch(model, *rows), **FLASH)
    row = {**row, **change}
    calls = [lambda: lvtp.hf.prepare(model, row, keep=KEEP), lambda: lvtp.hf.info(model, row, keep=KEEP)]
    with lvtp.hf.prune(model, keep=KEEP):
        for call in (*calls, lambda: model(**row)):
            with pytest.raises(ValueError, match=message):
                call()


def test_packed_samples_are_a_row_and_no_prompt_to_go_on_from(model):
    rows = [[3, "image", 5], [2, "image", "image", 4]]
    row, _ = packed(LLAVA, rows, batch(model, *rows))
    with (
        pytest.raises(ValueError, match="generate takes no packed samples, got 2 in one row"),
        lvtp.hf.prune(model, keep=KEEP),
    ):
        model.generate(**{name: row[name] for name in row if name != "labels"}, max_new_tokens=1)
    with pytest.raises(
        ValueError, match="cu_seq_lens_q must be left out unless all samples are packed in one row, got 2"
    ):
        lvtp.hf.prepare(model, {**batch(model, *rows), "cu_seq_lens_q": torch.tensor([0, 24, 76])}, keep=KEEP)
