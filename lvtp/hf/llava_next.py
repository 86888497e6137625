"""LLaVA-NeXT (1.6): an overview and up to four crops an image."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from lvtp.hf.anyres import Anyres


class LlavaNext(Anyres):
    model_class = "LlavaNextForConditionalGeneration"

    def crops(self, model: PreTrainedModel, arguments: dict[str, Any]) -> list[int]:
        pinpoints, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
        return [image_size_to_num_patches(size, pinpoints, side) for size in self.image_sizes(arguments)]

    def pack(
        self, model: PreTrainedModel, arguments: dict[str, Any], values: Sequence[Tensor], newline: Tensor
    ) -> list[Tensor]:
        strategy = arguments.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
        images, _ = model.base_model.pack_image_features(values, arguments["image_sizes"], strategy, newline)
        return images
