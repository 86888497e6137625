"""LLaVA-OneVision: images as in LLaVA-NeXT, shrunk to a largest size; videos of pooled frames with one newline."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from lvtp.hf.anyres import Anyres
from lvtp.hf.family import Encoded, Size, stacked
from lvtp.hf.layout import Layout
from lvtp.hf.options import Score
from lvtp.hf.tower import encode_with_tower


class LlavaOnevision(Anyres):
    model_class = "LlavaOnevisionForConditionalGeneration"
    modalities: ClassVar = {"image": "pixel_values", "video": "pixel_values_videos"}
    scopes = ("image", "crop", "frame")

    def crops(self, model: PreTrainedModel, arguments: dict[str, Any]) -> list[int]:
        pinpoints, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
        sizes, in_prompt = self.image_sizes(arguments), arguments.get("batch_num_images")
        # Several images in one prompt are not cut into crops.
        alone = [True] * len(sizes) if in_prompt is None else [n == 1 for n in in_prompt for _ in range(n)]
        return [
            image_size_to_num_patches(size, pinpoints, side) if cut else 1
            for size, cut in zip(sizes, alone, strict=True)
        ]

    def pack(
        self, model: PreTrainedModel, arguments: dict[str, Any], values: Sequence[Tensor], newline: Tensor
    ) -> list[Tensor]:
        aspect_ratio = arguments.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
        images, _ = model.base_model.pack_image_features(values, arguments["image_sizes"], newline, aspect_ratio)
        return images

    def encode(
        self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], score: Score, scope: str = "image"
    ) -> Encoded:
        if modality == "image":
            return super().encode(model, modality, arguments, score, _of_images(scope))
        seen = encode_with_tower(model, modality, arguments, score)
        pool = model.base_model.apply_pooling
        videos, frames = arguments["pixel_values_videos"].shape[:2]
        units = frames if scope == "frame" else 1
        features = pool(seen.features)  # [videos * frames, N, Dv]
        importance = pool(seen.importance[..., None]).flatten(0, 1)[:, 0]
        shape = (videos * units, -1)
        newline = torch.zeros(seen.outputs.pooler_output.shape[1], dtype=torch.bool)
        newline[-1] = True  # one, after the last frame
        return Encoded(
            list(seen.outputs.pooler_output),
            list(features.reshape(*shape, features.shape[-1])),
            list(importance.reshape(shape)),
            [Layout(units, newline, torch.zeros(len(newline), dtype=torch.long))] * videos,
        )

    def sizes(self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], scope: str) -> list[Size]:
        if modality == "image":
            return super().sizes(model, modality, arguments, _of_images(scope))
        videos, frames = arguments["pixel_values_videos"].shape[:2]
        vision = model.config.vision_config
        tokens = math.ceil(vision.image_size // vision.patch_size / 2) ** 2  # of a frame
        units = (tokens,) * frames if scope == "frame" else (tokens * frames,)
        return [Size(tokens * frames + 1, units)] * videos

    def container(self, modality: str, encoded: Encoded, tokens: list[Tensor]) -> ModelOutput:
        if modality == "image":
            return super().container(modality, encoded, tokens)
        return BaseModelOutputWithPooling(pooler_output=stacked(tokens))


def _of_images(scope: str) -> str:
    return "image" if scope == "frame" else scope
