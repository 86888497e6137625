"""LLaVA-1.5: one crop an image, N tower tokens to N placeholders, one to one."""

from typing import Any, ClassVar

from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.family import Encoded, Family
from lvtp.hf.options import Options, Score
from lvtp.hf.tower import check_tower, encode_with_tower


class Llava(Family):
    model_class = "LlavaForConditionalGeneration"
    modalities: ClassVar = {"image": "pixel_values"}
    scopes = ("image",)

    def check(self, model: PreTrainedModel, options: Options) -> None:
        check_tower(model, options.tower_score)

    def encode(
        self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], score: Score, scope: str = "image"
    ) -> Encoded:
        if arguments.get("image_sizes") is not None:
            raise ValueError("image_sizes must be left out: towers with images of several sizes are not supported")
        outputs, features, importance = encode_with_tower(model, arguments, score)
        return Encoded(list(outputs.pooler_output), list(features), list(importance))
