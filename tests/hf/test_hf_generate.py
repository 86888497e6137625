import copy
from types import MappingProxyType

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

import lvtp.hf
from lvtp.hf.generation import CHUNKS_HOLD_IMAGES

from .oracle import relative_error
from .tiny_llava import BATCHES, assemble, batch

KEEP = 3
NEW = 4

chunks = pytest.mark.skipif(not CHUNKS_HOLD_IMAGES, reason="this transformers drops images from chunks")


def generate(model, inputs, positions="auto", keep=KEEP, restore_prompt=True, variant=MappingProxyType({}), **kwargs):
    """Sequences, or what `return_dict_in_generate` gives."""
    kwargs.setdefault("max_new_tokens", NEW)
    with lvtp.hf.prune(model, keep=keep, positions=positions, restore_prompt=restore_prompt, **variant):
        return model.generate(**inputs, **kwargs)


def from_embeds(model, oracle, **kwargs):
    """[R, new]: transformers' own generate on the assembled prompt."""
    kwargs.setdefault("max_new_tokens", NEW)
    return model.generate(inputs_embeds=oracle.embeds.detach(), attention_mask=oracle.mask, **kwargs)


def row_alone(member, inputs, row, rows):
    """The call of one prompt of a batch, without its padding."""
    real = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    names = {"pixel_values": "image", "image_sizes": "image", "pixel_values_videos": "video"}
    for name, kind in names.items():
        if name in inputs:
            counts = [member.tiny.count(kind, parts) for parts in rows]
            start = sum(counts[:row])
            if counts[row]:
                alone[name] = inputs[name][start : start + counts[row]]
    return alone


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
    for method in ("id_selection", "prune_sid")[: 1 + (not variant)]:
        wanted = from_embeds(model, member.assemble(inputs, KEEP, method=method, **variant), **beams)
        with lvtp.hf.prune(model, method, KEEP, **variant):
            for _ in range(2):  # beam search rewrites its containers in place
                got = model.generate(**inputs, max_new_tokens=NEW, use_cache=use_cache, **beams)
                assert torch.equal(got, torch.cat([inputs["input_ids"].repeat_interleave(2, dim=0), wanted], dim=1))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batch_equals_single(case, num_beams):
    member, variant = case
    rows, inputs = member.batches["ragged"], member.batch("ragged")
    for positions in ("compact", "original")[: 1 + (not variant)]:
        options = {"variant": variant, "num_beams": num_beams}
        together = generate(member.model, inputs, positions, **options)[:, -NEW:]
        for row in range(len(rows)):
            alone = generate(member.model, row_alone(member, inputs, row, rows), positions, **options)
            assert torch.equal(alone[0, -NEW:], together[row])


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
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
    options = {"do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(0)
    wanted = from_embeds(member.model, member.assemble(inputs, KEEP), **options)
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


def test_prompt_by_position_and_as_inputs(model):
    inputs = batch(model, *BATCHES["single"])
    wanted = generate(model, inputs)
    ids = inputs.pop("input_ids")
    assert torch.equal(generate(model, {"inputs": ids, **inputs}), wanted)
    with lvtp.hf.prune(model, keep=KEEP):
        assert torch.equal(model.generate(ids, **inputs, max_new_tokens=NEW), wanted)


def test_batch_of_one_needs_no_mask(model):
    inputs = batch(model, *BATCHES["single"])
    wanted = {positions: generate(model, inputs, positions) for positions in ("compact", "original")}
    del inputs["attention_mask"]
    for positions, tokens in wanted.items():
        assert torch.equal(generate(model, inputs, positions), tokens)
        assert torch.equal(generate(model, inputs, positions, use_cache=False), tokens)


# ------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("where", ["argument", "config_argument", "model_config"])
def test_max_length_counts_the_prompt_that_is_returned(member, where):
    model, inputs = member.model, member.batch("single")
    length = inputs["input_ids"].shape[1] + 4
    config = GenerationConfig(max_length=length, min_length=length - 1, pad_token_id=0)
    kwargs = {
        "argument": {"max_length": length, "min_length": length - 1},
        "config_argument": {"generation_config": config},
        "model_config": {},
    }[where]
    before = copy.deepcopy(model.generation_config)
    try:
        if where == "model_config":
            model.generation_config.max_length = length
        with lvtp.hf.prune(model, keep=KEEP):
            got = model.generate(**inputs, **kwargs)
        with lvtp.hf.prune(model, keep=KEEP, restore_prompt=False):
            unrestored = model.generate(**inputs, **kwargs)
    finally:
        model.generation_config = before
    assert got.shape[1] == length
    assert unrestored.shape[1] == length
    assert config.max_length == length
    assert config.min_length == length - 1


def test_max_new_tokens_wins_over_max_length(model):
    inputs = batch(model, *BATCHES["single"])
    assert generate(model, inputs, max_length=1000).shape[1] == inputs["input_ids"].shape[1] + NEW


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_default_length_is_twenty_new_tokens(model):
    inputs = batch(model, *BATCHES["single"])
    with lvtp.hf.prune(model, keep=KEEP):
        assert model.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 20


# --------------------------------------------------------------------------------------------------------- later turns


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("only_new_ids", [False, True])
@pytest.mark.parametrize("rows", ["single", "two_and_one"])
def test_second_turn_from_the_cache(member, rows, positions, only_new_ids):
    model, inputs = member.model, member.batch(rows)
    oracle = member.assemble(inputs, KEEP, positions)
    text = torch.randint(2, 100, (len(inputs["input_ids"]), 5), generator=torch.Generator().manual_seed(7))
    first = oracle.greedy(model, NEW)
    said = torch.cat([first, text], dim=1)
    steps = torch.arange(1, said.shape[1] + 1)
    oracle.embeds = torch.cat([oracle.embeds, model.get_input_embeddings()(said)], dim=1)
    oracle.mask = torch.cat([oracle.mask, torch.ones_like(said)], dim=1)
    oracle.positions = torch.cat([oracle.positions, oracle.positions[:, -1:] + steps], dim=1)
    wanted = oracle.greedy(model, NEW)

    with lvtp.hf.prune(model, keep=KEEP, positions=positions, restore_prompt=False):
        one = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
        assert torch.equal(one.sequences[:, -NEW:], first)
        ids = torch.cat([one.sequences, text], dim=1)
        if only_new_ids:
            ids = ids[:, one.past_key_values.get_seq_length() :]
        two = model.generate(
            input_ids=ids, attention_mask=oracle.mask, past_key_values=one.past_key_values, max_new_tokens=NEW
        )
    assert torch.equal(two[:, -NEW:], wanted)


@pytest.mark.parametrize("own_cache", [False, True])
def test_second_turn_with_the_restored_prompt_raises(model, own_cache):
    inputs = batch(model, *BATCHES["single"])
    cache = DynamicCache() if own_cache else None
    with lvtp.hf.prune(model, keep=KEEP):
        one = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True, past_key_values=cache)
        cache = one.past_key_values
        ids = torch.cat([one.sequences, one.sequences[:, -2:]], dim=1)
        with pytest.raises(ValueError, match="restore_prompt=False"):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache)


def test_a_cache_of_an_unpruned_prompt_goes_on(model):
    inputs = batch(model, *BATCHES["single"])
    with lvtp.hf.prune(model, keep=16):
        one = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
        ids = torch.cat([one.sequences, one.sequences[:, -2:]], dim=1)
        got = model.generate(input_ids=ids, past_key_values=one.past_key_values, max_new_tokens=NEW)
    assert torch.equal(got, model.generate(input_ids=ids, pixel_values=inputs["pixel_values"], max_new_tokens=NEW))


def test_a_reset_cache_starts_anew(model):
    inputs = batch(model, *BATCHES["single"])
    cache = StaticCache(model.config.get_text_config(), max_cache_len=64)
    with lvtp.hf.prune(model, keep=KEEP):
        one = model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW)
        cache.reset()
        assert torch.equal(model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW), one)


def test_decoding_by_hand_with_original_positions(model):
    inputs = batch(model, *BATCHES["two_and_one"])
    wanted = assemble(model, inputs, KEEP, "original").greedy(model, 2)
    with torch.no_grad(), lvtp.hf.prune(model, keep=KEEP, positions="original") as pruning:
        out = model(**inputs)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        with pytest.raises(ValueError, match="position_ids"):
            model(input_ids=token, past_key_values=out.past_key_values)
        prepared = lvtp.hf.prepare(model, inputs, keep=KEEP)
        out = model(
            input_ids=token,
            attention_mask=torch.cat([prepared["attention_mask"], torch.ones_like(token)], dim=1),
            position_ids=pruning.last.next_position[:, None],
            past_key_values=out.past_key_values,
        )
    assert torch.equal(torch.cat([token, out.logits[:, -1].argmax(-1, keepdim=True)], dim=1), wanted)


def test_images_in_a_later_turn_raise(model):
    inputs = batch(model, *BATCHES["single"])
    with lvtp.hf.prune(model, keep=KEEP, restore_prompt=False):
        one = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
        with pytest.raises(ValueError, match="past_key_values must be empty"):
            model.generate(**inputs, past_key_values=one.past_key_values)


def test_the_tower_runs_once_a_call(member):
    model, inputs = member.model, member.batch("ragged")
    wanted = sum(name in inputs for name in ("pixel_values", "pixel_values_videos"))
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
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
