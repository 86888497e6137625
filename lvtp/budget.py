"""How many tokens each image of a batch, or frame of a video, should keep."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvtp import checks
from lvtp.ops import call, mean_similarity
from lvtp.reference import shares


def dynamic_budget(features: Tensor, total: int, minimum: int = 1) -> Tensor:
    """Share `total` tokens among the images by how little each repeats itself (PruneSID, arXiv 2603.09480).

    Proportional to phi = 1 - rho (`mean_similarity`), between `minimum` and N each; what rounding leaves over goes to
    the largest remainders (ties: lowest index).

    Args:
        features: [B, N, D] float32, float16 or bfloat16.
        total: tokens for the whole batch, in [B * minimum, B * N].
        minimum: the least an image gets, in [0, N].

    Returns:
        int64 [B], adding up to `total`.

    Raises:
        RuntimeError: an argument of another rank or dtype, or out of range; it names the argument.
        TypeError, ValueError: an argument of the wrong type, or an array that torch cannot read.
    """
    return call("dynamic_budget", features, total, minimum)


@dataclass(frozen=True)
class Budget:
    """A fixed number of tokens for all images (crops, frames) of one request together; `keep=` of `lvtp.hf.prune`.

    Attributes:
        total: tokens for the request, at least 1.
        dynamic: whether an image that repeats itself less gets more of them (`dynamic_budget`); else all get the same,
            as far as they have as many.
    """

    total: int
    dynamic: bool = True

    def __post_init__(self):
        object.__setattr__(self, "total", checks.count("Budget", "total", self.total))  # NumPy's becomes Python's
        if self.total < 1:
            raise ValueError(f"total must be an int of at least 1, got {self.total!r}")
        if not isinstance(self.dynamic, bool):
            raise ValueError(f"dynamic must be True or False, got {self.dynamic!r}")

    def check(self, images: int) -> None:
        """Raises ValueError unless each of so many images can have a token."""
        if self.total < images:
            raise ValueError(
                f"total must be at least 1 for each of the {images} images (crops, frames) of a request, "
                f"got {self.total}"
            )

    def share(self, features: Sequence[Tensor]) -> list[int]:
        """How many tokens each image keeps: at least 1, all together `total`, or everything if there is less.

        Args:
            features: image i: [N_i, D] float32, float16 or bfloat16.
        """
        sizes = [len(image) for image in features]
        self.check(len(sizes))
        total = min(self.total, sum(sizes))
        with torch.device("cpu"):  # whatever the caller's default device
            rho = _mean_similarities(features) if self.dynamic else torch.zeros(len(sizes))
            return shares(rho, torch.tensor(sizes), total, torch.ones(len(sizes), dtype=torch.long)).tolist()


def _mean_similarities(features: Sequence[Tensor]) -> Tensor:
    """fp32 [n]; images with the same number of tokens go in one batch."""
    groups = defaultdict(list)
    for image, tokens in enumerate(features):
        groups[len(tokens)].append(image)
    rho = torch.empty(len(features))
    for images in groups.values():
        rho[images] = mean_similarity(torch.stack([features[image] for image in images])).cpu()
    return rho
