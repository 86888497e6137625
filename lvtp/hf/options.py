"""What a caller can ask for, checked once at the call that asks."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

from torch import Tensor

from lvtp.budget import Budget

METHODS = ("id_selection", "prune_sid")
SCORES = ("auto", "cls", "received", "prompt")
POSITIONS = ("auto", "compact", "original")

Keep = int | float | Budget
Method = str | Callable[[Tensor, Tensor, int], Tensor]
Score = str | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """The arguments of `prune`, `patch`, `prepare` and `info`; see `lvtp.hf.prune` for their meaning."""

    method: Method = "id_selection"
    keep: Keep = 64
    score: Score = "auto"
    positions: str = "auto"
    scope: str = "image"
    newline: str | None = None
    restore_prompt: bool = True

    def __post_init__(self):
        if not callable(self.method):
            _check_choice("method", self.method, METHODS, " or a callable")
        object.__setattr__(self, "keep", _checked_keep(self.keep))
        if not callable(self.score):
            _check_choice("score", self.score, SCORES, " or a callable")
        _check_choice("positions", self.positions, POSITIONS)
        if not isinstance(self.restore_prompt, bool):
            raise ValueError(f"restore_prompt must be True or False, got {self.restore_prompt!r}")

    @property
    def tower_score(self) -> Score:
        """What the encoder of a family has to score by; with score="prompt" it is the language model that scores."""
        return _no_score if self.score == "prompt" else self.score


def _no_score(features: Tensor) -> Tensor:
    return features.new_zeros(features.shape[:2])


def _checked_keep(keep: Keep) -> Keep:
    """`keep` as an int, a float or a `Budget`; NumPy's numbers are taken, too."""
    if isinstance(keep, Integral) and not isinstance(keep, bool) and keep >= 1:
        return int(keep)
    if isinstance(keep, Real) and not isinstance(keep, Integral) and 0 < keep <= 1:
        return float(keep)
    if isinstance(keep, Budget):
        return keep
    raise ValueError(
        "keep must be an int of at least 1 (tokens an image), a float in (0, 1] (ratio) or an lvtp.Budget "
        f"(tokens a request), got {keep!r}"
    )


def _check_choice(argument: str, value, choices: tuple, more: str = "") -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, choices))}{more}, got {value!r}")
