"""Tiny random Qwen-VL models, and inputs with images and videos of several sizes built by hand."""

import math

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from .tiny import IMAGE_TOKEN, VIDEO_TOKEN, VOCABULARY, padded

START, END = 122, 123
PATCH, MERGE, TEMPORAL, CHANNELS = 4, 2, 2, 3

_TEXT = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
}  # fmt: skip
_VISION = {
    "depth": 4, "num_heads": 4, "in_channels": CHANNELS, "patch_size": PATCH, "spatial_merge_size": MERGE,
    "temporal_patch_size": TEMPORAL,
}  # fmt: skip
_IDS = {
    "image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip


def _qwen2():
    vision = {**_VISION, "embed_dim": 32, "hidden_size": 64}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=_TEXT, vision_config=vision, **_IDS))


def _qwen2_5():
    vision = {**_VISION, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
    # Windows of 2 x 2 merged tokens; layers 0 and 2 read the whole frame, the last one does not.
    vision |= {"window_size": 16, "fullatt_block_indexes": [0, 2], "tokens_per_second": 2}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=_TEXT, vision_config=vision, **_IDS))


def _qwen3():
    vision = {**_VISION, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]}
    text = {**_TEXT, "head_dim": 16}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **_IDS))


def _qwen3_moe():
    text = {**_TEXT, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    vision = _qwen3().config.vision_config.to_dict() | {"model_type": "qwen3_vl_moe_vision"}
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_IDS))


BUILDERS = {"qwen2": _qwen2, "qwen2_5": _qwen2_5, "qwen3": _qwen3, "qwen3_moe": _qwen3_moe}


def build(family, attention="sdpa", seed=0):
    torch.manual_seed(seed)
    model = BUILDERS[family]().eval()
    model.set_attn_implementation(attention)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    with torch.no_grad():  # the default init is so small that images would hardly matter
        for name, weight in model.model.visual.named_parameters():
            if "qkv.weight" in name:  # attention that is not nearly uniform
                weight.normal_(std=0.5)
            elif "merger" in name and weight.dim() == 2:
                weight.normal_(std=0.2)
        model.lm_head.weight[[IMAGE_TOKEN, VIDEO_TOKEN]] = (
            0  # never generated: without a cache they would count as an image
        )
    return model


def merged(*grid):
    t, h, w = grid
    return t * h * w // MERGE**2


def batch(model, *rows, side="left", seed=0):
    """The inputs of a call. A row holds ints (that many random text tokens), ("image", h, w) and ("video", t, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    by_frames = model.config.model_type in ("qwen3_vl", "qwen3_vl_moe")  # a timestamp before every frame
    grids = {"image": [], "video": []}
    ids = []

    def text(count):
        return torch.randint(2, IMAGE_TOKEN, (count,), generator=generator).tolist()

    for row in rows:
        parts = []
        for part in row:
            if isinstance(part, int):
                parts += text(part)
                continue
            kind, *grid = part
            grid = [1, *grid] if kind == "image" else grid
            grids[kind].append(grid)
            token = IMAGE_TOKEN if kind == "image" else VIDEO_TOKEN
            if kind == "video" and by_frames:
                for _ in range(grid[0]):
                    parts += [*text(2), START, *[token] * merged(1, *grid[1:]), END]
            else:
                parts += [START, *[token] * merged(*grid), END]
        ids.append(torch.tensor(parts))
    inputs = padded(ids, side)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int() + 2 * (
        inputs["input_ids"] == VIDEO_TOKEN
    ).int()
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            patches = sum(t * h * w for t, h, w in grids[kind])
            inputs[pixels] = torch.randn(patches, CHANNELS * TEMPORAL * PATCH**2, generator=generator)
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
    if grids["video"] and model.config.model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([1.0, 0.5, 2.0][: len(grids["video"])])
    return inputs


def shares(row):
    counts = dict.fromkeys(("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"), 0)
    for part in row:
        if isinstance(part, tuple):
            kind, *grid = part
            counts["pixel_values" if kind == "image" else "pixel_values_videos"] += math.prod(grid)
            counts[f"{kind}_grid_thw"] += 1
    return counts | {"second_per_grid_ts": counts["video_grid_thw"]}


SMALL, WIDE = ("image", 6, 6), ("image", 4, 8)  # 9 and 8 tokens
CLIP, SHORT = ("video", 3, 4, 6), ("video", 2, 6, 4)  # 3 and 2 frames of 6 tokens

BATCHES = {
    "single": [[3, SMALL, 5]],
    "padded": [[3, CLIP, 5], [2, SHORT, 14]],
    "two_and_one": [[3, SMALL, 2, WIDE, 4], [1, SMALL, 6]],
    "text_only_row": [[2, SMALL, 5], [9]],
    "ragged": [[2, CLIP, 1, SMALL, 3], [30], [4, WIDE, 2, SHORT, 5]],
}
