"""Tiny random LLaVA-1.5 models: 16 visual tokens an image, or 576 where that is the point."""

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from . import oracle
from .tiny import IMAGE_TOKEN, TOWER, finish, prompts, text_config


def build(image_size=32, patch_size=8, tower="clip", attention="sdpa", seed=0, **llava):
    sizes = {**TOWER, "image_size": image_size, "patch_size": patch_size}
    vision = CLIPVisionConfig(**sizes, projection_dim=32) if tower == "clip" else SiglipVisionConfig(**sizes)
    tokens = (image_size // patch_size) ** 2
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(), image_token_index=IMAGE_TOKEN, image_seq_length=tokens, **llava
    )
    torch.manual_seed(seed)
    return finish(LlavaForConditionalGeneration(config), attention)


def batch(model, *rows, side="left", seed=0):
    """Rows are sequences of ints (that many random text tokens) and "image"; returns the inputs of a call."""
    inputs, generator = prompts(rows, lambda _: (IMAGE_TOKEN, model.config.image_seq_length), side, seed)
    images = sum(shares(row)["pixel_values"] for row in rows)
    if images:
        size = model.config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(images, 3, size, size, generator=generator)
    return inputs


def shares(row):
    return {"pixel_values": row.count("image")}


def assemble(model, inputs, k, positions="compact", method="id_selection", scope="image", newline=None):
    """`k`: of every image, or a list with that of each."""
    images = []
    if "pixel_values" in inputs:
        pixels = inputs["pixel_values"]
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        importance = oracle.eager_attention(model, pixels, -2).mean(1)[:, 0, 1:]
        projected = model.model.multi_modal_projector(hidden)
        ks = k if isinstance(k, list) else [k] * len(pixels)
        for tokens, features, scores, wanted in zip(projected, hidden, importance, ks, strict=True):
            chosen = oracle.choose(features, scores, wanted, method)
            images.append(oracle.Image(len(tokens), chosen, [tokens[i] for i in chosen]))
    return oracle.assemble(model, inputs, {IMAGE_TOKEN: images}, positions)


# Rows of one call: every way that images and text can share a batch.
BATCHES = {
    "single": [[3, "image", 5]],
    "padded": [[3, "image", 5], [2, "image", 12]],
    "two_and_one": [[3, "image", 2, "image", 4], [1, "image", 6]],
    "text_only_row": [[2, "image", 5], [9]],
    "ragged": [[1, "image", "image", "image", 2], [30], [4, "image", 3]],
}
