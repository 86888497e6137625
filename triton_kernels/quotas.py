"""Step 5 of PruneSID (csrc/quotas.h): how many tokens each group gives, one program an image."""

import triton
import triton.language as tl


@triton.jit
def _round_half_even(x):
    """Of x >= 0. Numbers from 2^23 up are whole; below, adding 2^23 leaves no bits for a fraction."""
    return tl.where(x < 8388608.0, (x + 8388608.0) - 8388608.0, x)


@triton.jit
def _hand_out(amount, room, rank, highest, LAST_FIRST: tl.constexpr):
    """Fill groups to their `room` [G], lowest rank first, until `amount` is used up; ties: first (or last) group first.

    The rank at which it is used up is found by bisection, so that nothing need be sorted.
    """
    low, high = highest * 0, highest
    while low < high:
        middle = (low + high) // 2
        enough = tl.sum(tl.where(rank <= middle, room, 0), 0) >= amount
        low = tl.where(enough, low, middle + 1)
        high = tl.where(enough, middle, high)
    level = tl.where(rank == low, room, 0)
    before = tl.cumsum(level, 0) - level
    if LAST_FIRST:
        before = tl.sum(level, 0) - tl.cumsum(level, 0)
    left = amount - tl.sum(tl.where(rank < low, room, 0), 0)
    partly = tl.minimum(tl.maximum(left - before, 0), room)
    return tl.where(amount <= 0, 0, tl.where(rank < low, room, tl.where(rank == low, partly, 0)))


@triton.jit
def quotas_kernel(
    count_ptr,  # int32 [B, 2, G]: tokens, and tokens kept, of each group
    quota_ptr,  # int32 [B, G]
    groups, n, reserved, places, cap,
    GROUPS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, GROUPS)
    size = tl.load(count_ptr + image * 2 * groups + g, mask=g < groups, other=0)
    kept = tl.load(count_ptr + (image * 2 + 1) * groups + g, mask=g < groups, other=0)

    # Bounds. One token at least of every group that has any; at most what NMS kept, and `cap`, raised by one in every
    # group at once until the budget fits or nothing is left.
    low = tl.minimum(size, 1)
    up = tl.minimum(tl.minimum(size, kept), cap)
    total, most = tl.sum(up, 0), tl.sum(size, 0)
    while (total < n) & (total < most):
        up = tl.minimum(up + 1, size)
        total = tl.sum(up, 0)

    # Shares of the rest by what NMS kept. In fp64 the sums of these fp32 numbers are exact, what precedes each too.
    rest = tl.maximum(n - tl.sum(low, 0) - reserved, 0).to(tl.float32)
    sum_kept = tl.maximum(tl.sum(kept, 0), 1).to(tl.float32)
    ratio = tl.div_rn(kept.to(tl.float32), tl.zeros((GROUPS,), tl.float32) + sum_kept)
    running = tl.cumsum(ratio.to(tl.float64), 0)
    before = running - ratio.to(tl.float64)
    share = _round_half_even(running.to(tl.float32) * rest).to(tl.int64)
    share -= _round_half_even(before.to(tl.float32) * rest).to(tl.int64)
    quota = tl.minimum(low + share, up).to(tl.int32)

    # What is missing, group by group, most kept first; or what is too much, in the reverse order.
    target = tl.minimum(most, places)
    highest = tl.max(kept, 0)
    missing = target - tl.sum(quota, 0)
    quota += _hand_out(missing, up - quota, highest - kept, highest, False)
    quota -= _hand_out(-missing, quota, kept, highest, True)
    tl.store(quota_ptr + image * groups + g, quota, mask=g < groups)
