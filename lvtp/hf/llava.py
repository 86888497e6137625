"""LLaVA-1.5: one crop an image, N tower tokens to N placeholders, one to one."""

import inspect
from typing import Any, ClassVar

from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.family import Encoded
from lvtp.hf.options import Options, Score
from lvtp.hf.tower import TowerFamily, encode_with_tower


class Llava(TowerFamily):
    model_class = "LlavaForConditionalGeneration"
    modalities: ClassVar = {"image": "pixel_values"}
    scopes = ("image",)

    def check(self, model: PreTrainedModel, options: Options) -> None:
        tower = model.base_model.vision_tower
        if "image_sizes" in inspect.signature(tower.forward).parameters:
            raise ValueError(
                f"model must have a vision tower that takes images of one size, got {type(tower).__name__} "
                f"({tower.config.model_type}), whose images have tokens by their sizes"
            )
        super().check(model, options)

    def encode(
        self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], score: Score, scope: str = "image"
    ) -> Encoded:
        if arguments.get("image_sizes") is not None:
            raise ValueError("image_sizes must be left out: towers with images of several sizes are not supported")
        seen = encode_with_tower(model, modality, arguments, score)
        return Encoded(list(seen.outputs.pooler_output), list(seen.features), list(seen.importance))
