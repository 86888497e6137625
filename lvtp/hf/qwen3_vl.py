"""Qwen3-VL: the first decoder layers add features of earlier tower layers (deepstack) to the visual tokens."""

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from lvtp.hf.family import Encoded
from lvtp.hf.mrope import MRope


class Qwen3VL(MRope):
    model_class = "Qwen3VLForConditionalGeneration"

    def tokens(self, outputs: ModelOutput) -> list[Tensor]:
        """[N_i, (1 + layers) * D] each: merged tokens, then what every deepstack layer adds, so that all drop alike."""
        return [
            torch.cat(parts, dim=-1) for parts in zip(outputs.pooler_output, *outputs.deepstack_features, strict=True)
        ]

    def container(self, modality: str, encoded: Encoded, tokens: list[Tensor]) -> ModelOutput:
        width = encoded.features[0].shape[-1]
        pooled, *deepstack = map(list, zip(*(item.split(width, dim=-1) for item in tokens), strict=True))
        return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=deepstack)


class Qwen3VLMoe(Qwen3VL):
    model_class = "Qwen3VLMoeForConditionalGeneration"
