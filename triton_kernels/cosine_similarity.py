"""Cosine similarity of every pair of tokens: tiles of the upper triangle, each stored twice.

fp32 stays fp32 (input_precision="ieee", FMA): three-pass TF32 would lose the last bits of a product, and a pick may
hang on them; whether it would be faster has not been measured. fp16 and bf16 go to the tensor cores as they are, where
their products are exact. Those round the running sum towards zero at every step, which over thousands of features adds
up; so each step's sum starts from zero, and is added to the total in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvtp.triton_kernels import common
from lvtp.triton_kernels.common import operator
from lvtp.triton_kernels.unit import unit_scale


@triton.jit
def _split(scale, dtype: tl.constexpr):
    """`scale` as a factor for tokens before their products and one for after; the first is 0 where `scale` is.

    fp32: all of it before. fp16: all of it after, squares fit. bf16: before, the power of two in it, which rounds
    nothing and keeps the products of large features finite.
    """
    if dtype == tl.float32:
        return scale, scale * 0 + 1
    if dtype == tl.float16:
        return tl.where(scale > 0, 1.0, 0.0), scale
    bits = scale.to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    normal = power > 0  # a subnormal scale has no such bits
    return tl.where(normal, power, tl.where(scale > 0, 2.0**-126, 0.0)), tl.where(normal, mantissa, scale * 2.0**126)


@triton.jit
def _tokens(x_ptr, power, row, c, n, d, DEPTH: tl.constexpr):
    """Features c, c + 1, ... of a block of tokens, multiplied by their power, in the dtype of the features."""
    col = c + tl.arange(0, DEPTH)
    here = ((row < n) & (power > 0))[:, None] & (col < d)[None, :]  # a NaN times 0 would stay NaN
    x = tl.load(x_ptr + row[:, None] * d + col[None, :], mask=here, other=0.0)
    return (x.to(tl.float32) * power[:, None]).to(x.dtype)  # [TILE, DEPTH]


@triton.jit
def similarity_tiles_kernel(
    x_ptr,  # [B, N, D]
    scale_ptr,  # fp32 [B, N]
    out_ptr,  # fp32 [B, N, N]
    n, d, across, programs,
    TILE: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // programs).to(tl.int64)
    x_ptr += image * n * d
    scale_ptr += image * n
    out_ptr += image * n * n
    # Of `across` (odd) tiles a side, row r of the upper triangle and row across - r fill one row of a rectangle.
    r, c = tl.program_id(0) % programs // across, tl.program_id(0) % across
    lower = c < r
    tile_i, tile_j = tl.where(lower, across - r, r), tl.where(lower, across - r + c, c)
    i = tile_i.to(tl.int64) * TILE + tl.arange(0, TILE)
    j = tile_j.to(tl.int64) * TILE + tl.arange(0, TILE)

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    scale_i, scale_j = tl.load(scale_ptr + i, mask=i < n, other=0.0), tl.load(scale_ptr + j, mask=j < n, other=0.0)
    power_i, rest_i = _split(scale_i, dtype)
    power_j, rest_j = _split(scale_j, dtype)
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, d, DEPTH):
        a = _tokens(x_ptr, power_i, i, start, n, d, DEPTH)
        b = _tokens(x_ptr, power_j, j, start, n, d, DEPTH)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        if dtype == tl.float32:
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        else:  # scaled here, not at the end: a bare sum would be merged into the dot's own
            total += tl.dot(a, tl.trans(b)) * (rest_i[:, None] * rest_j[None, :])

    here = (i < n)[:, None] & (j < n)[None, :]
    tl.store(out_ptr + i[:, None] * n + j[None, :], total, mask=here)
    if tile_i != tile_j:
        tl.store(out_ptr + j[None, :] * n + i[:, None], total, mask=here)


def launch(features: Tensor, scale: Tensor | None = None) -> Tensor:
    """features [B, N, D], already checked; `scale` [B, N] where `unit_scale` of them is at hand -> fp32 [B, N, N]."""
    b, n, d = features.shape
    out = features.new_empty((b, n, n), dtype=torch.float32)
    if b == 0:
        return out
    features = features.contiguous()
    scale = unit_scale(features) if scale is None else scale
    tile = common.block_of(n, common.TILE)
    across = triton.cdiv(n, tile) | 1
    programs = across * (across + 1) // 2
    depth = common.DEPTH // (2 if features.dtype == torch.float32 else 1)
    similarity_tiles_kernel[(b * programs,)](
        features, scale, out, n, d, across, programs, TILE=tile, DEPTH=common.block_of(d, depth),
        UPCAST=triton.knobs.runtime.interpret and features.dtype == torch.bfloat16,  # its dot reads bf16 as integers
        num_warps=8 if features.dtype == torch.float32 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@operator
def cosine_similarity(features: Tensor) -> Tensor:
    """features [B, N, D] fp32, fp16 or bf16 -> fp32 [B, N, N]."""
    return launch(features)
