"""From features, importance and a budget to the tokens that are kept."""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from lvtp.budget import Budget
from lvtp.hf.options import Keep, Method
from lvtp.select import id_selection, prune_sid


def budgets(keep: Keep, features: Sequence[Tensor], prompts: Sequence[int]) -> list[int]:
    """How many tokens every unit keeps: at least 1, at most all; a ratio rounds half up.

    Args:
        features: unit i: [N_i, D].
        prompts: the prompt that unit i stands in; a `Budget` is for each prompt.
    """
    if not isinstance(keep, Budget):
        return [count(keep, len(tokens)) for tokens in features]
    shared = [0] * len(features)
    for prompt in sorted(set(prompts)):
        units = [unit for unit, where in enumerate(prompts) if where == prompt]
        given = keep.share([_comparable(features[unit]) for unit in units])
        for unit, tokens in zip(units, given, strict=True):
            shared[unit] = tokens
    return shared


def count(keep: float, tokens: int) -> int:
    """How many of `tokens` an int or a ratio keeps."""
    wanted = math.floor(keep * tokens + 0.5) if isinstance(keep, float) else keep
    return min(max(wanted, 1), tokens)


def select(
    method: Method, features: Sequence[Tensor], importance: Sequence[Tensor], budgets: Sequence[int]
) -> list[Tensor]:
    """The kept tokens of every unit: int64 [K_i], ascending, for the order of the grid is part of what a model reads.

    Units of the same size and budget go in one batch.
    """
    groups = defaultdict(list)
    for unit, tokens in enumerate(features):
        groups[len(tokens), budgets[unit]].append(unit)
    selected: dict[int, Tensor] = {}
    for (tokens, budget), units in groups.items():
        batch = torch.stack([features[unit] for unit in units])  # [n, N, D]
        if budget == tokens:
            picks = torch.arange(tokens, device=batch.device).expand(len(units), tokens)
        else:
            scores = torch.stack([importance[unit] for unit in units]).to(batch.device)  # [n, N]
            picks = _pick(method, _comparable(batch), scores, budget)
        selected |= zip(units, picks, strict=True)
    return [selected[unit] for unit in range(len(features))]


def _comparable(features: Tensor) -> Tensor:
    """In a dtype that the selectors take."""
    return features.float() if features.dtype == torch.float64 else features


def _pick(method: Method, features: Tensor, importance: Tensor, k: int) -> Tensor:
    """[n, N, D], [n, N] -> int64 [n, k], ascending."""
    if method == "prune_sid":
        return prune_sid(features, importance, k)
    if method == "id_selection":
        return id_selection(features, importance, k).sort(dim=1).values
    indices = method(features, importance, k)
    _check_indices(indices, len(features), features.shape[1], k)
    return indices.to(features.device, torch.int64).sort(dim=1).values


def _check_indices(indices, n: int, tokens: int, k: int) -> None:
    """Raises unless a selector of the caller's kept its side of the contract; see `lvtp.hf.prune`."""
    if not isinstance(indices, Tensor):
        got = type(indices).__name__
    else:
        got = f"{str(indices.dtype).removeprefix('torch.')} {list(indices.shape)}"
    if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.dtype == torch.bool:
        raise TypeError(
            f"method must return the indices of the tokens to keep, int64 [{n}, {k}], got {got}; selectors that merge "
            "tokens and return features are not supported, because the language model reads tokens at their places"
        )
    if list(indices.shape) != [n, k]:
        raise ValueError(f"method must return k={k} indices for each of {n} images, int64 [{n}, {k}], got {got}")
    ascending = indices.sort(dim=1).values
    if bool((ascending[:, 0] < 0).any()) or bool((ascending[:, -1] >= tokens).any()):
        raise ValueError(f"method must return indices in [0, {tokens}), got {int(indices.min())}..{int(indices.max())}")
    if bool((ascending.diff(dim=1) == 0).any()):
        raise ValueError("method must return every token at most once, got an index twice")
