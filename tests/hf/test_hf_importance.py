import pytest
import torch

import lvtp.hf
import lvtp.importance as importance_module
from lvtp.hf.llava import Llava
from lvtp.hf.rewrite import encoder_arguments
from lvtp.hf.tower import attention_layer
from lvtp.importance import AttentionTap, cls_attention, received_attention

from .members import TOWERS
from .oracle import eager_attention, relative_error
from .tiny_llava import batch, build


def importance(model, pixels, score="auto", **arguments):
    """fp32 [n, N], as the selector sees it."""
    encoded = Llava().encode(model, "image", {"pixel_values": pixels, **arguments}, score)
    return torch.stack(encoded.importance)


@pytest.fixture(scope="module")
def siglip():
    return build(tower="siglip", vision_feature_select_strategy="full")


@pytest.fixture
def pixels(model):
    return batch(model, [1, "image", 2, "image"])["pixel_values"]


def test_attention_on_the_meta_device_and_compiled():
    q, k = torch.randn(2, 3, 17, 8), torch.randn(2, 3, 17, 8)
    for attention in (cls_attention, received_attention):
        assert attention(q.to("meta"), k.to("meta")).shape == (2, 17)
        compiled = torch.compile(attention, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(q, k), attention(q, k))


@pytest.mark.parametrize("layer", [-1, -2, -3, 1, 2, 3, [-3, -1]])
def test_scores_equal_eager_attention(model, pixels, layer):
    deepest = {1: 0, 2: 1, 3: 2}.get(layer, -1) if isinstance(layer, int) and layer > 0 else layer
    maps = eager_attention(model, pixels, -1 if isinstance(layer, list) else deepest)  # [n, H, 17, 17]
    chosen = build(vision_feature_layer=layer) if isinstance(layer, list) else model
    arguments = {"vision_feature_layer": layer}
    cls = importance(chosen, pixels, "cls", **arguments)
    torch.testing.assert_close(cls, maps.mean(1)[:, 0, 1:], rtol=1e-5, atol=1e-6)
    received = importance(chosen, pixels, "received", **arguments)
    torch.testing.assert_close(received, maps.mean((1, 2))[:, 1:], rtol=1e-5, atol=1e-6)


def test_full_strategy_scores_every_token_of_the_tower(model, pixels):
    maps = eager_attention(model, pixels, -2)
    full = {"vision_feature_select_strategy": "full"}
    assert importance(model, pixels, **full).shape == (2, 17)
    torch.testing.assert_close(importance(model, pixels, **full), maps.mean((1, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(importance(model, pixels, "cls", **full), maps.mean(1)[:, 0], rtol=1e-5, atol=1e-6)


def test_full_strategy_prunes_cls_like_any_token():
    model = build(vision_feature_select_strategy="full")
    model.config.image_seq_length = 17
    inputs = batch(model, [3, "image", 5])
    wanted = model(**inputs).logits
    with lvtp.hf.prune(model, keep=17):
        assert torch.equal(model(**inputs).logits, wanted)
    with lvtp.hf.prune(model, keep=5) as pruning:
        assert model(**inputs).logits.shape[1] == 3 + 5 + 5
    assert pruning.last.indices[0].max() < 17


def test_siglip_scores_equal_eager_attention(siglip, pixels):
    maps = eager_attention(siglip, pixels, -2)  # [n, H, 16, 16]
    torch.testing.assert_close(importance(siglip, pixels), maps.mean((1, 2)), rtol=1e-5, atol=1e-6)
    inputs = batch(siglip, [3, "image", 5])
    with lvtp.hf.prune(siglip, keep=5) as pruning:
        assert siglip(**inputs).logits.shape[1] == 13
    hidden = siglip.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    received = eager_attention(siglip, inputs["pixel_values"], -2).mean((1, 2))
    assert torch.equal(pruning.last.indices[0], lvtp.id_selection(hidden, received, 5)[0].sort().values)
    with pytest.raises(ValueError, match="score='cls' needs a vision tower with a CLS token"):
        lvtp.hf.prepare(siglip, inputs, score="cls")


@pytest.mark.parametrize("score", ["cls", "received"])
def test_the_tap_changes_nothing_in_the_tower(model, pixels, score):
    wanted = model.get_image_features(pixels, output_hidden_states=True)
    tower, seen = model.model.vision_tower, []
    hook = tower.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        encoded = Llava().encode(model, "image", {"pixel_values": pixels}, score)
    finally:
        hook.remove()
    assert torch.equal(seen[0].last_hidden_state, wanted.last_hidden_state)
    assert all(map(torch.equal, encoded.projected, wanted.pooler_output))
    assert all(not module._forward_hooks for module in tower.modules() if module.__class__.__name__ == "Linear")


def test_the_tower_and_the_projector_are_bitwise_unchanged(member):
    inputs, core = member.batch("single"), member.model.model
    arguments = encoder_arguments(member.model, "image", inputs)
    wanted = core.get_image_features(**arguments, return_dict=True)
    modules, seen = [member.module(name) for name in ("tower", "projector")], []
    hooks = [module.register_forward_hook(lambda *call: seen.append((call[0], call[-1]))) for module in modules]
    try:
        lvtp.hf.prepare(member.model, inputs, keep=3)
        core.get_image_features(**arguments, return_dict=True)
    finally:
        for hook in hooks:
            hook.remove()
    tower, projector = ([output for module, output in seen if module is wanted] for wanted in modules)
    assert all(torch.equal(output.last_hidden_state, wanted.last_hidden_state) for output in tower)
    assert torch.equal(*projector)
    assert len(tower) == 2


@pytest.mark.parametrize(("member", "variant"), [(member, variant) for member in TOWERS for variant in member.variants])
def test_score_by_a_callable_sees_what_enters_the_projector(member, variant):
    inputs, seen = member.batch("single"), []

    def score(features):
        seen.append(features)
        return features.norm(dim=-1)

    entered = []
    hook = member.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    try:
        with torch.no_grad(), lvtp.hf.prune(member.model, keep=3, score=score):
            by_norm = member.model(**inputs).logits
    finally:
        hook.remove()
    assert all(map(torch.equal, seen, entered))
    with torch.no_grad(), lvtp.hf.prune(member.model, keep=3, score=lambda features: -features.norm(dim=-1)):
        assert relative_error(member.model(**inputs).logits[:, -1], by_norm[:, -1]) > 1e-3
    with pytest.raises(ValueError, match="score must map features"):
        lvtp.hf.prepare(member.model, inputs, score=lambda features: features[..., 0, 0], **variant)


def test_score_by_a_callable(model):
    inputs = batch(model, [1, "image", 2, "image"])
    seen = []

    def norms(features):
        seen.append(features)
        return -features.norm(dim=-1)

    with lvtp.hf.prune(model, keep=4, score=norms) as pruning:
        model(**inputs)
    (features,) = seen
    assert features.shape == (2, 16, 32)
    assert not features.requires_grad
    wanted = lvtp.id_selection(features, -features.norm(dim=-1), 4).sort(dim=1).values
    assert torch.equal(torch.stack(pruning.last.indices), wanted)
    with pytest.raises(ValueError, match="score must map features"):
        lvtp.hf.prepare(model, inputs, score=lambda features: features[..., 0, 0])


def test_layers_without_attention_raise(model):
    tower = model.model.vision_tower
    assert [attention_layer(tower, layer) for layer in (-3, -1, 1, 3, [1, 2], [-2, -3])] == [0, 2, 0, 2, 1, 1]
    for layer in (0, -4, 4):
        with pytest.raises(ValueError, match="vision_feature_layer"):
            attention_layer(tower, layer)


# -------------------------------------------------------------------------------------------- the functions themselves


@pytest.mark.parametrize("tokens", [1, 2, 511, 512, 513, 1025])
def test_attention_equals_the_whole_map_in_float64(tokens):
    generator = torch.Generator().manual_seed(tokens)
    query, key = torch.randn(2, 2, 3, tokens, 8, generator=generator)
    for scale in (None, 1.7):
        logits = query.double() @ key.double().transpose(-1, -2) * (8**-0.5 if scale is None else scale)
        maps = logits.softmax(-1)
        torch.testing.assert_close(cls_attention(query, key, scale).double(), maps.mean(1)[:, 0], rtol=1e-5, atol=1e-8)
        got = received_attention(query, key, scale).double()
        torch.testing.assert_close(got, maps.mean((1, 2)), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("limit", [1, 2 * 3 * 700 * 5, 2 * 3 * 700 * 512])
def test_very_many_tokens_take_smaller_blocks(limit, monkeypatch):
    query, key = torch.randn(2, 2, 3, 700, 8, generator=torch.Generator().manual_seed(0))
    wanted = received_attention(query, key)
    monkeypatch.setattr("lvtp.importance.MAX_LOGITS_CPU", limit)
    sizes = []
    rows = importance_module._attention_rows
    monkeypatch.setattr("lvtp.importance._attention_rows", lambda *a: sizes.append(rows(*a)) or sizes[-1])
    torch.testing.assert_close(received_attention(query, key), wanted)
    assert all(block.shape[2] == 1 or block.numel() <= limit for block in sizes)


@pytest.mark.parametrize("rule", [cls_attention, received_attention])
def test_half_precision_is_computed_in_float32(rule):
    query, key = torch.randn(2, 1, 4, 577, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = rule(query.float(), key.float())
    assert torch.equal(rule(query, key), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        got = rule(query, key)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)
    assert got.unique().numel() > 500


def test_a_layer_that_skips_its_projections_raises():
    layer = torch.nn.Module()
    layer.q_proj, layer.k_proj = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    with AttentionTap(layer, heads=2) as tap:
        layer.q_proj(torch.ones(1, 3, 4))
    assert tap.query.shape == (1, 2, 3, 2)
    with pytest.raises(RuntimeError, match="k_proj"):
        _ = tap.key
