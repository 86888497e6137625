"""What every launcher shares: argument checks, the device, and how large a block may be.

The sizes were chosen so that nothing spills and shared memory stays below 48 KiB on every chip the tests compile for;
none has been tuned on a device. They are read at each call, so that tests can make them small.
"""

import functools
from collections.abc import Callable

import torch
from triton import next_power_of_2

from lvtp import checks

BLOCK = 2048  # tokens of one image that a program holds in registers at once
TILE = 64  # tokens on either side of a tile of pairs
DEPTH = 64  # features a step brings in


def operator(launcher: Callable) -> Callable:
    """Check the arguments as every backend does (`lvtp.checks`), then launch on the device of the first one."""
    check = getattr(checks, launcher.__name__)

    @functools.wraps(launcher)
    def checked(*args, **kwargs):
        check(*args, **kwargs)
        if args[0].is_cuda:
            with torch.cuda.device_of(args[0]):
                return launcher(*args, **kwargs)
        return launcher(*args, **kwargs)

    return checked


def block_of(size: int, most: int, least: int = 16) -> int:
    """A power of two that covers `size` where `most` allows. 16 is the least that tl.dot takes."""
    return min(most, max(least, next_power_of_2(size)))


def over_tokens(n: int) -> dict:
    """For a program that walks over the tokens of an image with one or several blocks."""
    block = block_of(n, BLOCK)
    warps = min(16, max(4, block // 128))
    return {"BLOCK": block, "ONE_BLOCK": n <= block, "num_warps": warps, "enable_fp_fusion": False}
