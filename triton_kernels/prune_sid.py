"""PruneSID: components, suppression, quotas and picks in a row of launches; nothing is read back on the way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvtp.triton_kernels import common, cosine_similarity, mean_similarity, psca
from lvtp.triton_kernels.cluster_nms import cluster_nms
from lvtp.triton_kernels.common import operator
from lvtp.triton_kernels.id_selection import MATRIX_BYTES
from lvtp.triton_kernels.quotas import quotas_kernel
from lvtp.triton_kernels.unit import unit_scale

PLENTY = 2**40  # tokens; beyond any number of them budgets are alike, and sums stay far from the limits of int64
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _order_keys(score_ptr, kept_ptr, token, here):
    """Scores of these tokens as they rank (-Inf after every finite one, NaN last), and whether NMS kept them."""
    s = tl.load(score_ptr + token, mask=here, other=0.0)
    return tl.where(s != s, float("-inf"), tl.maximum(s, LOWEST)), tl.load(kept_ptr + token, mask=here, other=0)


@triton.jit
def count_kernel(
    label_ptr,  # int64 [B, N], `groups` for padding
    kept_ptr,  # bool [B, N]
    count_ptr,  # int32 [B, 2, G], zeros
    tokens, n, groups,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each group the tokens, and those NMS kept. Integers: the order of the additions does not matter."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(label_ptr + at, mask=at < tokens, other=0)
    kept = tl.load(kept_ptr + at, mask=at < tokens, other=0).to(tl.int32)
    real = (at < tokens) & (label < groups)
    count_ptr += at // n * 2 * groups
    tl.atomic_add(count_ptr + label, kept * 0 + 1, mask=real)
    tl.atomic_add(count_ptr + groups + label, kept, mask=real)


@triton.jit
def take_kernel(
    score_ptr, label_ptr, kept_ptr,  # fp32, int64, bool [B, N]
    quota_ptr,  # int32 [B, G]
    take_ptr,  # bool [B, N]
    n, groups, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A token is taken if fewer of its group than the quota go before it: kept ones first, then by score."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    score_ptr += image * n
    label_ptr += image * n
    kept_ptr += image * n
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    label_i = tl.load(label_ptr + i, mask=i < n, other=-1)
    score_i, kept_i = _order_keys(score_ptr, kept_ptr, i, i < n)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        label_j = tl.load(label_ptr + j, mask=j < n, other=-2)
        score_j, kept_j = _order_keys(score_ptr, kept_ptr, j, j < n)
        above, level = score_j[None, :] > score_i[:, None], score_j[None, :] == score_i[:, None]
        above = above | (level & (j[None, :] < i[:, None]))
        kept_above, kept_level = kept_j[None, :] > kept_i[:, None], kept_j[None, :] == kept_i[:, None]
        first = (label_j[None, :] == label_i[:, None]) & (kept_above | (kept_level & above))  # [i, j]
        rank += tl.sum(first.to(tl.int32), 1)
    grouped = (i < n) & (label_i < groups)
    quota = tl.load(quota_ptr + image * groups + label_i, mask=grouped, other=0)
    tl.store(take_ptr + image * n + i, grouped & (rank < quota), mask=i < n)


@triton.jit
def ascending_kernel(
    take_ptr,  # bool [B, N]
    picks_ptr,  # int64 [B, places]
    n, places,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The indices of the tokens taken, then -1."""
    image = tl.program_id(0).to(tl.int64)
    taken = tl.zeros((), tl.int32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        take = tl.load(take_ptr + image * n + i, mask=i < n, other=0).to(tl.int32)
        at = taken + tl.cumsum(take, 0) - 1
        tl.store(picks_ptr + image * places + at, i, mask=take > 0)
        taken += tl.sum(take, 0)
    for start in range(0, places, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(picks_ptr + image * places + at, -1, mask=(at >= taken) & (at < places))


def _kept(features: Tensor, scores: Tensor, labels: Tensor, n: int, mask: Tensor | None) -> Tensor:
    """Steps 3 and 4: what suppression inside the groups leaves, bool [B, N]. Matrices in chunks, as `id_selection`."""
    tokens = features.shape[1]
    scale = unit_scale(features)
    tau = mean_similarity.launch(features, scale, mask) * n / 32
    tau = torch.where(tau < 1, tau, torch.inf)  # even where rounding makes a similarity slightly larger than 1
    images = max(1, MATRIX_BYTES // (4 * tokens * tokens))
    kept = []
    for i in range(0, features.shape[0], images):
        part = slice(i, i + images)
        similarity = cosine_similarity.launch(features[part], scale[part])
        kept.append(
            cluster_nms(scores[part], labels[part], similarity, tau[part], None if mask is None else mask[part])
        )
    return kept[0] if len(kept) == 1 else torch.cat(kept)


@operator
def prune_sid(
    features: Tensor,
    importance: Tensor | None,
    n: int,
    reserved: int = 0,
    center: str = "feature",
    labels: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """features [B, N, D] fp32, fp16 or bf16, importance [B, N] of any floating dtype or None, labels int64 [B, N],
    mask bool [B, N] -> int64 [B, min(n - reserved, N)], ascending."""
    b, tokens, _ = features.shape
    groups = max(1, min(n // 4, tokens))
    places = min(n - reserved, tokens)
    picks = features.new_empty((b, places), dtype=torch.int64)
    if b == 0:
        return picks
    features, loadings = features.contiguous(), None
    if labels is None:
        labels, loadings = psca.launch(features, groups, center, mask)
    scores = (loadings if importance is None else importance).float().contiguous()
    labels = labels.clamp(0, groups - 1)
    if mask is not None:
        labels = torch.where(mask, labels, groups)
    labels = labels.contiguous()
    kept = _kept(features, scores, labels, n, mask)

    count = torch.zeros((b, 2, groups), dtype=torch.int32, device=features.device)
    quota = torch.empty((b, groups), dtype=torch.int32, device=features.device)
    take = torch.empty_like(kept)
    count_kernel[(triton.cdiv(b * tokens, 256),)](labels, kept, count, b * tokens, tokens, groups, BLOCK=256)
    patches = min(n - reserved, PLENTY)
    budget = min(n - patches, PLENTY) + patches
    width = common.block_of(groups, 2**20)
    quotas_kernel[(b,)](
        count, quota, groups, budget, budget - patches, places, min(5 * -(-budget // 64), tokens),
        GROUPS=width, num_warps=min(16, max(1, width // 128)), enable_fp_fusion=False,
    )  # fmt: skip
    block = common.block_of(tokens, common.TILE)
    blocks = triton.cdiv(tokens, block)
    take_kernel[(b * blocks,)](scores, labels, kept, quota, take, tokens, groups, blocks, BLOCK=block, num_warps=8)
    ascending_kernel[(b,)](take, picks, tokens, places, BLOCK=common.block_of(tokens, 1024))
    return picks
