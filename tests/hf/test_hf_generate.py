import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

import lvtp.hf
from lvtp.hf.generation import CHUNKS_HOLD_IMAGES

from .oracle_llava import assemble, relative_error
from .tiny_llava import BATCHES, batch

KEEP = 5
NEW = 6


def generate(model, inputs, positions="auto", keep=KEEP, restore_prompt=True, **kwargs):
    """Sequences, or what `return_dict_in_generate` gives."""
    kwargs.setdefault("max_new_tokens", NEW)
    with lvtp.hf.prune(model, keep=keep, positions=positions, restore_prompt=restore_prompt):
        return model.generate(**inputs, **kwargs)


def from_embeds(model, oracle, **kwargs):
    """[R, new]: transformers' own generate on the assembled prompt."""
    kwargs.setdefault("max_new_tokens", NEW)
    return model.generate(inputs_embeds=oracle.embeds.detach(), attention_mask=oracle.mask, **kwargs)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_equals_the_oracle(model, rows, positions, use_cache, side):
    inputs = batch(model, *rows, side=side)
    wanted = assemble(model, inputs, KEEP, positions).greedy(model, NEW)
    got = generate(model, inputs, positions, use_cache=use_cache)
    assert torch.equal(got, torch.cat([inputs["input_ids"], wanted], dim=1))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("method", ["id_selection", "prune_sid"])
def test_beams_equal_the_oracle(model, rows, use_cache, method):
    inputs = batch(model, *rows)
    wanted = from_embeds(model, assemble(model, inputs, KEEP, method=method), num_beams=3, num_return_sequences=2)
    with lvtp.hf.prune(model, method, KEEP):
        for _ in range(2):  # beam search rewrites its containers in place
            got = model.generate(**inputs, max_new_tokens=NEW, num_beams=3, num_return_sequences=2, use_cache=use_cache)
            assert torch.equal(got, torch.cat([inputs["input_ids"].repeat_interleave(2, dim=0), wanted], dim=1))


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_batch_equals_single(model, positions, num_beams):
    rows = BATCHES["ragged"]
    inputs = batch(model, *rows)
    together = generate(model, inputs, positions, num_beams=num_beams)[:, -NEW:]
    image = 0
    for row, parts in enumerate(rows):
        real = inputs["attention_mask"][row].bool()
        alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
        images = parts.count("image")
        if images:
            alone["pixel_values"] = inputs["pixel_values"][image : image + images]
        image += images
        assert torch.equal(generate(model, alone, positions, num_beams=num_beams)[0, -NEW:], together[row])


def test_keeping_everything_is_the_unpruned_model(model, rows):
    inputs = batch(model, *rows)
    for kwargs in ({}, {"num_beams": 2}, {"use_cache": False}):
        wanted = model.generate(
            **inputs, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, **kwargs
        )
        got = generate(model, inputs, keep=16, return_dict_in_generate=True, output_logits=True, **kwargs)
        assert torch.equal(got.sequences, wanted.sequences)
        assert all(map(torch.equal, got.logits, wanted.logits))


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("rows", [BATCHES["single"], BATCHES["two_and_one"]], ids=["single", "two_and_one"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        pytest.param(
            {"prefill_chunk_size": 7},
            marks=pytest.mark.skipif(not CHUNKS_HOLD_IMAGES, reason="this transformers drops images from chunks"),
        ),
    ],
    ids=str,
)
def test_caches_and_chunks_change_no_token(model, rows, positions, kwargs):
    inputs = batch(model, *rows)
    wanted = generate(model, inputs, positions, num_beams=kwargs.get("num_beams", 1))
    assert torch.equal(generate(model, inputs, positions, **kwargs), wanted)


@pytest.mark.parametrize("restore_prompt", [True, False])
def test_outputs(model, restore_prompt):
    inputs = batch(model, *BATCHES["two_and_one"])
    oracle = assemble(model, inputs, KEEP)
    got = generate(model, inputs, restore_prompt=restore_prompt, return_dict_in_generate=True, output_logits=True)
    assert got.past_key_values.get_seq_length() == oracle.embeds.shape[1] + NEW - 1
    assert relative_error(got.logits[0], oracle.logits(model)[:, -1]) <= 1e-5
    prompt = inputs["input_ids"] if restore_prompt else lvtp.hf.prepare(model, inputs, keep=KEEP)["input_ids"]
    assert torch.equal(got.sequences, torch.cat([prompt, oracle.greedy(model, NEW)], dim=1))
    assert got["sequences"] is got.sequences


@pytest.mark.parametrize("num_beams", [1, 3])
def test_prepared_inputs_generate_the_same_tokens(model, rows, num_beams):
    inputs = batch(model, *rows)
    wanted = generate(model, inputs, num_beams=num_beams)
    prepared = lvtp.hf.prepare(model, inputs, keep=KEEP)
    got = model.generate(**prepared, num_beams=num_beams, max_new_tokens=NEW)
    assert torch.equal(got[:, -NEW:], wanted[:, -NEW:])


def test_sampling_returns_every_sequence_after_its_prompt(model):
    inputs = batch(model, *BATCHES["padded"])
    torch.manual_seed(0)
    got = generate(model, inputs, do_sample=True, num_return_sequences=3)
    assert got.shape == (6, inputs["input_ids"].shape[1] + NEW)
    assert torch.equal(got[:, :-NEW], inputs["input_ids"].repeat_interleave(3, dim=0))


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
def test_max_length_counts_the_prompt_that_is_returned(model, where):
    inputs = batch(model, *BATCHES["single"])
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
@pytest.mark.parametrize("rows", [BATCHES["single"], BATCHES["two_and_one"]], ids=["single", "two_and_one"])
def test_second_turn_from_the_cache(model, rows, positions, only_new_ids):
    inputs = batch(model, *rows)
    oracle = assemble(model, inputs, KEEP, positions)
    text = torch.randint(2, 100, (len(rows), 5), generator=torch.Generator().manual_seed(7))
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


def test_the_tower_runs_once_a_call(model):
    inputs = batch(model, *BATCHES["ragged"])
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        for kwargs in ({}, {"num_beams": 3}, {"use_cache": False}, {"do_sample": True, "num_return_sequences": 2}):
            generate(model, inputs, **kwargs)
            assert len(calls) == 1
            calls.clear()
        with lvtp.hf.prune(model, keep=KEEP):
            model(**inputs)
        assert len(calls) == 1
    finally:
        hook.remove()
