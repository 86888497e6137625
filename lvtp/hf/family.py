"""What a model family states about itself. Everything else is shared."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.options import Options, Score


@dataclass(frozen=True)
class Encoded:
    """The images (or videos) of one call, in prompt order; item i has N_i placeholders in the prompt."""

    projected: list[Tensor]  # [N_i, D]: what replaces the placeholders in the language model
    features: list[Tensor]  # [N_i, Dv]: what the selector compares
    importance: list[Tensor]  # [N_i] fp32


class Family(ABC):
    """One family of models: its taps, its score mapping, its container and its positions."""

    model_class: ClassVar[str]  # name of the transformers class; subclasses of it are served too
    modalities: ClassVar[Mapping[str, str]]  # modality -> the argument that carries its pixels
    scopes: ClassVar[tuple[str, ...]]  # what a budget can be counted over
    newlines: ClassVar[tuple[str, ...]] = ()  # policies for row-separator tokens, where the family has them
    default_positions: ClassVar[str] = "compact"
    continues_by_itself: ClassVar[bool] = False  # whether the model knows where the positions after a prompt go on

    @abstractmethod
    def check(self, model: PreTrainedModel, options: Options) -> None:
        """Raises for what this family cannot do, before anything runs."""

    @abstractmethod
    def encode(
        self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], score: Score, scope: str = "image"
    ) -> Encoded:
        """Runs the model's own encoder once on `arguments` and maps features and scores to the placeholders."""

    def container(self, encoded: Encoded, selected: list[Tensor]) -> ModelOutput:
        """The tokens `selected` [K_i] of every item, as the model takes them from `mm_encoder_outputs`.

        A new one every time: beam search rewrites it in place.
        """
        items = zip(encoded.projected, selected, strict=True)
        return BaseModelOutputWithPooling(pooler_output=[item[index.to(item.device)] for item, index in items])

    def positions(self, options: Options) -> str:
        """ "compact" or "original"."""
        return self.default_positions if options.positions == "auto" else options.positions

    def original_positions(self, model: PreTrainedModel, call: Mapping[str, Any], real: Tensor) -> Tensor:
        """Positions [B, S] in the unpruned `call`, counted over its `real` (not padding) tokens [B, S]."""
        return (real.long().cumsum(dim=1) - 1).clamp(min=0)

    def place(self, model: PreTrainedModel, call: dict[str, Any], next_position: Tensor) -> dict[str, Any]:
        """The shortened `call` with its positions as the model takes them, and the model told how they go on.

        `next_position` [B] is the position of the token after each prompt.
        """
        return call
