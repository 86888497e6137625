"""What the Qwen-VL families share: images and videos of any size in one sequence, positions on three axes (mRoPE)."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.attention import received_by_segment
from lvtp.hf.family import Encoded, Family, Size
from lvtp.hf.options import Options, Score
from lvtp.hf.sequence import Before, numbered, real_tokens
from lvtp.hf.tower import called

# What `get_rope_index` counts, beside the mask.
_COUNTED = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")


class MRope(Family):
    """A placeholder is a block of patches, merged before the language model; the selector compares merged tokens.

    The importance of a token is the mean attention that its patches receive. A frame is what the tower reads at once,
    `temporal_patch_size` pictures of a video. With positions="compact", the tokens of a prompt that lost some are
    numbered through, the same on all three axes.
    """

    modalities: ClassVar = {"image": "pixel_values", "video": "pixel_values_videos"}
    scopes = ("image", "frame")
    default_positions = "original"
    spells_positions = True
    continues_by_itself = True

    def scored_layer(self, tower: PreTrainedConfig) -> int:
        """The last layer of the tower that reads whole frames."""
        return tower.depth - 1

    def raster_order(self, scores: Tensor, grid: Tensor, tower: PreTrainedConfig) -> Tensor:
        """Scores [sum N_i] in the tower's order -> in the order of the placeholders."""
        return scores

    def tokens(self, outputs: ModelOutput) -> list[Tensor]:
        """All that the language model reads of every image or video: [N_i, D] each."""
        return outputs.pooler_output

    def check(self, model: PreTrainedModel, options: Options) -> None:
        if options.score == "cls":
            raise ValueError(
                f"score='cls' needs a vision tower with a CLS token, that of {self.model_class} has none; "
                "use score='received'"
            )
        if not callable(options.tower_score):
            self.scored_layer(model.config.vision_config)

    def encode(
        self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], score: Score, scope: str = "image"
    ) -> Encoded:
        core, tower = model.base_model, model.base_model.visual
        grid = arguments.get(f"{modality}_grid_thw")  # [items, 3]
        if grid is None:
            raise ValueError(f"{modality}_grid_thw must be given beside {self.modalities[modality]}, got none")
        with ExitStack() as stack:
            if not callable(score):
                layer = tower.blocks[self.scored_layer(tower.config)].attn
                received = stack.enter_context(received_by_segment(layer))
            outputs = getattr(core, f"get_{modality}_features")(**arguments, return_dict=True)

        frames = grid[:, 0].tolist() if scope == "frame" else [1] * len(grid)
        merged = [item.detach().unflatten(0, (n, -1)) for item, n in zip(outputs.pooler_output, frames, strict=True)]
        if callable(score):
            importance = [row for item in merged for row in called(score, item)]
        else:
            patches = torch.cat(received).unflatten(0, (-1, tower.spatial_merge_size**2))
            scores = self.raster_order(patches.mean(dim=1), grid, tower.config)
            importance = list(scores.split([item.shape[1] for item in merged for _ in item]))
        tokens = zip(self.tokens(outputs), frames, strict=True)
        projected = [frame for item, n in tokens for frame in item.unflatten(0, (n, -1))]
        return Encoded(projected, [frame for item in merged for frame in item], importance)

    def sizes(self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], scope: str) -> list[Size]:
        merged = model.base_model.visual.spatial_merge_size**2
        sizes = []
        for t, h, w in arguments[f"{modality}_grid_thw"].tolist():
            frame = h * w // merged
            sizes.append(Size(t * frame, (frame,) * t if scope == "frame" else (t * frame,)))
        return sizes

    def original_positions(
        self, model: PreTrainedModel, call: Mapping[str, Any], real: Tensor, generating: bool
    ) -> Tensor:
        """[3, B, S]: time, height and width. The mask decides what is counted, also without `generate`."""
        if call.get("mm_token_type_ids") is None:
            raise ValueError(
                "mm_token_type_ids must be given to count positions on three axes, got none "
                "(the processor returns it beside input_ids); positions='compact' does without"
            )
        counted = {name: call[name] for name in _COUNTED if call.get(name) is not None}
        return model.base_model.get_rope_index(**counted, attention_mask=real.long())[0]

    def compact_positions(
        self, model: PreTrainedModel, call: Mapping[str, Any], real: Tensor, kept: Tensor, generating: bool
    ) -> Tensor:
        """[3, B, S]: one number on all axes; a prompt that keeps every token has its three."""
        numbers = numbered(kept).expand(3, *kept.shape)
        whole = (kept == real).all(dim=1)  # [B]
        if call.get("mm_token_type_ids") is None or not bool(whole.any()):
            return numbers  # the unpruned model would also number on all axes alike
        return torch.where(whole[:, None], self.original_positions(model, call, real, generating), numbers)

    def place(
        self, model: PreTrainedModel, call: dict[str, Any], next_position: Tensor, before: Before | None
    ) -> dict[str, Any]:
        """Positions [4, B, S']: first one that numbers the tokens through, from which masks are made, then the axes.

        Without it, gaps in the positions would be read as the starts of packed sequences. Steps that come without
        positions go on from `rope_deltas`, how far positions run ahead of the tokens.
        """
        real = real_tokens(call)
        through, tokens, axes = numbered(real), real.sum(dim=1), call["position_ids"]
        if axes.dim() == 3 and len(axes) != 3:
            raise ValueError(f"position_ids must have 3 axes (time, height, width) or none of them, got {len(axes)}")
        axes = axes.expand(3, *through.shape)
        if before is not None:
            through, tokens = through + before.tokens[:, None], tokens + before.tokens
        model.base_model.rope_deltas = (next_position - tokens)[:, None]
        call = {name: value for name, value in call.items() if name != "second_per_grid_ts"}
        return call | {"position_ids": torch.cat([through[None], axes])}
