import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lvtp.hf
from lvtp.hf.families import family_of
from lvtp.hf.options import Options

from .members import QWENS
from .oracle_qwen import PIXELS, SCORED_LAYER, eager_maps, importance, window_order
from .tiny_qwen import BATCHES, BUILDERS, batch, build

RAGGED = [[1, ("image", 6, 10), 1, ("image", 2, 2), ("video", 3, 6, 4), 1, ("video", 1, 10, 6)]]


@pytest.fixture(params=QWENS, ids=lambda member: member.name)
def model(request):
    return request.param.model


def encode(model, kind, inputs, score="auto", scope="image"):
    arguments = {PIXELS[kind]: inputs[PIXELS[kind]], f"{kind}_grid_thw": inputs[f"{kind}_grid_thw"]}
    return family_of(model, Options()).encode(model, kind, arguments, score, scope)


@pytest.mark.parametrize("kind", PIXELS)
@pytest.mark.parametrize("score", ["auto", "received"])
def test_scores_equal_eager_attention(model, kind, score):
    inputs = batch(model, *RAGGED)
    grid = inputs[f"{kind}_grid_thw"]
    wanted = importance(model, inputs[PIXELS[kind]], grid)
    whole = encode(model, kind, inputs, score)
    torch.testing.assert_close(torch.cat(whole.importance), wanted, rtol=1e-5, atol=1e-7)
    assert torch.cat(whole.importance).dtype == torch.float32
    assert [len(item) for item in whole.importance] == (grid.prod(-1) // 4).tolist()
    frames = encode(model, kind, inputs, score, "frame")
    assert torch.equal(torch.cat(frames.importance), torch.cat(whole.importance))
    assert torch.equal(torch.cat(frames.features), torch.cat(whole.features))
    assert [len(item) for item in frames.importance] == [h * w // 4 for t, h, w in grid.tolist() for _ in range(t)]
    # Equal attention everywhere would pass for any order.
    assert wanted.max() / wanted.min() > 1.2


@pytest.mark.parametrize("scope", ["image", "frame"])
def test_sizes_are_known_before_anything_runs(model, scope):
    inputs = batch(model, *RAGGED)
    family = family_of(model, Options())
    for kind in PIXELS:
        arguments = {f"{kind}_grid_thw": inputs[f"{kind}_grid_thw"]}
        wanted = list(map(len, encode(model, kind, inputs, scope=scope).features))
        sizes = family.sizes(model, kind, arguments, scope)
        assert [tokens for size in sizes for tokens in size.units] == wanted
        assert sum(size.placeholders for size in sizes) == sum(wanted)


def test_windows_are_undone():
    """Without it every comparison of a lone small image would pass."""
    model = QWENS[1].model
    inputs = batch(model, *RAGGED)
    grid = inputs["image_grid_thw"]
    order = window_order(grid, 2)
    assert order != sorted(order)
    received = torch.cat([weights.mean((0, 1)) for weights in eager_maps(model, inputs["pixel_values"], grid)])
    in_window_order = received.view(-1, 4).mean(1)
    got = torch.cat(encode(model, "image", inputs).importance)
    torch.testing.assert_close(got[order], in_window_order, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(got, in_window_order, rtol=1e-2)


def test_the_scored_layer_reads_whole_frames(model):
    inputs = batch(model, *RAGGED)
    grid = inputs["video_grid_thw"]
    maps = eager_maps(model, inputs["pixel_values_videos"], grid)
    assert [len(weights[0]) for weights in maps] == [h * w for t, h, w in grid.tolist() for _ in range(t)]
    layer = family_of(model, Options()).scored_layer(model.config.vision_config)
    assert layer == SCORED_LAYER[model.config.model_type]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", BUILDERS)
def test_the_tower_is_bitwise_unchanged(family, attention):
    model = build(family, attention)
    inputs = batch(model, *RAGGED)
    for kind in PIXELS:
        arguments = inputs[PIXELS[kind]], inputs[f"{kind}_grid_thw"]
        wanted = getattr(model.model, f"get_{kind}_features")(*arguments)
        seen = []
        hook = model.model.visual.register_forward_hook(lambda *parts, seen=seen: seen.append(parts[-1]))
        encoded = encode(model, kind, inputs)
        hook.remove()
        assert torch.equal(seen[0].last_hidden_state, wanted.last_hidden_state)
        assert all(map(torch.equal, encoded.features, wanted.pooler_output))
        # One token is scored by eager attention of its own model, too.
        torch.testing.assert_close(torch.cat(encoded.importance), importance(model, *arguments), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", BUILDERS)
def test_half_precision_is_scored_in_float32(family):
    model = build(family).bfloat16()
    scores = encode(model, "image", batch(model, [1, ("image", 32, 32)])).importance[0]
    assert scores.dtype == torch.float32
    assert scores.unique().numel() > 250 > scores.bfloat16().unique().numel()


@pytest.mark.parametrize("family", BUILDERS)
def test_flash_attention_reads_all_segments_at_once(family, monkeypatch):
    """Its kernel gets the packed sequence and the lengths of the segments; here a stand-in, which needs no GPU."""

    def flash(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **kwargs):
        lengths = cu_seq_lens_q.diff().tolist()
        segments = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        parts = [torch.nn.functional.scaled_dot_product_attention(*each, scale=scaling) for each in segments]
        return torch.cat(parts, dim=2).transpose(1, 2), None

    model = build(family)
    inputs = batch(model, *RAGGED)
    wanted = torch.cat(encode(model, "video", inputs).importance)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_stand_in", flash)
    model.model.visual.config._attn_implementation = "flash_stand_in"
    torch.testing.assert_close(torch.cat(encode(model, "video", inputs).importance), wanted, rtol=1e-5, atol=1e-7)


def test_score_by_a_callable(model):
    inputs = batch(model, *BATCHES["ragged"])
    seen = []

    def norms(features):
        seen.append(features)
        return -features.norm(dim=-1)

    for scope, shapes in (
        ("image", [(1, 9, 64), (1, 8, 64), (1, 18, 64), (1, 12, 64)]),
        ("frame", [(1, 9, 64), (1, 8, 64), (3, 6, 64), (2, 6, 64)]),
    ):
        seen.clear()
        with lvtp.hf.prune(model, keep=4, score=norms, scope=scope) as pruning:
            model(**inputs)
        assert [tuple(features.shape) for features in seen] == shapes
        assert not any(features.requires_grad for features in seen)
        frames = [frame for features in seen for frame in features.split(1)]
        wanted = [lvtp.id_selection(frame, -frame.norm(dim=-1), 4)[0].sort().values for frame in frames]
        assert all(map(torch.equal, pruning.last.indices, wanted))
    with pytest.raises(ValueError, match="score must map features"):
        lvtp.hf.prepare(model, inputs, keep=4, score=lambda features: features[..., 0, 0])


def test_towers_without_a_full_layer_raise():
    model = build("qwen2_5")
    model.config.vision_config.fullatt_block_indexes = [7]
    with pytest.raises(ValueError, match="fullatt_block_indexes of the vision tower must name one of its 4 layers"):
        lvtp.hf.patch(model)
    with lvtp.hf.prune(model, keep=4, score=lambda features: features.norm(dim=-1)) as pruning:
        model(**batch(model, *BATCHES["single"]))
    assert pruning.last.counts == (4,)
