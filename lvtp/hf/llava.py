"""LLaVA-1.5: one crop an image, N tower tokens to N placeholders, one to one."""

from typing import Any, ClassVar

from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.family import Encoded
from lvtp.hf.options import Score
from lvtp.hf.tower import TowerFamily, encode_with_tower


class Llava(TowerFamily):
    model_class = "LlavaForConditionalGeneration"
    modalities: ClassVar = {"image": "pixel_values"}
    scopes = ("image",)

    def encode(
        self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], score: Score, scope: str = "image"
    ) -> Encoded:
        if arguments.get("image_sizes") is not None:
            raise ValueError("image_sizes must be left out: towers with images of several sizes are not supported")
        seen = encode_with_tower(model, modality, arguments, score)
        return Encoded(list(seen.outputs.pooler_output), list(seen.features), list(seen.importance))
