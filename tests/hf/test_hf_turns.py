"""`generate` around a shortened prompt: length limits, and turns that go on from a cache."""

import copy

import pytest
import torch
from transformers import GenerationConfig, StaticCache

import lvtp.hf

from .tiny_llava import BATCHES, assemble, batch

KEEP = 3
NEW = 4


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


@pytest.mark.parametrize("embedded", [False, True])
def test_limits_without_room_are_named_as_they_were_given(model, embedded):
    inputs = batch(model, *BATCHES["single"])  # 24 tokens
    if embedded:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    config = GenerationConfig(max_length=20, pad_token_id=0)
    with lvtp.hf.prune(model, keep=KEEP):
        for limits in ({"max_length": 20}, {"max_length": 24}, {"generation_config": config}):
            wrong = limits.get("max_length", 20)
            with pytest.raises(ValueError, match=f"max_length must be more than the 24 tokens .* got {wrong};"):
                model.generate(**inputs, **limits)
        for limits in ({"max_length": 30}, {"max_new_tokens": 6}):
            with pytest.raises(ValueError, match=r"min_length must be at most the 30 tokens .* got 31"):
                model.generate(**inputs, **limits, min_length=31)


def test_max_new_tokens_wins_over_max_length(member):
    inputs = member.batch("single")
    with lvtp.hf.prune(member.model, keep=KEEP):
        got = member.model.generate(**inputs, max_length=1000, max_new_tokens=NEW)
    assert got.shape[1] == inputs["input_ids"].shape[1] + NEW


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_default_length_is_twenty_new_tokens(member):
    model, inputs = member.model, member.batch("single")
    with lvtp.hf.prune(model, keep=KEEP):
        assert model.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 20


# --------------------------------------------------------------------------------------------------------- later turns


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("only_new_ids", [False, True])
@pytest.mark.parametrize("rows", ["single", "ragged"])
def test_second_turn_from_the_cache(member, rows, positions, only_new_ids):
    model, inputs = member.model, member.batch(rows)
    oracle = member.assemble(inputs, KEEP, positions)
    text = torch.randint(2, 100, (len(inputs["input_ids"]), 5), generator=torch.Generator().manual_seed(7))
    first = oracle.greedy(model, NEW)
    oracle = oracle.read(model, torch.cat([first, text], dim=1))
    wanted = oracle.greedy(model, NEW)

    with lvtp.hf.prune(model, keep=KEEP, positions=positions, restore_prompt=False):
        one = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
        assert torch.equal(one.sequences[:, -NEW:], first)
        ids = torch.cat([one.sequences, text], dim=1)
        if only_new_ids:
            ids = ids[:, one.past_key_values.get_seq_length() :]
        model.generate(**member.batch("padded"), max_new_tokens=1)  # whatever ran since does not matter
        two = model.generate(
            input_ids=ids, attention_mask=oracle.mask, past_key_values=one.past_key_values, max_new_tokens=NEW
        )
    assert torch.equal(two[:, -NEW:], wanted)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_second_turn_of_several_sequences(member, positions, cache_name):
    model, inputs = member.model, member.batch("ragged")
    text = torch.randint(2, 100, (6, 5), generator=torch.Generator().manual_seed(7))
    oracle = member.assemble(inputs, KEEP, positions).repeat(2)
    sampling = {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True}
    with lvtp.hf.prune(model, keep=KEEP, positions=positions, restore_prompt=False):
        one = model.generate(**inputs, max_new_tokens=NEW, **sampling)
        ids = torch.cat([one.sequences, text], dim=1)
        said = ids[:, oracle.mask.shape[1] :]
        mask = torch.cat([oracle.mask, torch.ones_like(said)], dim=1)
        two = model.generate(
            input_ids=ids, attention_mask=mask, **{cache_name: one.past_key_values}, max_new_tokens=NEW
        )
    oracle = oracle.read(model, said)
    assert torch.equal(two[:, -NEW:], oracle.greedy(model, NEW))


def test_a_cache_of_an_unpruned_prompt_goes_on(member, cache_name):
    model, inputs = member.model, member.batch("single")

    def two_turns():
        one = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
        ids = torch.cat([one.sequences, one.sequences[:, -2:]], dim=1)
        return model.generate(input_ids=ids, **{cache_name: one.past_key_values}, max_new_tokens=NEW)

    wanted = two_turns()
    with lvtp.hf.prune(model, keep=member.everything):
        assert torch.equal(two_turns(), wanted)


def test_a_reset_cache_starts_anew(member, cache_name):
    model, inputs = member.model, member.batch("single")
    cache = StaticCache(model.config.get_text_config(), max_cache_len=64)
    with lvtp.hf.prune(model, keep=KEEP):
        one = model.generate(**inputs, **{cache_name: cache}, max_new_tokens=NEW)
        cache.reset()
        assert torch.equal(model.generate(**inputs, **{cache_name: cache}, max_new_tokens=NEW), one)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_later_forward_without_a_mask_counts_what_is_cached(member, positions, cache_name):
    model, inputs = member.model, member.batch("single")
    text = torch.randint(2, 100, (1, 4), generator=torch.Generator().manual_seed(3))

    def later(masked):
        one = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
        cached = one.past_key_values.get_seq_length()
        mask = {"attention_mask": torch.ones(1, cached + 4, dtype=torch.long)} if masked else {}
        with torch.no_grad():
            return model(input_ids=text, **{cache_name: one.past_key_values}, **mask).logits

    with lvtp.hf.prune(model, keep=KEEP, positions=positions, restore_prompt=False):
        torch.testing.assert_close(later(False), later(True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_mask_of_the_unpruned_prompt_raises_in_a_later_turn(member, by_hand, cache_name):
    """transformers would cut it and read the wrong end."""
    model, inputs = member.model, member.batch("single")
    with torch.no_grad(), lvtp.hf.prune(model, keep=KEEP, restore_prompt=False):
        if by_hand:
            cache = model(**inputs, use_cache=True).past_key_values
        else:
            cache = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).past_key_values
        said = torch.tensor([[5]])
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
        with pytest.raises(ValueError, match="attention_mask must have"):
            model(input_ids=said, attention_mask=mask, **{cache_name: cache})


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_reset_cache_forgets_the_pruned_prompt(member, positions, cache_name):
    model, inputs = member.model, member.batch("single")
    text = torch.randint(2, 100, (1, 6), generator=torch.Generator().manual_seed(4))
    cache = StaticCache(model.config.get_text_config(), max_cache_len=64)

    def two_turns():
        one = model.generate(input_ids=text, **{cache_name: cache}, max_new_tokens=2)
        return model.generate(input_ids=torch.cat([one, text], dim=1), **{cache_name: cache}, max_new_tokens=NEW)

    wanted = two_turns()
    cache.reset()
    with lvtp.hf.prune(model, keep=KEEP, positions=positions):
        model.generate(**inputs, **{cache_name: cache}, max_new_tokens=1)
        cache.reset()
        assert torch.equal(two_turns(), wanted)


@pytest.mark.parametrize("spelled", [False, True])
def test_decoding_by_hand_with_original_positions(model, spelled, cache_name):
    inputs = batch(model, *BATCHES["two_and_one"])
    wanted = assemble(model, inputs, KEEP, "original").greedy(model, 2)
    with torch.no_grad(), lvtp.hf.prune(model, keep=KEEP, positions="original") as pruning:
        out = model(**inputs)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        prepared = lvtp.hf.prepare(model, inputs, keep=KEEP)
        out = model(
            input_ids=token,
            attention_mask=torch.cat([prepared["attention_mask"], torch.ones_like(token)], dim=1),
            position_ids=pruning.last.next_position[:, None] if spelled else None,
            **{cache_name: out.past_key_values},
        )
    assert torch.equal(torch.cat([token, out.logits[:, -1].argmax(-1, keepdim=True)], dim=1), wanted)
