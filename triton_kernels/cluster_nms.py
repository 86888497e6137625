"""Non-maximum suppression inside groups. Groups never interact, so each is a program of its own.

Labels are any numbers, so no program can be told which group is its: one starts for every token, and goes on only if
that is the first real token of its group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvtp.triton_kernels.common import operator, over_tokens
from lvtp.triton_kernels.greedy import greedy
from lvtp.triton_kernels.rules import OUT, group_nms_pickable, group_nms_update


@triton.jit
def _emit_kept(kept_ptr, step, i):
    tl.store(kept_ptr + i, 1)


@triton.jit
def _members(labels_ptr, mask_ptr, token, last, label, HAS_MASK: tl.constexpr):
    """Which of these tokens, up to `last`, are real and of this group."""
    member = token < last
    member = member & (tl.load(labels_ptr + token, mask=member, other=0) == label)
    if HAS_MASK:
        member = member & tl.load(mask_ptr + token, mask=member, other=0).to(tl.int1)
    return member


@triton.jit
def cluster_nms_kernel(
    scores_ptr, labels_ptr,  # [B, N], int64 [B, N]
    similarity_ptr,  # [B, N, N]
    threshold_ptr,  # [B]
    mask_ptr,  # bool [B, N]
    state_ptr,  # fp32 [B, N], scratch
    kept_ptr,  # bool [B, N], False
    n,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    image, first = (tl.program_id(0) // n).to(tl.int64), tl.program_id(0) % n
    scores_ptr += image * n
    labels_ptr += image * n
    mask_ptr += image * n
    state_ptr += image * n
    label = tl.load(labels_ptr + first)
    earlier = 0
    for start in range(0, first, BLOCK):
        member = _members(labels_ptr, mask_ptr, start + tl.arange(0, BLOCK), first, label, HAS_MASK)
        earlier += tl.sum(member.to(tl.int32), 0)
    if HAS_MASK:
        earlier += 1 - tl.load(mask_ptr + first).to(tl.int32)
    if earlier > 0:
        return

    for start in range(0, n, BLOCK):
        token = start + tl.arange(0, BLOCK)
        same = (token < n) & (tl.load(labels_ptr + token, mask=token < n, other=0) == label)
        member = _members(labels_ptr, mask_ptr, token, n, label, HAS_MASK)
        s = tl.load(scores_ptr + token, mask=member, other=0.0).to(tl.float32)
        tl.store(state_ptr + token, tl.where(member & (s > 0), s, OUT), mask=same)  # never kept: NaN and <= 0
    tl.debug_barrier()  # the keys are in memory

    tau = tl.load(threshold_ptr + image).to(tl.float32)
    greedy(
        state_ptr, similarity_ptr + image * n * n, labels_ptr, kept_ptr + image * n, n, n, tau, label,
        True, BLOCK, ONE_BLOCK, group_nms_pickable, group_nms_update, _emit_kept,
    )  # fmt: skip


@operator
def cluster_nms(
    scores: Tensor, labels: Tensor, similarity: Tensor, threshold: float | Tensor, mask: Tensor | None = None
) -> Tensor:
    """scores [B, N], similarity [B, N, N], threshold a number or [B], of any floating dtype; labels int64 [B, N]; mask
    bool [B, N] -> kept, bool [B, N]."""
    b, n = scores.shape
    kept = scores.new_zeros((b, n), dtype=torch.bool)
    if b == 0:
        return kept
    if not isinstance(threshold, Tensor):
        threshold = scores.new_full((b,), threshold, dtype=torch.float64)
    state = scores.new_empty((b, n), dtype=torch.float32)
    cluster_nms_kernel[(b * n,)](
        scores.contiguous(), labels.contiguous(), similarity.contiguous(), threshold.contiguous(),
        scores if mask is None else mask.contiguous(), state, kept, n, HAS_MASK=mask is not None, **over_tokens(n),
    )  # fmt: skip
    return kept
