"""The two selectors: features in, indices of the tokens to keep out. `take` gives the tokens themselves."""

import torch
from torch import Tensor

from lvtp import checks, dlpack
from lvtp.ops import call


def id_selection(
    features: Tensor, importance: Tensor, k: int, gamma: float = 20.0, mask: Tensor | None = None
) -> Tensor:
    """ID-Selection (arXiv 2604.05601): the k tokens that are important and unlike those already taken.

    Importance is scaled to [0, 1] in each image; then, k times, the highest score is taken (ties: lowest index) and
    every other token's score falls by exp(-gamma * max(0, 1 - sim_ij)^2) * max(S_i, 0), so look-alikes drop out.

    Args:
        features: [B, N, D] float32, float16 or bfloat16; LLaVA-1.5: [B, 576, 1024].
        importance: [B, N] of any floating dtype, such as the attention of the CLS token. +Inf counts as 2 and -Inf as
            0 on the scale from 0 to 1; NaN comes last.
        k: tokens to keep, in [1, N].
        gamma: how quickly suppression fades with distance, finite and at least 0; 20 in the paper.
        mask: bool [B, N], False = padding.

    Returns:
        int64 [B, k] in pick order: the first j are the answer for that smaller j. -1 after the last pick of an image
        with fewer than k real tokens. Indices carry no gradient; `take` the features with them, and it flows.

    Raises:
        RuntimeError: an argument of another rank, shape, dtype or device, or out of range; it names the argument.
        TypeError, ValueError: an argument of the wrong type, or an array that torch cannot read.
    """
    return call("id_selection", features, importance, k, gamma, mask)


def prune_sid(
    features: Tensor,
    importance: Tensor | None,
    n: int,
    reserved: int = 0,
    center: str = "feature",
    labels: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """PruneSID (arXiv 2603.09480): n - reserved tokens that cover the image.

    Tokens are grouped by principal component (`psca`), near-duplicates inside a group are suppressed above
    tau = rho * n / 32 (`cluster_nms`, rho from `mean_similarity`), and each group gives its share of the budget.

    Args:
        features: [B, N, D] float32, float16 or bfloat16; LLaVA-1.5: [B, 576, 1024].
        importance: [B, N] of any floating dtype, such as the attention of the CLS token; None scores a token by its
            loading on its component.
        n: the budget, at least 1.
        reserved: how many of the n are not patches, in [0, n - 1]; the released LLaVA code forwards CLS too, so its
            64 is n=64, reserved=1.
        center: as for `psca`.
        labels: int64 [B, N] in [0, max(1, min(n // 4, N))): groups of your own; needs `importance`.
        mask: bool [B, N], False = padding.

    Returns:
        int64 [B, min(n - reserved, N)], ascending; -1 at the end where an image has fewer real tokens. Indices carry
        no gradient; `take` the features with them, and it flows.

    Raises:
        RuntimeError: an argument of another rank, shape, dtype or device, or out of range; it names the argument.
        TypeError, ValueError: an argument of the wrong type, or an array that torch cannot read.
    """
    return call("prune_sid", features, importance, n, reserved, center, labels, mask)


def take(features: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that a selector chose. Where its answer is -1, the image had no token left: zeros there.

    Plain PyTorch on every device and backend: it never waits for a GPU, traces under `torch.compile(fullgraph=True)`,
    and gradients flow to the tokens taken.

    Args:
        features: [B, N, D] of any dtype that `torch.gather` takes.
        keep: int64 or int32 [B, k], each in [0, N) or -1; the answer of a selector.

    Returns:
        tokens [B, k, D] of the features' dtype, in the order of `keep`, zeros where it is -1; and valid, bool [B, k],
        False there.

    Raises:
        RuntimeError: an argument of another rank, dtype, batch or device; it names the argument. Any other index is an
            error of `torch.gather`, which on a GPU is a device-side assertion.
        TypeError, ValueError: an argument of the wrong type, or an array that torch cannot read.
    """
    x, places = dlpack.tensor(features, "take", "features"), dlpack.tensor(keep, "take", "keep")
    checks.take(x, places)
    valid = places != -1
    index = torch.where(valid, places, 0).long()[..., None].expand(-1, -1, x.shape[-1])
    return dlpack.in_kind((x.gather(1, index).masked_fill(~valid[..., None], 0), valid), like=features)
