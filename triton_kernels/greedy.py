"""The greedy engine in Triton: the loop of rules.py, one program an image or group, all picks in one launch.

It is eager where the CPU's is lazy: a row of similarities costs a program no more than a few of its entries. Each pick
is one pass over the keys that updates them and finds the next maximum on the way. Up to `BLOCK` tokens the keys stay in
registers; beyond, they live in `state` and pass through in blocks.
"""

import triton
import triton.language as tl

from lvtp.triton_kernels.rules import OUT


@triton.jit
def _keys(state_ptr, labels_ptr, label, token, n, GROUPED: tl.constexpr):
    """Keys of these tokens; -Inf for those beyond the image or of another group."""
    member = token < n
    if GROUPED:
        member = member & (tl.load(labels_ptr + token, mask=member, other=0) == label)
    return tl.load(state_ptr + token, mask=member, other=OUT)


@triton.jit
def _after_pick(keys, token, picked, i, row_ptr, param, UPDATE: tl.constexpr):
    """What taking token i does to these keys; similarities to tokens that are out are not loaded."""
    r = tl.load(row_ptr + token, mask=keys > OUT, other=0.0).to(tl.float32)
    return tl.where((token == i) | (keys == OUT), OUT, UPDATE(keys, picked, r, param))


@triton.jit
def _pass(
    state_ptr, labels_ptr, row_ptr, label, n, picked, i, param,
    GROUPED: tl.constexpr, BLOCK: tl.constexpr, AFTER_PICK: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """Over all blocks: bring keys up to date with the last pick, if there was one; the best and its index."""
    best, at = OUT, 0
    for start in range(0, n, BLOCK):
        token = start + tl.arange(0, BLOCK)
        keys = _keys(state_ptr, labels_ptr, label, token, n, GROUPED)
        if AFTER_PICK:
            changed = _after_pick(keys, token, picked, i, row_ptr, param, UPDATE)
            tl.store(state_ptr + token, changed, mask=changed != keys)  # never those of another group, which are -Inf
            keys = changed
        highest, j = tl.max(keys, 0, return_indices=True)  # ties: lowest index
        at = tl.where(highest > best, start + j, at)  # strict: an earlier block keeps its tie
        best = tl.maximum(best, highest)
    return best, at


@triton.jit
def greedy(
    state_ptr,  # fp32 [N], the keys to start with
    similarity_ptr,  # [N, N]
    labels_ptr,  # int64 [N], GROUPED only
    out_ptr,
    n, k, param, label,
    GROUPED: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PICKABLE: tl.constexpr, UPDATE: tl.constexpr, EMIT: tl.constexpr,
):  # fmt: skip
    """k times, or until the rule says stop: EMIT(out, step, i) for the best token i. Returns the number of picks."""
    token = tl.arange(0, BLOCK)
    keys = _keys(state_ptr, labels_ptr, label, token, n, GROUPED)
    best, i = tl.max(keys, 0, return_indices=True)
    if not ONE_BLOCK:
        best, i = _pass(
            state_ptr, labels_ptr, similarity_ptr, label, n, best, i, param, GROUPED, BLOCK, False, UPDATE
        )  # fmt: skip
    step = 0
    while (step < k) & PICKABLE(best):
        EMIT(out_ptr, step, i)
        row_ptr = similarity_ptr + i.to(tl.int64) * n
        if ONE_BLOCK:
            keys = _after_pick(keys, token, best, i, row_ptr, param, UPDATE)
            best, i = tl.max(keys, 0, return_indices=True)
        else:
            tl.debug_barrier()  # every thread's keys are in memory before another one may load them
            best, i = _pass(
                state_ptr, labels_ptr, row_ptr, label, n, best, i, param, GROUPED, BLOCK, True, UPDATE
            )  # fmt: skip
        step += 1
    return step
