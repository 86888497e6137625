"""Budgets: rho by its kernels; the rest is a few dozen operations on B numbers, which torch does without waiting."""

from torch import Tensor

from lvtp import reference
from lvtp.triton_kernels.common import operator
from lvtp.triton_kernels.mean_similarity import mean_similarity


@operator
def dynamic_budget(features: Tensor, total: int, minimum: int = 1) -> Tensor:
    """features [B, N, D] fp32, fp16 or bf16 -> int64 [B], adding up to `total`."""
    return reference.shares(mean_similarity(features), features.shape[1], total, minimum)
