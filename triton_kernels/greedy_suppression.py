"""ID-Selection's loop: one program an image takes all its picks in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvtp.reference import FLOAT_MAX
from lvtp.triton_kernels.common import operator, over_tokens
from lvtp.triton_kernels.greedy import greedy
from lvtp.triton_kernels.rules import OUT, finite_score, suppression_pickable, suppression_update


@triton.jit
def _real_scores(scores_ptr, mask_ptr, token, n, HAS_MASK: tl.constexpr):
    """Scores of a block of tokens, and which of them take part."""
    real = token < n
    if HAS_MASK:
        real = real & tl.load(mask_ptr + token, mask=real, other=0).to(tl.int1)
    return tl.load(scores_ptr + token, mask=real, other=0.0).to(tl.float32), real


@triton.jit
def _emit_pick(picks_ptr, step, i):
    tl.store(picks_ptr + step, i)


@triton.jit
def greedy_suppression_kernel(
    scores_ptr,  # [B, N]
    similarity_ptr,  # [B, N, N]
    mask_ptr,  # bool [B, N]
    state_ptr,  # fp32 [B, N], scratch
    picks_ptr,  # int64 [B, k]
    n, k, gamma,
    SCALED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    scores_ptr += image * n
    similarity_ptr += image * n * n
    mask_ptr += image * n
    state_ptr += image * n
    picks_ptr += image * k

    # ID-Selection step 1: min and max over the finite scores of real tokens.
    low, high = float("inf"), float("-inf")
    if SCALED:
        for start in range(0, n, BLOCK):
            s, real = _real_scores(scores_ptr, mask_ptr, start + tl.arange(0, BLOCK), n, HAS_MASK)
            counts = real & (tl.abs(s) < float("inf"))  # not NaN either
            low = tl.minimum(low, tl.min(tl.where(counts, s, float("inf")), 0))
            high = tl.maximum(high, tl.max(tl.where(counts, s, float("-inf")), 0))
    spread = high - low  # -Inf where nothing is finite
    for start in range(0, n, BLOCK):
        token = start + tl.arange(0, BLOCK)
        s, real = _real_scores(scores_ptr, mask_ptr, token, n, HAS_MASK)
        if SCALED:
            scale = (spread > 1e-9) & (spread < float("inf"))
            scaled = tl.where(scale, tl.div_rn(s - tl.where(scale, low, 0.0), tl.where(scale, spread, 1.0)), s)
            s = tl.where(s == float("inf"), 2.0, tl.where(s == float("-inf"), 0.0, scaled))
        tl.store(state_ptr + token, tl.where(real, finite_score(s), OUT), mask=token < n)
    tl.debug_barrier()  # the keys are in memory

    picks = greedy(
        state_ptr, similarity_ptr, state_ptr, picks_ptr, n, k, gamma, 0, False, BLOCK, ONE_BLOCK,
        suppression_pickable, suppression_update, _emit_pick,
    )  # fmt: skip
    for step in range(picks, k):
        tl.store(picks_ptr + step, -1)


def launch(
    scores: Tensor, similarity: Tensor, k: int, gamma: float, mask: Tensor | None, scaled: bool
) -> Tensor:  # fmt: skip
    """Arguments as for `greedy_suppression`, already checked; `scaled`: bring the scores to [0, 1] first."""
    b, n = scores.shape
    picks = scores.new_empty((b, k), dtype=torch.int64)
    if b == 0:
        return picks
    scores, similarity = scores.contiguous(), similarity.contiguous()
    state = scores.new_empty((b, n), dtype=torch.float32)
    greedy_suppression_kernel[(b,)](
        scores, similarity, scores if mask is None else mask.contiguous(), state, picks, n, k, min(gamma, FLOAT_MAX),
        SCALED=scaled, HAS_MASK=mask is not None, **over_tokens(n),
    )  # fmt: skip
    return picks


@operator
def greedy_suppression(
    scores: Tensor, similarity: Tensor, k: int, gamma: float = 20.0, mask: Tensor | None = None
) -> Tensor:
    """scores [B, N] and similarity [B, N, N] of any floating dtype, mask bool [B, N] -> int64 [B, k], pick order."""
    return launch(scores, similarity, k, gamma, mask, scaled=False)
