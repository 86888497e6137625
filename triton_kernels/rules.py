"""The greedy rules, one by one those of csrc/rules.h; `greedy.py` is the loop they are handed to.

A rule is two small functions, passed to a kernel as constants:

    pickable(key)                       False: the loop ends here, because no token left is worth taking
    update(key_j, key_i, sim_ij, param) the key of token j after i was taken; it never rises

A token's key is all its state: -Inf means taken, dropped or padding. The loop itself takes i out.
"""

import triton
import triton.language as tl

OUT = tl.constexpr(float("-inf"))  # the key of a token that is taken or is padding
SCORE_LIMIT = tl.constexpr(2.0**100)  # k <= 2^24 subtractions of at most this much never reach -Inf
AFTER_ALL_OTHERS = tl.constexpr(-(2.0**126))  # the score of a NaN
FARTHEST = tl.constexpr(2.0**60)  # only keeps the square of a distance finite


@triton.jit
def finite_score(s):
    return tl.where(s != s, AFTER_ALL_OTHERS, tl.minimum(tl.maximum(s, -SCORE_LIMIT), SCORE_LIMIT))


@triton.jit
def finite_similarity(r):
    """A similarity that is not a number says nothing: 0."""
    r = tl.where(r != r, 0.0, r)
    return tl.where(r == float("inf"), 1.0, tl.where(r == float("-inf"), -1.0, r))


@triton.jit
def suppression_pickable(key):
    return key > OUT


@triton.jit
def suppression_update(key, picked, r, gamma):
    """ID-Selection: a pick costs every other token exp(-gamma (1 - r)^2) of the pick's own score."""
    distance = tl.minimum(tl.maximum(1.0 - finite_similarity(r), 0.0), FARTHEST)
    return key - tl.exp(-gamma * (distance * distance)) * tl.maximum(picked, 0.0)


@triton.jit
def group_nms_pickable(key):
    return key > 0.0


@triton.jit
def group_nms_update(key, picked, r, tau):
    """Group NMS: a kept token drops those of its group (the loop sees no other) that are too similar to it."""
    return tl.where(r > tau, OUT, key)
