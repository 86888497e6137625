"""Mean similarity rho without a matrix: ||sum_i x^_i||^2, a few features a program, then what they have in common."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvtp.triton_kernels import common
from lvtp.triton_kernels.common import operator
from lvtp.triton_kernels.unit import unit_scale


@triton.jit
def feature_sums_kernel(
    x_ptr,  # [B, N, D]
    scale_ptr,  # fp32 [B, N]
    mask_ptr,  # bool [B, N]
    together_ptr, alone_ptr,  # fp64 [B, parts]
    n, d, parts,
    HAS_MASK: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """For DEPTH features of one image: of (sum_i x^_ic)^2 and of sum_i x^_ic^2 the sum over them."""
    image, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    col = part * DEPTH + tl.arange(0, DEPTH)
    total, own = tl.zeros((DEPTH,), tl.float64), tl.zeros((DEPTH,), tl.float64)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < n
        if HAS_MASK:
            real = real & tl.load(mask_ptr + image * n + row, mask=real, other=0).to(tl.int1)
        scale = tl.load(scale_ptr + image * n + row, mask=real, other=0.0)
        here = (real & (scale > 0))[:, None] & (col < d)[None, :]
        x = tl.load(x_ptr + (image * n + row)[:, None] * d + col[None, :], mask=here, other=0.0)  # [ROWS, DEPTH]
        unit = (x.to(tl.float32) * scale[:, None]).to(tl.float64)
        total += tl.sum(unit, 0)
        own += tl.sum(unit * unit, 0)
    tl.store(together_ptr + image * parts + part, tl.sum(total * total, 0))
    tl.store(alone_ptr + image * parts + part, tl.sum(own, 0))


@triton.jit
def rho_kernel(
    together_ptr, alone_ptr,  # fp64 [B, parts]
    mask_ptr,  # bool [B, N]
    rho_ptr,  # fp32 [B]
    n, parts,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    excess = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        excess += tl.load(together_ptr + image * parts + part, mask=part < parts, other=0.0)
        excess -= tl.load(alone_ptr + image * parts + part, mask=part < parts, other=0.0)
    count = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        token = start + tl.arange(0, BLOCK)
        real = token < n
        if HAS_MASK:
            real = real & tl.load(mask_ptr + image * n + token, mask=real, other=0).to(tl.int1)
        count += real.to(tl.float64)
    count = tl.sum(count, 0)
    pairs = count * (count - 1)
    rho = tl.where(pairs > 0, tl.sum(excess, 0) / tl.where(pairs > 0, pairs, 1.0), 0.0)
    tl.store(rho_ptr + image, rho.to(tl.float32))


def launch(features: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
    """features [B, N, D] contiguous, already checked, and their `unit_scale` [B, N] -> fp32 [B]."""
    b, n, d = features.shape
    rows, depth = 32, common.block_of(d, common.DEPTH)
    parts = triton.cdiv(d, depth)
    together, alone = features.new_empty((2, b, parts), dtype=torch.float64)
    rho = features.new_empty((b,), dtype=torch.float32)
    real = scale if mask is None else mask.contiguous()
    has_mask = mask is not None
    feature_sums_kernel[(b * parts,)](
        features, scale, real, together, alone, n, d, parts, HAS_MASK=has_mask, ROWS=rows, DEPTH=depth, num_warps=4
    )
    rho_kernel[(b,)](
        together, alone, real, rho, n, parts, HAS_MASK=has_mask, BLOCK=common.block_of(n, 512), num_warps=4
    )
    return rho


@operator
def mean_similarity(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """features [B, N, D] fp32, fp16 or bf16, mask bool [B, N] -> fp32 [B]."""
    if features.shape[0] == 0:
        return features.new_empty((0,), dtype=torch.float32)
    features = features.contiguous()
    return launch(features, unit_scale(features), mask)
