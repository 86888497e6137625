import pytest
import torch

import lvtp.hf

from .oracle_llava import assemble, relative_error
from .tiny_llava import BATCHES, batch, build

KEEP = 5


def real_logits(logits, mask):
    return logits[mask.bool()]


@pytest.mark.parametrize("keep", [16, 100, 1.0])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_keeping_everything_is_bitwise_the_unpruned_model(model, rows, keep, positions):
    inputs = batch(model, *rows)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    wanted = model(**inputs)
    with lvtp.hf.prune(model, keep=keep, positions=positions) as pruning:
        got = model(**inputs)
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(got.loss, wanted.loss)
    assert torch.equal(pruning.last.kept, inputs["attention_mask"].bool())


@pytest.mark.parametrize("method", ["id_selection", "prune_sid"])
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_the_oracle(model, rows, method, positions, side):
    inputs = batch(model, *rows, side=side)
    oracle = assemble(model, inputs, KEEP, positions, method)
    wanted = oracle.logits(model)[oracle.mask.bool()]
    with lvtp.hf.prune(model, method, KEEP, positions=positions) as pruning:
        logits = model(**inputs).logits
    unpadded = lvtp.hf.prepare(model, inputs, method=method, keep=KEEP, positions=positions)["attention_mask"].bool()
    assert relative_error(logits[unpadded], wanted) <= 1e-5
    for row, columns in enumerate(oracle.kept):
        assert pruning.last.kept[row].nonzero().flatten().tolist() == columns
    if side == "right" and not unpadded.all():
        assert unpadded[:, 0].all()


def test_pruning_changes_the_logits(model):
    """The control: without it, every comparison here would pass on a model that ignores its images."""
    inputs = batch(model, [3, "image", 5])
    full = model(**inputs).logits[:, -1]
    with lvtp.hf.prune(model, keep=KEEP):
        pruned = model(**inputs).logits[:, -1]
    assert (full - pruned).abs().max() > 0.1


def test_order_of_the_tokens_matters_so_they_stay_in_raster_order(model):
    inputs = batch(model, [3, "image", 5])
    with lvtp.hf.prune(model, keep=KEEP) as pruning:
        logits = model(**inputs).logits
    (indices,) = pruning.last.indices
    assert indices.tolist() == sorted(indices.tolist())
    prepared = lvtp.hf.prepare(model, inputs, keep=KEEP)
    outputs = prepared["mm_encoder_outputs"]["image"]
    outputs.pooler_output = [outputs.pooler_output[0].flip(0)]
    assert (model(**prepared).logits - logits).abs().max() > 0.1


def test_original_positions_differ_from_compact_ones(model):
    inputs = batch(model, [3, "image", 5])
    with lvtp.hf.prune(model, keep=KEEP, positions="compact"):
        compact = model(**inputs).logits
    with lvtp.hf.prune(model, keep=KEEP, positions="original"):
        original = model(**inputs).logits
    assert (compact - original).abs().max() > 0.1


@pytest.mark.parametrize("with_mask", [True, False])
def test_original_positions_without_cache_are_not_read_as_packed_sequences(model, with_mask):
    inputs = batch(model, [3, "image", 5])
    wanted = assemble(model, inputs, KEEP, "original").logits(model)
    if not with_mask:
        del inputs["attention_mask"]
    with lvtp.hf.prune(model, keep=KEEP, positions="original"):
        got = model(**inputs, use_cache=False).logits
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
    inputs = batch(model, *BATCHES["two_and_one"])
    with lvtp.hf.prune(model, keep=keep) as pruning:
        model(**inputs)
    assert pruning.last.counts == (count,) * 3
    assert [len(index) for index in pruning.last.indices] == [count] * 3
    assert pruning.last.scope == "image"
    assert pruning.last.positions == "compact"


def test_loss_drops_only_the_labels_of_placeholders(model):
    inputs = batch(model, *BATCHES["two_and_one"])
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = ids.masked_fill((ids == model.config.image_token_id) | ~real, -100)
    prepared = lvtp.hf.prepare(model, {**inputs, "labels": labels}, keep=KEEP)
    for row in range(len(ids)):
        assert prepared["labels"][row][prepared["labels"][row] >= 0].equal(labels[row][labels[row] >= 0])
    assert (prepared["labels"][prepared["attention_mask"] == 0] == -100).all()

    oracle = assemble(model, inputs, KEEP)
    wanted_labels = torch.full_like(oracle.mask, -100)
    for row, columns in enumerate(oracle.kept):
        wanted_labels[row, -len(columns) :] = labels[row, columns]
    wanted = model(inputs_embeds=oracle.embeds, attention_mask=oracle.mask, labels=wanted_labels).loss
    with lvtp.hf.prune(model, keep=KEEP):
        got = model(**inputs, labels=labels).loss
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


def test_gradients_equal_the_oracle(model):
    inputs = batch(model, *BATCHES["two_and_one"])
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids == model.config.image_token_id) | (inputs["attention_mask"] == 0), -100)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    oracle = assemble(model, inputs, KEEP)
    wanted_labels = torch.full_like(oracle.mask, -100)
    for row, columns in enumerate(oracle.kept):
        wanted_labels[row, -len(columns) :] = labels[row, columns]
    wanted = gradients(model(inputs_embeds=oracle.embeds, attention_mask=oracle.mask, labels=wanted_labels).loss)
    with lvtp.hf.prune(model, keep=KEEP):
        got = gradients(model(**inputs, labels=labels).loss)
    assert got.keys() == wanted.keys()
    assert any("vision_tower" in name for name in got)
    scale = max(gradient.abs().max() for gradient in wanted.values())
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5 * scale.item())
    model.zero_grad()


def test_positional_arguments(model):
    inputs = batch(model, [3, "image", 5])
    with lvtp.hf.prune(model, keep=KEEP):
        wanted = model(**inputs).logits
        got = model(inputs["input_ids"], inputs["pixel_values"], attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(got, wanted)


def test_prepare_changes_neither_model_nor_inputs(model):
    inputs = batch(model, *BATCHES["two_and_one"])
    before = {name: (value, value.clone()) for name, value in inputs.items()}
    prepared = lvtp.hf.prepare(model, inputs, keep=KEEP)
    assert "pixel_values" not in prepared
    assert inputs.keys() == before.keys()
    for name, (value, copy) in before.items():
        assert inputs[name] is value
        assert torch.equal(value, copy)
    with lvtp.hf.prune(model, keep=KEEP):
        assert torch.equal(model(**inputs).logits, model(**prepared).logits)


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
