import pytest
import torch

import lvtp.hf

from .oracle import relative_error
from .tiny import visual
from .tiny_llava import BATCHES, assemble, batch, build

KEEP = 3
TWO_AND_ONE = BATCHES["two_and_one"]


def after(mask):
    """[B]: columns of padding after the last token of each row."""
    return (mask.flip(1).cumsum(1) == 0).sum(1)


@pytest.mark.parametrize("ratio", [False, True])
def test_keeping_everything_is_bitwise_the_unpruned_model(case, rows, ratio):
    member, variant = case
    inputs = member.batch(rows)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    wanted = member.model(**inputs)
    for positions in ("compact", "original")[: 1 + (variant.get("scope") != "crop")]:
        keep = 1.0 if ratio else member.everything
        with lvtp.hf.prune(member.model, keep=keep, positions=positions, **variant) as pruning:
            got = member.model(**inputs)
        assert torch.equal(got.logits, wanted.logits)
        assert torch.equal(got.loss, wanted.loss)
        assert torch.equal(pruning.last.kept, inputs["attention_mask"].bool())


@pytest.mark.parametrize(
    ("method", "positions"), [("id_selection", "compact"), ("prune_sid", "compact"), ("id_selection", "original")]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_the_oracle(case, rows, method, positions, side):
    member, variant = case
    inputs = member.batch(rows, side=side)
    if positions == "original" and variant.get("scope") == "crop":  # crops have no places in the prompt
        with pytest.raises(ValueError, match="positions must be 'compact' with scope='crop'"):
            lvtp.hf.prepare(member.model, inputs, positions=positions, **variant)
        return
    oracle = member.assemble(inputs, KEEP, positions, method, **variant)
    wanted = oracle.logits(member.model)[oracle.mask.bool()]
    with lvtp.hf.prune(member.model, method, KEEP, positions=positions, **variant) as pruning:
        logits = member.model(**inputs).logits
    prepared = lvtp.hf.prepare(member.model, inputs, method=method, keep=KEEP, positions=positions, **variant)
    unpadded = prepared["attention_mask"].bool()
    assert relative_error(logits[unpadded], wanted) <= 1e-5
    for row, columns in enumerate(oracle.kept):
        assert pruning.last.kept[row].nonzero().flatten().tolist() == columns
    assert pruning.last.next_position.tolist() == oracle.next_position
    assert ("position_ids" in prepared) == (member.axes or positions == "original")
    if "position_ids" in prepared:
        assert torch.equal(prepared["position_ids"][..., unpadded], oracle.positions[..., oracle.mask.bool()])
    if side == "right":
        assert torch.equal(after(prepared["attention_mask"]), after(inputs["attention_mask"]))


def test_pruning_changes_the_logits(case):
    """The control: without it, every comparison here would pass on a model that ignores its images."""
    member, variant = case
    inputs = member.batch("ragged")
    full = member.model(**inputs).logits[[0, 2], -1]
    with lvtp.hf.prune(member.model, keep=KEEP, **variant):
        pruned = member.model(**inputs).logits[[0, 2], -1]
    assert (full - pruned).abs().amax(dim=-1).min() > 0.1


def test_policies_and_scopes_differ(member):
    """A variant that did nothing would pass every other test."""
    inputs = member.batch("ragged")
    logits = []
    for variant in member.variants:
        with lvtp.hf.prune(member.model, keep=KEEP, **variant):
            logits.append(member.model(**inputs).logits[0, -1])
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 0.01 for other in logits[:i])


def test_order_of_the_tokens_matters_so_they_stay_in_raster_order(member):
    inputs = member.batch("single")
    with lvtp.hf.prune(member.model, keep=KEEP) as pruning:
        logits = member.model(**inputs).logits
    for indices in pruning.last.indices:
        assert indices.tolist() == sorted(indices.tolist())
    prepared = lvtp.hf.prepare(member.model, inputs, keep=KEEP)
    outputs = prepared["mm_encoder_outputs"]["image"]
    flipped = [image.flip(0) for image in outputs.pooler_output]
    outputs.pooler_output = torch.stack(flipped) if isinstance(outputs.pooler_output, torch.Tensor) else flipped
    assert (member.model(**prepared).logits - logits).abs().max() > 0.1


def test_original_positions_differ_from_compact_ones(member):
    inputs = member.batch("single")
    with lvtp.hf.prune(member.model, keep=KEEP, positions="compact"):
        compact = member.model(**inputs).logits
    with lvtp.hf.prune(member.model, keep=KEEP, positions="original"):
        original = member.model(**inputs).logits
    assert (compact - original).abs().max() > 0.1


@pytest.mark.parametrize("with_mask", [True, False])
def test_original_positions_without_cache_are_not_read_as_packed_sequences(member, with_mask):
    inputs = member.batch("single")
    wanted = member.assemble(inputs, KEEP, "original").logits(member.model)
    if not with_mask:
        del inputs["attention_mask"]
    with lvtp.hf.prune(member.model, keep=KEEP, positions="original"):
        got = member.model(**inputs, use_cache=False).logits
    assert relative_error(got, wanted) <= 1e-5


def test_given_positions_are_kept_with_their_tokens(model):
    inputs = batch(model, [3, "image", 5])
    inputs["position_ids"] = 2 * torch.arange(inputs["input_ids"].shape[1])[None]
    prepared = lvtp.hf.prepare(model, inputs, keep=KEEP, positions="original")
    kept = lvtp.hf.prepare(model, batch(model, [3, "image", 5]), keep=KEEP, positions="original")["position_ids"]
    assert torch.equal(prepared["position_ids"], 2 * kept)
    with pytest.raises(ValueError, match="position_ids"):
        lvtp.hf.prepare(model, inputs, keep=KEEP)


@pytest.mark.parametrize(("keep", "count"), [(1, 1), (7, 7), (0.5, 8), (0.01, 1), (0.28, 4), (0.99, 16), (16, 16)])
def test_budget(model, keep, count):
    inputs = batch(model, *TWO_AND_ONE)
    with lvtp.hf.prune(model, keep=keep) as pruning:
        model(**inputs)
    assert pruning.last.counts == (count,) * 3
    assert [len(index) for index in pruning.last.indices] == [count] * 3
    assert pruning.last.scope == "image"
    assert pruning.last.positions == "compact"


def loss_labels(member, inputs, oracle):
    """Labels of the text, as the call has them and as the pruned prompt does."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = ids.masked_fill(visual(ids) | ~real, -100)
    pruned = torch.full_like(oracle.mask, -100)
    for row, columns in enumerate(oracle.kept):
        pruned[row, -len(columns) :] = labels[row, columns]
    return labels, pruned


def test_loss_drops_only_the_labels_of_placeholders(case):
    member, variant = case
    inputs = member.batch("two_and_one")
    oracle = member.assemble(inputs, KEEP, **variant)
    labels, wanted_labels = loss_labels(member, inputs, oracle)
    prepared = lvtp.hf.prepare(member.model, {**inputs, "labels": labels}, keep=KEEP, **variant)
    for row in range(len(labels)):
        assert prepared["labels"][row][prepared["labels"][row] >= 0].equal(labels[row][labels[row] >= 0])
    assert (prepared["labels"][prepared["attention_mask"] == 0] == -100).all()
    wanted = oracle.loss(member.model, wanted_labels)
    with lvtp.hf.prune(member.model, keep=KEEP, **variant):
        got = member.model(**inputs, labels=labels).loss
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


def test_gradients_equal_the_oracle(case):
    member, variant = case
    model, inputs = member.model, member.batch("ragged")
    oracle = member.assemble(inputs, KEEP, **variant)
    labels, wanted_labels = loss_labels(member, inputs, oracle)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        model.zero_grad()
        return found

    wanted = gradients(oracle.loss(model, wanted_labels))
    with lvtp.hf.prune(model, keep=KEEP, **variant):
        got = gradients(model(**inputs, labels=labels).loss)
    assert any(name.startswith(f"model.{member.tower}.") for name in got)
    scale = max(gradient.abs().max() for gradient in wanted.values())
    for name in wanted.keys() | got.keys():
        zero = torch.zeros(())
        one, other = got.get(name, zero), wanted.get(name, zero)
        torch.testing.assert_close(
            one.expand_as(other + one), other.expand_as(other + one), rtol=1e-4, atol=1e-5 * scale.item()
        )


def test_positional_arguments(model):
    inputs = batch(model, [3, "image", 5])
    with lvtp.hf.prune(model, keep=KEEP):
        wanted = model(**inputs).logits
        got = model(inputs["input_ids"], inputs["pixel_values"], attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(got, wanted)


def test_prepare_changes_neither_model_nor_inputs(case):
    member, variant = case
    inputs = member.batch("ragged")
    before = {name: (value, value.clone()) for name, value in inputs.items()}
    prepared = lvtp.hf.prepare(member.model, inputs, keep=KEEP, **variant)
    along = {name for name, value in inputs.items() if value.shape == inputs["input_ids"].shape}
    assert prepared.keys() == along | {"mm_encoder_outputs"} | ({"position_ids"} if member.axes else set())
    assert inputs.keys() == before.keys()
    for name, (value, copy) in before.items():
        assert inputs[name] is value
        assert torch.equal(value, copy)
    with lvtp.hf.prune(member.model, keep=KEEP, **variant):
        assert torch.equal(member.model(**inputs).logits, member.model(**prepared).logits)


def test_576_tokens():
    """The true token count: 64 of 576 equal the oracle, 576 are bitwise the unpruned model."""
    model = build(image_size=48, patch_size=2)
    inputs = batch(model, [3, "image", 5], [4, "image", 2, "image", 6])
    oracle = assemble(model, inputs, 64)
    with torch.no_grad(), lvtp.hf.prune(model, keep=64) as pruning:
        got = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=4)
    assert pruning.last.counts == (64, 64, 64)
    assert relative_error(got, oracle.logits(model), oracle.mask) <= 1e-5
    assert tokens[:, inputs["input_ids"].shape[1] :].equal(oracle.greedy(model, 4))
    with torch.no_grad(), lvtp.hf.prune(model, keep=576):
        got = model(**inputs).logits
    with torch.no_grad():
        assert torch.equal(got, model(**inputs).logits)


def make_holes(inputs):
    """Hides the last text token but one of each prompt."""
    for row, text in enumerate(~visual(inputs["input_ids"]) & inputs["attention_mask"].bool()):
        inputs["attention_mask"][row, text.nonzero()[-2]] = 0


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("holes", [False, True])
def test_a_prompt_does_not_depend_on_the_others_of_its_batch(member, positions, holes):
    """One keeps every token of its image, one has no image, others lose tokens."""
    model, rows = member.model, [member.batches["padded"][1], *member.batches["ragged"]]
    inputs = member.tiny.batch(model, *rows)
    if holes:
        mask = inputs["attention_mask"].clone()
        make_holes(inputs)
        if member.axes:  # a call without images is numbered otherwise, pruned or not
            inputs["attention_mask"][2] = mask[2]
    with lvtp.hf.prune(model, keep=1.0) as pruning:
        model(**member.alone(rows, 0, inputs))
    budget = lvtp.Budget(sum(pruning.last.counts), dynamic=False)
    with torch.no_grad(), lvtp.hf.prune(model, keep=budget, positions=positions) as pruning:
        logits, last = model(**inputs).logits, pruning.last
        tokens = model.generate(**inputs, max_new_tokens=2)[:, -2:]
        lost = [int(inputs["attention_mask"][row].sum() - last.kept[row].sum()) for row in range(len(rows))]
        assert lost[0] == lost[2] == 0 < lost[1]
        for row in range(len(rows)):
            call = member.alone(rows, row, inputs)
            alone = model(**call).logits[0]
            mask = lvtp.hf.prepare(model, call, keep=budget, positions=positions)["attention_mask"][0]
            assert relative_error(logits[row, -len(alone) :], alone, mask) <= 1e-5
            assert torch.equal(model.generate(**call, max_new_tokens=2)[0, -2:], tokens[row])


@pytest.mark.parametrize("generating", [False, True])
def test_masked_tokens_inside_a_prompt_are_numbered_as_the_unpruned_call_numbers_them(member, generating):
    """The oracle: the whole prompt, in which nobody sees what pruning drops.

    `model(...)` counts what the mask hides, `generate` does not, and Qwen-VL's own positions never do.
    """
    model, inputs = member.model, member.batch("ragged")
    make_holes(inputs)
    mask = inputs["attention_mask"]
    with torch.no_grad(), lvtp.hf.prune(model, keep=KEEP, positions="original") as pruning:
        if generating:
            options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 1}
            got = model.generate(**inputs, **options).logits[0]
        else:
            got = model(**inputs).logits[:, -1]
    if member.axes:
        counted = {name: value for name, value in inputs.items() if "pixel" not in name}
        numbers, _ = model.model.get_rope_index(**counted)
    else:
        numbers = (mask.cumsum(1) - 1).clamp(min=0) if generating else torch.arange(mask.shape[1])[None]
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    visible = (causal & pruning.last.kept[:, None]) | torch.eye(len(causal), dtype=torch.bool)
    with torch.no_grad():
        whole = {**inputs, "attention_mask": visible[:, None], "position_ids": numbers}
        assert relative_error(got, model(**whole, use_cache=False).logits[:, -1]) <= 1e-5
