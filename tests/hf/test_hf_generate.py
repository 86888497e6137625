import copy
from types import MappingProxyType

import pytest
import torch

import lvtp.hf
from lvtp.hf.generation import CHUNKS_HOLD_IMAGES

from .oracle import relative_error

KEEP = 3
NEW = 4

chunks = pytest.mark.skipif(not CHUNKS_HOLD_IMAGES, reason="this transformers drops images from chunks")


def generate(model, inputs, positions="auto", keep=KEEP, restore_prompt=True, variant=MappingProxyType({}), **kwargs):
    """Sequences, or what `return_dict_in_generate` gives."""
    kwargs.setdefault("max_new_tokens", NEW)
    with lvtp.hf.prune(model, keep=keep, positions=positions, restore_prompt=restore_prompt, **variant):
        return model.generate(**inputs, **kwargs)


@pytest.mark.parametrize(("use_cache", "side"), [(True, "left"), (False, "right")])
def test_greedy_equals_the_oracle(case, rows, use_cache, side):
    member, variant = case
    inputs = member.batch(rows, side=side)
    for positions in ("compact", "original")[: 1 + (variant.get("scope") != "crop")]:
        wanted = member.assemble(inputs, KEEP, positions, **variant).greedy(member.model, NEW)
        got = generate(member.model, inputs, positions, variant=variant, use_cache=use_cache)
        assert torch.equal(got, torch.cat([inputs["input_ids"], wanted], dim=1))


@pytest.mark.parametrize(
    ("rows", "use_cache"),
    [("single", True), ("two_and_one", True), ("text_only_row", True), ("ragged", True), ("ragged", False)],
)
def test_beams_equal_the_oracle(case, rows, use_cache):
    member, variant = case
    model, inputs = member.model, member.batch(rows)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    for method, positions in (("id_selection", "compact"), ("prune_sid", "original"))[: 1 + (not variant)]:
        oracle = member.assemble(inputs, KEEP, positions, method, **variant)
        wanted = oracle.generate(model, max_new_tokens=NEW, **beams)
        with lvtp.hf.prune(model, method, KEEP, positions=positions, **variant):
            for _ in range(2):  # beam search rewrites its containers in place
                got = model.generate(**inputs, max_new_tokens=NEW, use_cache=use_cache, **beams)
                assert torch.equal(got, torch.cat([inputs["input_ids"].repeat_interleave(2, dim=0), wanted], dim=1))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batch_equals_single(case, num_beams):
    member, variant = case
    inputs = member.batch("ragged")
    for positions in ("compact", "original")[: 1 + (not variant)]:
        options = {"variant": variant, "num_beams": num_beams}
        together = generate(member.model, inputs, positions, **options)[:, -NEW:]
        for row in range(len(together)):
            alone = generate(member.model, member.alone("ragged", row, inputs), positions, **options)
            assert torch.equal(alone[0, -NEW:], together[row])


@pytest.mark.parametrize(
    "kwargs", [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_keeping_everything_is_the_unpruned_model(member, rows, kwargs):
    inputs = member.batch(rows)
    kwargs = {**kwargs, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": NEW}
    wanted = member.model.generate(**inputs, **kwargs)
    got = generate(member.model, inputs, keep=member.everything, **kwargs)
    assert torch.equal(got.sequences, wanted.sequences)
    assert all(map(torch.equal, got.logits, wanted.logits))


@pytest.mark.parametrize("rows", ["single", "ragged"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        pytest.param({"prefill_chunk_size": 7}, marks=chunks),
    ],
    ids=str,
)
def test_caches_and_chunks_change_no_token(member, rows, kwargs):
    inputs = member.batch(rows)
    for positions in ("compact", "original"):
        wanted = generate(member.model, inputs, positions, num_beams=kwargs.get("num_beams", 1))
        assert torch.equal(generate(member.model, inputs, positions, **kwargs), wanted)


def test_chunks_without_images_raise(member, monkeypatch):
    monkeypatch.setattr("lvtp.hf.generation.CHUNKS_HOLD_IMAGES", False)
    with pytest.raises(ValueError, match="prefill_chunk_size must be left out when pixels are given"):
        generate(member.model, member.batch("single"), prefill_chunk_size=7)


@pytest.mark.filterwarnings("ignore")  # transformers warns of its own arguments
def test_speculation_changes_no_token(member):
    inputs = member.batch("single")
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, -5:-3]  # something to look up
    assistant = copy.deepcopy(member.model)
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.05 * torch.randn_like(assistant.lm_head.weight))
    for positions in ("compact", "original"):
        wanted = generate(member.model, inputs, positions, max_new_tokens=8)
        for kwargs in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
            got = generate(member.model, inputs, positions, max_new_tokens=8, **kwargs)
            assert torch.equal(got, wanted)


def test_sampling_equals_the_oracle(member):
    inputs = member.batch("ragged")
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": NEW}
    torch.manual_seed(0)
    wanted = member.assemble(inputs, KEEP).generate(member.model, **options)
    torch.manual_seed(0)
    got = generate(member.model, inputs, **options)
    assert torch.equal(got, torch.cat([inputs["input_ids"].repeat_interleave(2, dim=0), wanted], dim=1))


@pytest.mark.parametrize("restore_prompt", [True, False])
def test_outputs(member, restore_prompt):
    model, inputs = member.model, member.batch("two_and_one")
    oracle = member.assemble(inputs, KEEP)
    got = generate(model, inputs, restore_prompt=restore_prompt, return_dict_in_generate=True, output_logits=True)
    assert got.past_key_values.get_seq_length() == oracle.embeds.shape[1] + NEW - 1
    assert relative_error(got.logits[0], oracle.logits(model)[:, -1]) <= 1e-5
    prompt = inputs["input_ids"] if restore_prompt else lvtp.hf.prepare(model, inputs, keep=KEEP)["input_ids"]
    assert torch.equal(got.sequences, torch.cat([prompt, oracle.greedy(model, NEW)], dim=1))
    assert got["sequences"] is got.sequences


@pytest.mark.parametrize("num_beams", [1, 3])
def test_prepared_inputs_generate_the_same_tokens(member, rows, num_beams):
    inputs = member.batch(rows)
    wanted = generate(member.model, inputs, num_beams=num_beams)
    prepared = lvtp.hf.prepare(member.model, inputs, keep=KEEP)
    got = member.model.generate(**prepared, num_beams=num_beams, max_new_tokens=NEW)
    assert torch.equal(got[:, -NEW:], wanted[:, -NEW:])


def test_prompt_by_position_and_as_inputs(member):
    model, inputs = member.model, member.batch("single")
    wanted = generate(model, inputs)
    ids = inputs.pop("input_ids")
    assert torch.equal(generate(model, {"inputs": ids, **inputs}), wanted)
    with lvtp.hf.prune(model, keep=KEEP):
        assert torch.equal(model.generate(ids, **inputs, max_new_tokens=NEW), wanted)


def test_batch_of_one_needs_no_mask(member):
    model, inputs = member.model, member.batch("single")
    wanted = {positions: generate(model, inputs, positions) for positions in ("compact", "original")}
    del inputs["attention_mask"]
    for positions, tokens in wanted.items():
        assert torch.equal(generate(model, inputs, positions), tokens)
        assert torch.equal(generate(model, inputs, positions, use_cache=False), tokens)


def test_the_tower_runs_once_a_call(member):
    model, inputs = member.model, member.batch("ragged")
    wanted = sum(name in inputs for name in ("pixel_values", "pixel_values_videos"))
    calls = []
    hook = member.module("tower").register_forward_hook(lambda *_: calls.append(1))
    try:
        for kwargs in ({}, {"num_beams": 3}, {"use_cache": False}, {"do_sample": True, "num_return_sequences": 2}):
            generate(model, inputs, **kwargs)
            assert len(calls) == wanted
            calls.clear()
        with lvtp.hf.prune(model, keep=KEEP):
            model(**inputs)
        assert len(calls) == wanted
    finally:
        hook.remove()
