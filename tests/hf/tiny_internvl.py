"""Tiny random InternVL models: 8 x 8 tower tokens a tile, merged to 4 x 4, with norms on queries and keys."""

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

from . import oracle
from .tiny import IMAGE_TOKEN, TOWER, finish, prompts, text_config

SIDE, TOKENS = 8, 16


def build(attention="sdpa", seed=0, use_qk_norm=True, **options):
    vision = InternVLVisionConfig(
        **TOWER, image_size=[32, 32], patch_size=[4, 4], use_qk_norm=use_qk_norm, layer_scale_init_value=1.0
    )
    config = InternVLConfig(
        vision_config=vision, text_config=text_config(), image_token_id=IMAGE_TOKEN, image_seq_length=TOKENS,
        tie_word_embeddings=False, **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = finish(InternVLForConditionalGeneration(config), attention)
    with torch.no_grad():
        for name, weight in model.model.vision_tower.named_parameters():
            if "cls_token" in name or "position_embeddings" in name or "q_norm" in name or "k_norm" in name:
                weight.add_(torch.randn(weight.shape))
    return model


def batch(model, *rows, side="left", seed=0):
    """Rows are sequences of ints (that many random text tokens) and (tiles,); returns the inputs of a call."""
    inputs, generator = prompts(rows, lambda part: (IMAGE_TOKEN, part[0] * TOKENS), side, seed)
    tiles = sum(shares(row)["pixel_values"] for row in rows)
    if tiles:
        inputs["pixel_values"] = torch.randn(tiles, 3, 32, 32, generator=generator)
    return inputs


def shares(row):
    return {"pixel_values": sum(part[0] for part in row if isinstance(part, tuple))}


def blocks(values):
    """[64, C] -> [16, 4, C]: the four tower tokens of every merged one."""
    corners = [2 * y * SIDE + 2 * x for y in range(4) for x in range(4)]
    return torch.stack([torch.stack([values[c + d] for d in (0, 1, SIDE, SIDE + 1)]) for c in corners])


def importance(model, pixels, layer=-1):
    """[n, 16]: attention of CLS, the mean of four."""
    maps = oracle.eager_attention(model, pixels, layer).mean(1)[:, 0, 1:, None]
    return torch.stack([blocks(tile)[..., 0].mean(1) for tile in maps])


def assemble(model, inputs, k, positions="compact", method="id_selection", scope="image", newline=None):
    """`k`: of every tile, or a list with that of each."""
    images = []
    if "pixel_values" in inputs:
        pixels = inputs["pixel_values"]
        hidden = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
        features = torch.stack([blocks(tile).flatten(1) for tile in hidden])
        # The model's order of the four inside a token is its own business; the projector was trained for it.
        grid = model.model.pixel_shuffle(hidden.view(-1, SIDE, SIDE, hidden.shape[-1]), scale_factor=0.5).flatten(1, 2)
        torch.testing.assert_close(grid.norm(dim=-1), features.norm(dim=-1))
        projected = model.model.multi_modal_projector(grid)
        ks = k if isinstance(k, list) else [k] * len(pixels)
        for tokens, compared, scores, count in zip(projected, grid, importance(model, pixels), ks, strict=True):
            chosen = oracle.choose(compared, scores, count, method)
            images.append(oracle.Image(TOKENS, chosen, [tokens[i] for i in chosen]))
    return oracle.assemble(model, inputs, {IMAGE_TOKEN: images}, positions)


BATCHES = {
    "single": [[3, (3,), 5]],
    "padded": [[3, (2,), 5], [2, (1,), 12]],
    "two_and_one": [[3, (2,), 2, (1,), 4], [1, (3,), 6]],
    "text_only_row": [[2, (1,), 5], [9]],
    "ragged": [[1, (1,), (2,), 2], [30], [4, (1,), 1, (1,), 1, (1,), 3]],  # the last one as a video of three frames
}
