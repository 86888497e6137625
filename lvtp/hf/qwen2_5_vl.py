"""Qwen2.5-VL: most layers of the tower read windows, and its tokens are in window order until they are merged."""

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.vision_utils import get_vision_window_index

from lvtp.hf.mrope import MRope


class Qwen25VL(MRope):
    model_class = "Qwen2_5_VLForConditionalGeneration"

    def scored_layer(self, tower: PreTrainedConfig) -> int:
        layers = [layer for layer in tower.fullatt_block_indexes if 0 <= layer < tower.depth]
        if not layers:
            raise ValueError(
                f"fullatt_block_indexes of the vision tower must name one of its {tower.depth} layers to read "
                f"importance from, got {tower.fullatt_block_indexes}; pass score as a callable otherwise"
            )
        return max(layers)

    def raster_order(self, scores: Tensor, grid: Tensor, tower: PreTrainedConfig) -> Tensor:
        order, _ = get_vision_window_index(
            grid,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )  # place in the tower -> raster index
        return scores[torch.argsort(order).to(scores.device)]
