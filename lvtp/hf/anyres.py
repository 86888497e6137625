"""What LLaVA-NeXT and LLaVA-OneVision share: an image is an overview and a grid of crops, packed into one sequence.

The model unpads the grid, may shrink it, and puts a newline token after every row. Its own `pack_image_features` does
the same with features and scores, so these follow the tokens wherever they go.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.family import Encoded, Size
from lvtp.hf.layout import Layout
from lvtp.hf.options import Options, Score
from lvtp.hf.tower import Seen, TowerFamily, encode_with_tower, tower_tokens

_NEWLINE = -1.0


class Anyres(TowerFamily):
    """scope="image" selects from the packed tokens. scope="crop" is what the papers do: each crop has a budget of its
    own, there is no unpadding and there are no newlines."""

    modalities: ClassVar = {"image": "pixel_values"}
    scopes = ("image", "crop")
    newlines = ("rows", "drop", "all")

    @abstractmethod
    def crops(self, model: PreTrainedModel, arguments: dict[str, Any]) -> list[int]:
        """How many crops every image has, the overview among them."""

    @abstractmethod
    def pack(
        self, model: PreTrainedModel, arguments: dict[str, Any], values: Sequence[Tensor], newline: Tensor
    ) -> list[Tensor]:
        """The model's own packing: values [crops, N, D] an image and a newline [D] -> [M, D] an image."""

    def check(self, model: PreTrainedModel, options: Options) -> None:
        super().check(model, options)
        if options.scope != "crop":
            return
        if options.newline not in (None, "drop"):
            raise ValueError(f"newline must be 'drop' with scope='crop' (crops have no rows), got {options.newline!r}")
        if options.positions == "original":
            raise ValueError(
                "positions must be 'compact' with scope='crop': the tokens of a crop have no places of their own in "
                "the prompt; scope='image' keeps them"
            )
        if options.score == "prompt":
            raise ValueError("score='prompt' needs scope='image': the language model never sees crops")

    def image_sizes(self, arguments: dict[str, Any]) -> Tensor:
        """Height and width of every image, [n, 2]."""
        if arguments.get("image_sizes") is None:
            raise ValueError("image_sizes must be given beside pixel_values, got none")
        return arguments["image_sizes"]

    def encode(
        self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], score: Score, scope: str = "image"
    ) -> Encoded:
        crops = self.crops(model, arguments)
        seen = encode_with_tower(model, modality, arguments, score)
        layouts = self._layouts(model, arguments, crops, seen.features.shape[1], scope)
        packed = list(seen.outputs.pooler_output)
        if scope == "crop":
            layouts = [
                Layout(layout.units, layout.newline, layout.row, tokens.flatten(0, 1))
                for layout, tokens in zip(layouts, seen.projected.split(crops), strict=True)
            ]
            return Encoded(packed, list(seen.features), list(seen.importance), layouts)
        features, importance = self._packed(model, arguments, crops, seen, layouts)
        return Encoded(packed, features, importance, layouts)

    def sizes(self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], scope: str) -> list[Size]:
        crops, tokens = self.crops(model, arguments), tower_tokens(model, arguments)
        sizes = []
        for count, layout in zip(crops, self._layouts(model, arguments, crops, tokens, scope), strict=True):
            units = (tokens,) * count if scope == "crop" else (int((~layout.newline).sum()),)
            sizes.append(Size(len(layout.newline), units))
        return sizes

    def _layouts(
        self, model: PreTrainedModel, arguments: dict[str, Any], crops: list[int], tokens: int, scope: str
    ) -> list[Layout]:
        blank = [torch.zeros(count, tokens, 1) for count in crops]
        layouts = []
        for count, packed in zip(crops, self.pack(model, arguments, blank, torch.tensor([_NEWLINE])), strict=True):
            newline = packed[:, 0] == _NEWLINE  # [M]
            row = newline.cumsum(dim=0) - newline.long()
            if count > 1:
                row[:tokens] = -1  # the overview comes first and has no rows
            layouts.append(Layout(count if scope == "crop" else 1, newline, row))
        return layouts

    def _packed(
        self, model: PreTrainedModel, arguments: dict[str, Any], crops: list[int], seen: Seen, layouts: list[Layout]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Features and importance of the crops -> of the tokens of every packed image: [N_i, Dv] and [N_i]."""
        packed = []
        for values in (seen.features, seen.importance[..., None]):
            newline = values.new_zeros(values.shape[-1])
            images = self.pack(model, arguments, values.split(crops), newline)
            packed.append(
                [image[~layout.newline.to(image.device)] for image, layout in zip(images, layouts, strict=True)]
            )
        features, importance = packed
        return features, [scores[:, 0] for scores in importance]
