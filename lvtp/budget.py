"""How many tokens each image of a batch, or frame of a video, should keep."""

from torch import Tensor

from lvtp.ops import call


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
    """
    return call("dynamic_budget", features, total, minimum)
