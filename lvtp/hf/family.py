"""What a model family states about itself. Everything else is shared."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.layout import Layout
from lvtp.hf.options import Options, Score
from lvtp.hf.sequence import Before, numbered, spanned


@dataclass(frozen=True)
class Encoded:
    """The images (or videos) of one call, in prompt order, cut into units: what a budget is counted over."""

    projected: list[Tensor]  # image i: [M_i, D]: what replaces its placeholders in the language model
    features: list[Tensor]  # unit: [N, Dv]: what the selector compares
    importance: list[Tensor]  # unit: fp32 [N]
    layouts: list[Layout] | None = None  # of image i; None: an image is one unit, a placeholder for each token


class Size(NamedTuple):
    """How large an image or video is."""

    placeholders: int
    units: tuple[int, ...]  # tokens of each


def stacked(tokens: list[Tensor]) -> Tensor:
    """[K_i, D] each -> [n, K, D], for models that want one tensor.

    Where K differs: [sum K_i, 1, D]. Models read it flattened, and `generate` finds the images of a prompt by counting.
    """
    if len({len(image) for image in tokens}) == 1:
        return torch.stack(tokens)
    return torch.cat(tokens)[:, None]


class Family(ABC):
    """One family of models: its taps, its score mapping, its container and its positions."""

    model_class: ClassVar[str]  # name of the transformers class; subclasses of it are served too
    modalities: ClassVar[Mapping[str, str]]  # modality -> the argument that carries its pixels
    scopes: ClassVar[tuple[str, ...]]  # what a budget can be counted over
    newlines: ClassVar[tuple[str, ...]] = ()  # policies for row-separator tokens, where it has them; default first
    default_positions: ClassVar[str] = "compact"
    # Whether compact positions have to be passed on; else the model numbers a shortened prompt alike.
    spells_positions: ClassVar[bool] = False
    continues_by_itself: ClassVar[bool] = False  # whether the model remembers where its latest prompt's positions go on

    @abstractmethod
    def check(self, model: PreTrainedModel, options: Options) -> None:
        """Raises for what this family cannot do, before anything runs."""

    @abstractmethod
    def encode(
        self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], score: Score, scope: str = "image"
    ) -> Encoded:
        """Runs the model's own encoder once on `arguments` and maps features and scores to the placeholders."""

    @abstractmethod
    def sizes(self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], scope: str) -> list[Size]:
        """How large the images or videos are that `encode` would find; runs nothing."""

    def container(self, modality: str, encoded: Encoded, tokens: list[Tensor]) -> ModelOutput:
        """The tokens [K_i, D] left of every image, as the model takes them from `mm_encoder_outputs`.

        A new one every time: beam search rewrites it in place.
        """
        return BaseModelOutputWithPooling(pooler_output=list(tokens))

    def newline(self, options: Options) -> str | None:
        """The policy for row separators; None for a family without."""
        return options.newline or (self.newlines[0] if self.newlines else None)

    def positions(self, options: Options) -> str:
        """ "compact" or "original"."""
        return self.default_positions if options.positions == "auto" else options.positions

    def original_positions(
        self, model: PreTrainedModel, call: Mapping[str, Any], real: Tensor, generating: bool
    ) -> Tensor:
        """Positions [B, S] in the unpruned `call` with the `real` (not padding) tokens [B, S].

        The model alone numbers every column from the first token on; `generate` those that the mask shows.
        """
        return numbered(real if generating else spanned(real))

    def compact_positions(
        self, model: PreTrainedModel, call: Mapping[str, Any], real: Tensor, kept: Tensor, generating: bool
    ) -> Tensor:
        """Positions [B, S] as if the `real` tokens that are not `kept` had never been there.

        Those of a prompt that keeps every token are its original ones, whatever other prompts lose.
        """
        return numbered(kept if generating else kept | (spanned(real) & ~real))

    def place(
        self, model: PreTrainedModel, call: dict[str, Any], next_position: Tensor, before: Before | None
    ) -> dict[str, Any]:
        """The shortened `call` with its positions as the model takes them, and the model told how they go on.

        Args:
            next_position: int64 [B], the position of the token after each prompt.
            before: what is cached already; None: nothing.
        """
        return call
