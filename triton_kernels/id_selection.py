"""ID-Selection: the similarity matrix, then its loop.

The matrix costs more arithmetic than k rows would, but one program an image cannot compute rows: a single
multiprocessor would read all features once a pick. Images are taken in chunks, so that the matrices stay below
MATRIX_BYTES whatever the batch (one image of 16k tokens is 1 GiB).
"""

import torch
from torch import Tensor

from lvtp.triton_kernels import greedy_suppression
from lvtp.triton_kernels.common import operator
from lvtp.triton_kernels.cosine_similarity import launch as similarity_of

MATRIX_BYTES = 2**30


@operator
def id_selection(
    features: Tensor, importance: Tensor, k: int, gamma: float = 20.0, mask: Tensor | None = None
) -> Tensor:
    """features [B, N, D] fp32, fp16 or bf16, importance [B, N] of any floating dtype -> int64 [B, k], pick order."""
    b, n = importance.shape
    images = max(1, MATRIX_BYTES // (4 * n * n))
    picks = [
        greedy_suppression.launch(
            importance[i : i + images], similarity_of(features[i : i + images]), k, gamma,
            None if mask is None else mask[i : i + images], scaled=True,
        )
        for i in range(0, b, images)
    ]  # fmt: skip
    if len(picks) == 1:
        return picks[0]
    return torch.cat(picks) if picks else importance.new_empty((b, k), dtype=torch.int64)
