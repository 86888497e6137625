"""score="prompt": importance from a look into the language model, in every family."""

import copy

import pytest
import torch

import lvtp.hf
from lvtp.hf.families import family_of
from lvtp.hf.options import Options
from lvtp.hf.rewrite import encoder_arguments
from lvtp.importance import prompt_attention

from . import tiny_qwen
from .tiny import footprint

KEEP = 4


def eager_rows(model, inputs):
    """[B, S]: row of the last real token in the second layer's attention maps, averaged over heads."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    maps = eager(**inputs, output_attentions=True, use_cache=False).attentions[1]  # [B, H, S, S]
    last = [row.nonzero().max().item() for row in inputs["attention_mask"]]
    return torch.stack([maps[row, :, at].mean(0) for row, at in enumerate(last)]).detach()


def units(model, inputs, rows):
    """What selectors see: features and scores of every image, then of every video."""
    found, family = [], family_of(model, Options())
    for kind, pixels in family.modalities.items():
        if pixels not in inputs:
            continue
        encoded = family.encode(model, kind, encoder_arguments(model, kind, inputs), lambda features: features[..., 0])
        scores = rows[inputs["input_ids"] == getattr(model.config, f"{kind}_token_id")]
        if encoded.layouts is not None:  # separators are not scored
            scores = scores[~torch.cat([layout.newline for layout in encoded.layouts])]
        found += zip(encoded.features, scores.split([len(tokens) for tokens in encoded.features]), strict=True)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_picks_are_those_of_eager_attention(member, side):
    model, inputs = member.model, member.batch("ragged", side=side)
    shown = units(model, inputs, eager_rows(model, inputs))
    wanted = [lvtp.id_selection(tokens[None], scores[None], KEEP)[0].sort().values for tokens, scores in shown]
    with lvtp.hf.prune(model, keep=KEEP, score="prompt") as pruning:
        model(**inputs)
    assert all(map(torch.equal, pruning.last.indices, wanted))
    with lvtp.hf.prune(model, keep=KEEP) as tower:
        model(**inputs)
    assert not all(map(torch.equal, pruning.last.indices, tower.last.indices))


def test_the_question_decides(member):
    model, inputs = member.model, member.batch("single")
    with lvtp.hf.prune(model, keep=KEEP, score="prompt") as pruning:
        model(**inputs)
        before = pruning.last.indices
        inputs["input_ids"][:, -1] = (inputs["input_ids"][:, -1] + 7) % 100 + 2
        model(**inputs)
    assert not all(map(torch.equal, pruning.last.indices, before))


def test_the_pruned_prompt_runs_as_with_any_score(member):
    """Same indices by a selector, same logits, same tokens: the look leaves no trace, in the images or elsewhere."""
    model, inputs, before = member.model, member.batch("ragged"), footprint(member.model)
    picks = []

    def select(features, scores, k):
        picks.append(lvtp.id_selection(features, scores, k))
        return picks[-1]

    for kwargs in ({}, {"num_beams": 2}):
        with torch.no_grad():
            with lvtp.hf.prune(model, select, KEEP, score="prompt"):
                logits, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, **kwargs)
            with lvtp.hf.prune(model, lambda *_: picks.pop(0), KEEP):
                assert torch.equal(model(**inputs).logits, logits)
                assert torch.equal(model.generate(**inputs, max_new_tokens=3, **kwargs), tokens)
    assert footprint(model) == before


def test_keeping_everything_is_bitwise_the_unpruned_model(member):
    model, inputs = member.model, member.batch("ragged")
    with torch.no_grad():
        wanted = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=3, num_beams=2)
        with lvtp.hf.prune(model, keep=1.0, score="prompt"):
            assert torch.equal(model(**inputs).logits, wanted)
            assert torch.equal(model.generate(**inputs, max_new_tokens=3, num_beams=2), tokens)


def test_two_layers_are_read_once_and_the_tower_once(member):
    model, inputs = member.model, member.batch("ragged")
    decoder = model.get_decoder()
    calls = {"tower": 0, "first": 0, "second": 0, "lengths": []}

    def count(name):
        def hook(module, args, kwargs):
            calls[name] += 1
            if name == "first":
                calls["lengths"].append(args[0].shape[1])

        return hook

    modules = {"tower": member.module("tower"), "first": decoder.layers[0], "second": decoder.layers[1].mlp}
    hooks = [module.register_forward_pre_hook(count(name), with_kwargs=True) for name, module in modules.items()]
    configs = [layer.self_attn.config for layer in decoder.layers]
    with lvtp.hf.prune(model, keep=KEEP, score="prompt") as pruning:
        model(**inputs)
    for hook in hooks:
        hook.remove()
    modalities = sum(name.startswith("pixel") for name in inputs)
    assert calls["tower"] == modalities
    assert calls["first"] == 2
    assert calls["second"] == 1  # of the look, the second layer's MLP is not needed any more
    assert calls["lengths"] == [inputs["input_ids"].shape[1], int(pruning.last.kept.sum(1).max())]
    assert all(layer.self_attn.config is config for layer, config in zip(decoder.layers, configs, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_pick(member, side):
    model, inputs = member.model, member.batch("single")
    padding = (3, 0) if side == "left" else (0, 3)
    padded = {
        name: torch.nn.functional.pad(value, padding) if value.shape == inputs["input_ids"].shape else value
        for name, value in inputs.items()
    }
    picks = []
    with lvtp.hf.prune(model, keep=KEEP, score="prompt") as pruning:
        for call in (inputs, padded):
            model(**call)
            picks.append(pruning.last.indices)
    assert all(map(torch.equal, *picks))


def test_what_cannot_be_scored_raises(member):
    model, inputs = member.model, member.batch("ragged")
    with (
        pytest.raises(ValueError, match="labels must be left out with score='prompt'"),
        lvtp.hf.prune(model, keep=KEEP, score="prompt"),
    ):
        model(**inputs, labels=inputs["input_ids"])
    shallow = copy.deepcopy(model)
    decoder = shallow.get_decoder()
    decoder.layers = decoder.layers[:1]
    with pytest.raises(ValueError, match="score='prompt' needs a language model with at least 2 decoder layers"):
        lvtp.hf.patch(shallow, score="prompt")


@pytest.mark.parametrize("side", ["left", "right"])
def test_sliding_windows_hide_what_is_too_far_back(monkeypatch, side):
    window = {"use_sliding_window": True, "sliding_window": 14, "max_window_layers": 1}
    for name, value in window.items():
        monkeypatch.setitem(tiny_qwen._TEXT, name, value)
    model = tiny_qwen.build("qwen2")
    inputs = tiny_qwen.batch(model, [3, tiny_qwen.SMALL, 4], [6, tiny_qwen.SMALL, 9], side=side)
    rows = eager_rows(model, inputs)
    assert (rows > 0).sum(1).tolist() == [14, 14]
    wanted = [
        lvtp.id_selection(tokens[None], scores[None], KEEP)[0].sort().values
        for tokens, scores in units(model, inputs, rows)
    ]
    with lvtp.hf.prune(model, keep=KEEP, score="prompt") as pruning:
        model(**inputs)
    assert all(map(torch.equal, pruning.last.indices, wanted))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_the_whole_map_in_float64(groups):
    generator = torch.Generator().manual_seed(groups)
    query = torch.randn(2, 4, 8, generator=generator)
    key = torch.randn(2, 4 // groups, 9, 8, generator=generator)
    visible = torch.rand(2, 9, generator=generator) < 0.7
    logits = query[:, :, None].double() @ key.double().repeat_interleave(groups, dim=1).transpose(-1, -2)
    maps = (logits * 8**-0.5).masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
    got = prompt_attention(query, key, visible)
    torch.testing.assert_close(got.double(), maps.mean((1, 2)), rtol=1e-5, atol=1e-8)
    query, key = query.bfloat16(), key.bfloat16()
    assert torch.equal(prompt_attention(query, key, visible), prompt_attention(query.float(), key.float(), visible))
