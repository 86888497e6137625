"""What trainers count by columns: labels, and logits beside them."""

import warnings
from typing import Any

import torch
from torch import Tensor


def rescaled(call: dict[str, Any], shortened: dict[str, Any]) -> dict[str, Any]:
    """`num_items_in_batch`, by which the loss is divided, for the labels that are left; nothing where it is not given.

    Trainers count the labels of all calls of a step before any runs, and those of dropped placeholders among them. One
    call knows its own, so it scales the number by the share of its labels that is left: every call counts in the step
    as it does unpruned, with the mean loss of what is left of it. That is the mean over all labels left in the step if
    its calls keep equal shares of their labels: if there is one call, or if placeholders are labelled -100.
    """
    number, labels = call.get("num_items_in_batch"), call.get("labels")
    if number is None or labels is None:
        return {}
    device = number.device if isinstance(number, Tensor) else labels.device
    before, left = (_predicted(of).to(device) for of in (labels, shortened["labels"]))
    return {"num_items_in_batch": torch.where(left > 0, number * left / before.clamp(min=1), number)}


def _predicted(labels: Tensor) -> Tensor:
    """How many labels there are to predict; the first token of a row has nothing before it."""
    return (labels[..., 1:] != -100).sum()


def warn_of_columns() -> None:
    """Says that a call's logits and labels do not line up, where somebody is likely to compare them."""
    warnings.warn(
        "the logits of a pruned call have fewer columns than its labels: to compare them, pass "
        "preprocess_logits_for_metrics=pruning.in_step to the Trainer, or call pruning.in_step(logits, labels)",
        stacklevel=2,
    )


def in_step(logits: Any, labels: Tensor, columns: Tensor | None) -> Any:
    """See `Pruning.in_step`; `columns`: those of `Pruned`, or None if nothing was lost."""
    if isinstance(logits, tuple | list):
        logits = logits[0]
    if columns is None:
        return logits
    if logits.shape[0] != len(columns) or labels.shape[0] != len(columns) or labels.shape[1] < columns.shape[1]:
        raise ValueError(
            f"logits and labels must be those of the latest call, which had labels {list(columns.shape)}, got logits "
            f"{list(logits.shape)} and labels {list(labels.shape)}"
        )
    if logits.shape[1] <= int(columns.max()):
        raise ValueError(
            f"logits must have all columns of the pruned prompt, got {logits.shape[1]} (was logits_to_keep given?)"
        )
    columns = columns.to(logits.device)
    beyond = columns[:, -1:].expand(-1, labels.shape[1] - columns.shape[1])  # what was gathered from others is wider
    columns = torch.cat([columns, beyond], dim=1)
    return logits[torch.arange(len(columns), device=logits.device)[:, None], columns]
