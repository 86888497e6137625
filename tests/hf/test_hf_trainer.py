"""transformers' Trainer around a pruned model: what it divides the loss by, and what it compares predictions with."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import lvtp.hf

from .members import INTERNVL, LLAVA, QWENS
from .tiny import visual, with_completions
from .tiny_llava import batch

KEEP = 3


def trainer(model, batches, folder, **options):
    """Takes all batches as one step of training that changes nothing, each of them as one call."""
    pytest.importorskip("accelerate")
    arguments = TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=len(batches),
        per_device_eval_batch_size=1, learning_rate=0.0, max_grad_norm=1e9, logging_steps=1, report_to=[],
        save_strategy="no", remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=batches, data_collator=lambda picked: dict(picked[0]), **options)


def labelled(inputs, placeholders):
    """Labels of all tokens; of placeholders, too, where they are asked for, as notebooks make them."""
    hidden = inputs["attention_mask"] == 0
    hidden = hidden if placeholders else hidden | visual(inputs["input_ids"])
    return {**inputs, "labels": inputs["input_ids"].masked_fill(hidden, -100)}


@pytest.mark.parametrize("placeholders", [True, False])
@pytest.mark.parametrize("rows", ["two_and_one", "two_and_one two_and_one", "single text_only_row"])
@pytest.mark.parametrize("member", [LLAVA, INTERNVL, QWENS[1]], ids=lambda member: member.name)
def test_trainer_divides_by_the_labels_that_are_left(member, rows, placeholders, tmp_path):
    model = copy.deepcopy(member.model)
    calls = [member.batch(name, side="right", seed=seed) for seed, name in enumerate(rows.split())]
    calls = [labelled(call, placeholders) for call in calls]
    pruned = [lvtp.hf.prepare(model, call, keep=KEEP) for call in calls]
    means = torch.stack([model(**call).loss for call in pruned])
    before, left = (torch.tensor([(c["labels"][:, 1:] != -100).sum() for c in of]) for of in (calls, pruned))
    if not getattr(model, "accepts_loss_kwargs", True):  # then Trainer gives no number, and all calls weigh the same
        weights = torch.ones(len(calls))
    elif rows == "single text_only_row":  # these lose different shares of their labels
        weights = before
    else:
        weights = left
    wanted = (means * weights).sum() / weights.sum()
    wanted.backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters() if weight.grad is not None]).norm()
    model.zero_grad()
    assert torch.equal(before, left) != placeholders
    with lvtp.hf.prune(model, keep=KEEP):
        run = trainer(model, calls, tmp_path)
        run.train()
    log = run.state.log_history[0]
    assert log["loss"] == pytest.approx(wanted.item(), rel=1e-4)
    assert log["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


@pytest.mark.parametrize("number", [40, torch.tensor(40), torch.tensor([40.0])], ids=["int", "tensor", "shape [1]"])
def test_a_number_of_labels_of_any_type(model, number):
    """20 labels to predict before and 7 after."""
    inputs = labelled(batch(model, [2, "image", 3]), placeholders=True)
    with lvtp.hf.prune(model, keep=KEEP):
        mean, loss = model(**inputs).loss, model(**inputs, num_items_in_batch=number).loss
    torch.testing.assert_close(loss.squeeze(), mean * 7 / (40 * 7 / 20), rtol=1e-6, atol=0)
    inputs["labels"].fill_(-100)
    with lvtp.hf.prune(model, keep=KEEP):
        assert model(**inputs, num_items_in_batch=number).loss == 0


def test_predictions_in_step_with_labels(member, tmp_path):
    """Column i predicts label i + 1, whatever was dropped between them."""
    model, seen = copy.deepcopy(member.model), []
    calls = [labelled(member.batch(rows, side="right"), False) for rows in ("two_and_one", "text_only_row")]
    with lvtp.hf.prune(model, keep=KEEP) as pruning:
        with torch.no_grad():
            wanted = [model(**lvtp.hf.prepare(model, call, keep=KEEP)) for call in calls]

        def look(evaluated):
            seen.append(evaluated)
            return {}

        run = trainer(model, calls, tmp_path, compute_metrics=look, preprocess_logits_for_metrics=pruning.in_step)
        with pytest.warns(UserWarning, match="preprocess_logits_for_metrics=pruning.in_step"):
            run.predict(calls, ignore_keys=["past_key_values", "cache"])
    (evaluated,) = seen
    logits, labels = torch.tensor(evaluated.predictions), torch.tensor(evaluated.label_ids)
    assert logits.shape[:2] == labels.shape
    for row, outputs in zip((0, 2), wanted, strict=True):
        rows = slice(row, row + 2)
        got = cross_entropy(logits[rows, :-1].flatten(0, 1), labels[rows, 1:].flatten())
        torch.testing.assert_close(got, outputs.loss, rtol=1e-5, atol=0)


def test_in_step(model):
    """Of rows of several lengths and paddings, and of what other processes have made wider."""
    inputs = labelled(with_completions(batch(model, [2, "image", 3], [9]), [4, 2]), False)
    labels = inputs["labels"]
    wider = torch.nn.functional.pad(labels, (0, 2), value=-100)
    with lvtp.hf.prune(model, keep=KEEP) as pruning:
        logits = model(**inputs).logits
        got, columns, kept = pruning.in_step(logits, labels), pruning.last.columns, pruning.last.kept
        assert torch.equal(got[kept], logits[lvtp.hf.prepare(model, inputs, keep=KEEP)["attention_mask"].bool()])
        for column in (~kept[0]).nonzero()[:, 0]:
            assert torch.equal(got[0, column], got[0, column - 1])
        tokens = pruning.in_step((logits.argmax(-1), "image_outputs"), wider)
        assert torch.equal(tokens[:, : labels.shape[1]], got.argmax(-1))
        assert tokens.shape == wider.shape
        for wrong, match in (
            ((logits, labels[:1]), "logits and labels must be those of the latest call"),
            ((logits, labels[:, :9]), "logits and labels must be those of the latest call"),
            ((logits[:, -3:], labels), "logits must have all columns of the pruned prompt, got 3"),
        ):
            with pytest.raises(ValueError, match=match):
                pruning.in_step(*wrong)
        assert int(columns.max()) < logits.shape[1]
        text = model(input_ids=labels[1:, 16:22].clamp(min=0)).logits
        assert pruning.in_step(text, labels) is text
