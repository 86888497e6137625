"""Tiny random LLaVA-NeXT and LLaVA-OneVision models, images of three shapes, and what is left of them when pruned.

A crop has 4 x 4 tokens. The shapes: what a processor would make of them, by hand.
"""

import math

import torch
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
)

from . import oracle
from .tiny import IMAGE_TOKEN, TOWER, VIDEO_TOKEN, finish, prompts, text_config

SIDE, TOKENS = 4, 16
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
# Size of the image, crops down and across, rows and columns of the grid of tokens that unpadding leaves.
SHAPES = {
    "tall": ((32, 8), (2, 1), range(8), range(1, 3)),
    "wide": ((10, 32), (1, 2), range(1, 3), range(8)),
    "square": ((30, 32), (2, 2), range(8), range(8)),
}
FRAMES = 3


def build_next(attention="sdpa", seed=0, **options):
    vision = CLIPVisionConfig(**TOWER, projection_dim=32, image_size=16, patch_size=4)
    config = LlavaNextConfig(
        vision_config=vision, text_config=text_config(), image_token_index=IMAGE_TOKEN, image_grid_pinpoints=PINPOINTS,
        **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    return _finish(LlavaNextForConditionalGeneration(config), attention)


def build_onevision(attention="sdpa", seed=0, **options):
    vision = SiglipVisionConfig(**TOWER, image_size=16, patch_size=4, vision_use_head=False)
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text_config(), image_token_index=IMAGE_TOKEN, video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_2", **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    return _finish(LlavaOnevisionForConditionalGeneration(config), attention)


def _finish(model, attention):
    with torch.no_grad():
        model.model.image_newline.mul_(5)  # a newline more or less has to show
    return finish(model, attention)


def is_onevision(model):
    return model.config.model_type == "llava_onevision"


def extent(model, shape):
    """Rows and columns of the packed grid."""
    _, _, rows, columns = SHAPES[shape]
    if is_onevision(model):  # at most 2 crops of tokens, or it is shrunk
        ratio = math.sqrt(len(rows) * len(columns) / (2 * TOKENS))
        if ratio > 1.1:
            return int(len(rows) // ratio), int(len(columns) // ratio)
    return len(rows), len(columns)


def placeholders(model, part):
    if part == "video":
        return VIDEO_TOKEN, FRAMES * 4 + 1
    rows, columns = extent(model, part)
    return IMAGE_TOKEN, TOKENS + rows * (columns + 1)


def batch(model, *rows, side="left", seed=0):
    """Rows are sequences of ints (that many random text tokens), shapes and "video"; returns the inputs of a call."""
    inputs, generator = prompts(rows, lambda part: placeholders(model, part), side, seed)
    shapes = [part for row in rows for part in row if part in SHAPES]
    videos = sum(row.count("video") for row in rows)
    if shapes:
        inputs["image_sizes"] = torch.tensor([SHAPES[shape][0] for shape in shapes])
        crops = [1 + math.prod(SHAPES[shape][1]) for shape in shapes]
        pixels = torch.zeros(len(shapes), max(crops), 3, 16, 16)
        for image, count in zip(pixels, crops, strict=True):
            image[:count] = torch.randn(count, 3, 16, 16, generator=generator)
        inputs["pixel_values"] = pixels
    if videos:
        inputs["pixel_values_videos"] = torch.randn(videos, FRAMES, 3, 16, 16, generator=generator)
    return inputs


def shares(row):
    images = sum(part in SHAPES for part in row)
    return {"pixel_values": images, "image_sizes": images, "pixel_values_videos": row.count("video")}


def seen(model, pixels):
    """Features [n, 16, Dv], importance [n, 16] and projected tokens [n, 16, D] of crops [n, 3, 16, 16]."""
    layer = model.config.vision_feature_layer
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
    maps = oracle.eager_attention(model, pixels, layer).mean(1)
    if is_onevision(model):
        features, importance = hidden, maps.mean(1)
    else:
        features, importance = hidden[:, 1:], maps[:, 0, 1:]
    return features, importance, model.model.multi_modal_projector(features)


def bilinear(grid, height, width):
    """[H, W, C] -> [height, width, C], pixel centres aligned."""

    def weights(old, new):
        matrix = torch.zeros(new, old)
        for i in range(new):
            at = max((i + 0.5) * old / new - 0.5, 0)
            low = min(int(at), old - 1)
            matrix[i, low] += 1 - (at - low)
            matrix[i, min(low + 1, old - 1)] += at - low
        return matrix

    return torch.einsum("ih,jw,hwc->ijc", weights(grid.shape[0], height), weights(grid.shape[1], width), grid)


def grid(model, values, shape):
    """Crops [n, 16, C] -> [rows, columns, C], without the overview."""
    _, (_, across), rows, columns = SHAPES[shape]
    cells = [
        [values[1 + y // SIDE * across + x // SIDE, y % SIDE * SIDE + x % SIDE] for x in columns] for y in rows
    ]  # fmt: skip
    whole = torch.stack([torch.stack(row) for row in cells])
    if extent(model, shape) != tuple(whole.shape[:2]):
        whole = bilinear(whole, *extent(model, shape))
    return whole


def image(model, pixels, shape, ks, method, scope, newline):
    crops = 1 + math.prod(SHAPES[shape][1])
    features, importance, projected = seen(model, pixels[:crops])
    height, width = extent(model, shape)

    def flat(values):
        return torch.cat([values[0], grid(model, values, shape).flatten(0, 1)])

    if scope == "crop":
        counts = [ks.pop(0) for _ in range(crops)]
        chosen = [choose(features, importance, i, k, method) for i, k in enumerate(counts)]
        vectors = [projected[crop, token] for crop, tokens in enumerate(chosen) for token in tokens]
        if len(vectors) < crops * TOKENS:
            return oracle.Image(placeholders(model, shape)[1], list(range(len(vectors))), vectors)
        kept = range(TOKENS + height * width)
    else:
        scores = flat(importance[..., None])[:, 0]
        kept = oracle.choose(flat(features), scores, ks.pop(0), method)
    tokens, slots, vectors, slot = flat(projected), [], [], TOKENS
    everything = len(kept) == len(tokens)
    for token in kept:
        if token < TOKENS:
            slots.append(token)
            vectors.append(tokens[token])
    for row in range(height):
        first = TOKENS + row * width
        left = [token for token in kept if first <= token < first + width]
        slots += [slot + token - first for token in left]
        vectors += [tokens[token] for token in left]
        slot += width
        if everything or newline == "all" or (newline in (None, "rows") and left):
            slots.append(slot)
            vectors.append(model.model.image_newline)
        slot += 1
    return oracle.Image(slot, slots, vectors)


def choose(features, importance, crop, k, method):
    return oracle.choose(features[crop], importance[crop], k, method)


def video(model, frames, ks, method, scope, newline):
    features, importance, projected = (
        torch.stack([bilinear(frame.view(SIDE, SIDE, -1), 2, 2).flatten(0, 1) for frame in values])
        for values in seen(model, frames)
    )  # [FRAMES, 4, C]
    importance = importance[..., 0]
    if scope == "frame":
        kept = [4 * i + token for i in range(FRAMES) for token in choose(features, importance, i, ks.pop(0), method)]
    else:
        kept = oracle.choose(features.flatten(0, 1), importance.flatten(), ks.pop(0), method)
    vectors = [projected.flatten(0, 1)[token] for token in kept]
    if newline != "drop" or len(kept) == 4 * FRAMES:
        kept, vectors = [*kept, 4 * FRAMES], [*vectors, model.model.image_newline]
    return oracle.Image(4 * FRAMES + 1, kept, vectors)


def assemble(model, inputs, k, positions="compact", method="id_selection", scope="image", newline=None):
    """`k`: of every unit, or a list with that of each: images first."""
    ks = list(k) if isinstance(k, list) else [k] * 99
    images, videos = [], []
    shapes = {size: shape for shape, (size, *_) in SHAPES.items()}
    for pixels, size in zip(inputs.get("pixel_values", ()), inputs.get("image_sizes", torch.empty(0)), strict=True):
        images.append(image(model, pixels, shapes[tuple(size.tolist())], ks, method, scope, newline))
    for frames in inputs.get("pixel_values_videos", ()):
        videos.append(video(model, frames, ks, method, scope, newline))
    return oracle.assemble(model, inputs, {IMAGE_TOKEN: images, VIDEO_TOKEN: videos}, positions)


BATCHES_NEXT = {
    "single": [[3, "wide", 5]],
    "padded": [[3, "square", 5], [2, "tall", 12]],
    "two_and_one": [[3, "wide", 2, "square", 4], [1, "tall", 6]],
    "text_only_row": [[2, "wide", 5], [9]],
    "ragged": [[1, "tall", "wide", "tall", 2], [30], [4, "square", 3]],
}
BATCHES_ONEVISION = {
    "single": [[3, "square", 5]],
    "padded": [[3, "square", 5], [2, "tall", 9]],
    "two_and_one": [[3, "wide", 2, "square", 4], [1, "tall", 6]],
    "text_only_row": [[2, "video", 5], [9]],
    "ragged": [[1, "tall", "video", "wide", 2], [30], [4, "video", 3, "square", 1]],
}
