"""Tiny random LLaVA-1.5 models: 16 visual tokens an image, or 576 where that is the point."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

IMAGE_TOKEN = 120
VOCABULARY = 128


def build(image_size=32, patch_size=8, tower="clip", attention="sdpa", seed=0, **llava):
    tower_sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    tower_sizes |= {"image_size": image_size, "patch_size": patch_size}
    vision = (
        CLIPVisionConfig(**tower_sizes, projection_dim=32) if tower == "clip" else SiglipVisionConfig(**tower_sizes)
    )
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=4096, pad_token_id=0, eos_token_id=None, bos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    tokens = (image_size // patch_size) ** 2
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=tokens, **llava
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    with torch.no_grad():  # the default init is so small that images would hardly matter
        for name, weight in model.model.multi_modal_projector.named_parameters():
            weight.normal_(std=0.5 if "weight" in name else 0.1)
        for layer in model.model.vision_tower.encoder.layers:  # attention that is not nearly uniform
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
        model.lm_head.weight[IMAGE_TOKEN] = 0  # never generated: without a cache it would count as an image
    return model


def batch(model, *rows, side="left", seed=0):
    """Rows are sequences of ints (that many random text tokens) and "image"; returns the inputs of a call."""
    generator = torch.Generator().manual_seed(seed)
    tokens, images, ids = model.config.image_seq_length, 0, []
    for row in rows:
        parts = []
        for part in row:
            if part == "image":
                parts.append(torch.full((tokens,), IMAGE_TOKEN))
                images += 1
            else:
                parts.append(torch.randint(2, IMAGE_TOKEN, (part,), generator=generator))
        ids.append(torch.cat(parts))
    width = max(map(len, ids))
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, content in enumerate(ids):
        columns = slice(width - len(content), width) if side == "left" else slice(0, len(content))
        input_ids[row, columns] = content
        mask[row, columns] = 1
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if images:
        size = model.config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(images, 3, size, size, generator=generator)
    return inputs


# Rows of one call: every way that images and text can share a batch.
BATCHES = {
    "single": [[3, "image", 5]],
    "padded": [[3, "image", 5], [2, "image", 12]],
    "two_and_one": [[3, "image", 2, "image", 4], [1, "image", 6]],
    "text_only_row": [[2, "image", 5], [9]],
    "ragged": [[1, "image", "image", "image", 2], [30], [4, "image", 3]],
}
