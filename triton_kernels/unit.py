"""Lengths of tokens: what turns x into x^ = x / max(||x||, 1e-12)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvtp.triton_kernels import common


@triton.jit
def unit_scale_kernel(
    x_ptr,  # [tokens, D]
    scale_ptr,  # fp32 [tokens]
    tokens, d,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """1 / max(||x||, 1e-12), or 0 for a token that is all zero or not finite. In fp64: squares of large features
    overflow fp32, and its square root and division are rounded correctly on every chip."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float64)
    for c in range(0, d, DEPTH):
        col = c + tl.arange(0, DEPTH)
        here = (row < tokens)[:, None] & (col < d)[None, :]
        x = tl.load(x_ptr + row[:, None] * d + col[None, :], mask=here, other=0.0).to(tl.float64)  # [ROWS, DEPTH]
        total += tl.sum(x * x, 1)
    usable = (total > 0) & (total < float("inf"))  # neither holds for NaN
    length = tl.sqrt(tl.where(usable, total, 1.0))
    scale = tl.where(usable, 1.0 / tl.where(length > 1e-12, length, 1e-12), 0.0)
    tl.store(scale_ptr + row, scale.to(tl.float32), mask=row < tokens)


def unit_scale(features: Tensor) -> Tensor:
    """features [B, N, D] fp32, fp16 or bf16, contiguous -> fp32 [B, N], what makes each token's length 1."""
    b, n, d = features.shape
    scale = features.new_empty((b, n), dtype=torch.float32)
    rows, depth = 4, common.block_of(d, 4 * common.DEPTH)
    unit_scale_kernel[(triton.cdiv(b * n, rows),)](features, scale, b * n, d, ROWS=rows, DEPTH=depth, num_warps=4)
    return scale
