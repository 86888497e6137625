"""InternVL: tiles of one size, each 2 x 2 tower tokens merged into one; the frames of a video are tiles too."""

from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.family import Encoded, Size, stacked
from lvtp.hf.options import Score
from lvtp.hf.tower import TowerFamily, encode_with_tower, tower_tokens


class InternVL(TowerFamily):
    """A call does not say which tiles make up one image, so every scope means a tile."""

    model_class = "InternVLForConditionalGeneration"
    modalities: ClassVar = {"image": "pixel_values"}
    scopes = ("image", "crop", "frame")

    def encode(
        self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], score: Score, scope: str = "image"
    ) -> Encoded:
        def merge(importance: Tensor) -> Tensor:
            """[n, T] -> [n, N], as the features are merged."""
            side = int(importance.shape[1] ** 0.5)
            grid = importance.unflatten(1, (side, side))[..., None]
            shuffled = model.base_model.pixel_shuffle(grid, scale_factor=model.config.downsample_ratio)
            return shuffled.mean(dim=-1).flatten(1)

        seen = encode_with_tower(model, modality, arguments, score, merge)
        return Encoded(list(seen.outputs.pooler_output), list(seen.features), list(seen.importance))

    def sizes(self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], scope: str) -> list[Size]:
        tokens = int(tower_tokens(model, arguments) * model.config.downsample_ratio**2)
        return [Size(tokens, (tokens,))] * len(arguments["pixel_values"])

    def container(self, modality: str, encoded: Encoded, tokens: list[Tensor]) -> ModelOutput:
        return BaseModelOutputWithPooling(pooler_output=stacked(tokens))
