import copy

import pytest
import torch
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lvtp.hf
from lvtp.hf.generation import CHUNKS_HOLD_IMAGES

from .oracle import relative_error
from .oracle_qwen import assemble
from .tiny import footprint
from .tiny_qwen import BATCHES, BUILDERS, SMALL, batch, shared

KEEP = 4
NEW = 5
ROWS = ("single", "two_and_one", "video", "mixed")


chunks = pytest.mark.skipif(not CHUNKS_HOLD_IMAGES, reason="this transformers drops images from chunks")


@pytest.fixture(params=BUILDERS)
def model(request):
    return shared(request.param)


def generate(model, inputs, keep=KEEP, restore_prompt=True, positions="auto", scope="image", **kwargs):
    kwargs.setdefault("max_new_tokens", NEW)
    with lvtp.hf.prune(model, keep=keep, restore_prompt=restore_prompt, positions=positions, scope=scope):
        return model.generate(**inputs, **kwargs)


def row_of(model, rows, row):
    """The inputs of one row of a batch, without its padding."""
    inputs = batch(model, *rows)
    before = {"image": 0, "video": 0}
    for parts in rows[:row]:
        for part in parts:
            if isinstance(part, tuple):
                before[part[0]] += 1
    real = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        count = sum(isinstance(part, tuple) and part[0] == kind for part in rows[row])
        if count:
            items = slice(before[kind], before[kind] + count)
            sizes = inputs[f"{kind}_grid_thw"].prod(-1).tolist()
            alone[f"{kind}_grid_thw"] = inputs[f"{kind}_grid_thw"][items]
            alone[pixels] = torch.cat(inputs[pixels].split(sizes)[items])
            if kind == "video" and "second_per_grid_ts" in inputs:
                alone["second_per_grid_ts"] = inputs["second_per_grid_ts"][items]
    return alone


@pytest.mark.parametrize("rows", [*ROWS, "text_only_row"])
@pytest.mark.parametrize(("positions", "scope"), [("original", "image"), ("original", "frame"), ("compact", "image")])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_the_oracle(model, rows, positions, scope, use_cache):
    side = "left" if use_cache else "right"
    inputs = batch(model, *BATCHES[rows], side=side)
    wanted = assemble(model, inputs, KEEP, positions, scope=scope).greedy(model, NEW)
    got = generate(model, inputs, positions=positions, scope=scope, use_cache=use_cache)
    assert torch.equal(got, torch.cat([inputs["input_ids"], wanted], dim=1))


@pytest.mark.parametrize("rows", ["two_and_one", "mixed"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_equal_the_oracle(model, rows, use_cache):
    inputs = batch(model, *BATCHES[rows])
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": NEW}
    for positions in ("original", "compact"):
        oracle = assemble(model, inputs, KEEP, positions)
        wanted = model.generate(**oracle.call(), **beams)[:, oracle.ids.shape[1] :]
        wanted = torch.cat([inputs["input_ids"].repeat_interleave(2, dim=0), wanted], dim=1)
        with lvtp.hf.prune(model, keep=KEEP, positions=positions):
            for _ in range(2):  # beam search rewrites its containers in place
                assert torch.equal(model.generate(**inputs, **beams, use_cache=use_cache), wanted)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batch_equals_single(model, num_beams):
    rows = BATCHES["mixed"]
    for scope in ("image", "frame"):
        together = generate(model, batch(model, *rows), num_beams=num_beams, scope=scope)[:, -NEW:]
        for row in range(len(rows)):
            alone = generate(model, row_of(model, rows, row), num_beams=num_beams, scope=scope)
            assert torch.equal(alone[0, -NEW:], together[row])


@pytest.mark.parametrize("rows", ROWS)
def test_keeping_everything_is_the_unpruned_model(model, rows):
    inputs = batch(model, *BATCHES[rows])
    for kwargs in ({}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
        kwargs |= {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
        wanted = model.generate(**inputs, **kwargs)
        got = generate(model, inputs, keep=18, **kwargs)
        assert torch.equal(got.sequences, wanted.sequences)
        assert all(map(torch.equal, got.logits, wanted.logits))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        pytest.param({"prefill_chunk_size": 7}, marks=chunks),
    ],
    ids=str,
)
def test_caches_and_chunks_change_no_token(model, rows, kwargs):
    inputs = batch(model, *BATCHES[rows])
    wanted = generate(model, inputs, num_beams=kwargs.get("num_beams", 1))
    assert torch.equal(generate(model, inputs, **kwargs), wanted)


def test_chunks_without_images_raise(model, monkeypatch):
    monkeypatch.setattr("lvtp.hf.generation.CHUNKS_HOLD_IMAGES", False)
    with pytest.raises(ValueError, match="prefill_chunk_size must be left out when pixels are given"):
        generate(model, batch(model, *BATCHES["single"]), prefill_chunk_size=7)


@pytest.mark.filterwarnings("ignore")  # transformers warns of its own arguments
def test_speculation_changes_no_token(model):
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.05 * torch.randn_like(assistant.lm_head.weight))
    for rows in ("single", "video"):
        inputs = batch(model, *BATCHES[rows])
        wanted = generate(model, inputs, max_new_tokens=12)
        for kwargs in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
            assert torch.equal(generate(model, inputs, max_new_tokens=12, **kwargs), wanted)


def test_sampling_equals_the_oracle(model):
    inputs = batch(model, *BATCHES["mixed"])
    sampling = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": NEW}
    oracle = assemble(model, inputs, KEEP)
    torch.manual_seed(0)
    wanted = model.generate(**oracle.call(), **sampling)[:, -NEW:]
    torch.manual_seed(0)
    got = generate(model, inputs, **sampling)
    assert torch.equal(got, torch.cat([inputs["input_ids"].repeat_interleave(3, dim=0), wanted], dim=1))


@pytest.mark.parametrize("restore_prompt", [True, False])
def test_outputs(model, restore_prompt):
    inputs = batch(model, *BATCHES["mixed"])
    oracle = assemble(model, inputs, KEEP)
    got = generate(model, inputs, restore_prompt=restore_prompt, return_dict_in_generate=True, output_logits=True)
    assert got.past_key_values.get_seq_length() == oracle.embeds.shape[1] + NEW - 1
    assert relative_error(got.logits[0], oracle.logits(model)[:, -1]) <= 1e-5
    prompt = inputs["input_ids"] if restore_prompt else oracle.ids
    assert torch.equal(got.sequences, torch.cat([prompt, oracle.greedy(model, NEW)], dim=1))


# --------------------------------------------------------------------------------------------------------- later turns


@pytest.mark.parametrize("rows", ["single", "mixed"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("only_new_ids", [True, False])
def test_second_turn_from_the_cache(model, rows, positions, inside, only_new_ids):
    inputs = batch(model, *BATCHES[rows])
    oracle = assemble(model, inputs, KEEP, positions)
    text = torch.randint(2, 100, (len(BATCHES[rows]), 5), generator=torch.Generator().manual_seed(7))
    first = oracle.greedy(model, NEW)
    oracle.read(model, text)
    mask = oracle.mask
    wanted = oracle.greedy(model, NEW)

    pruning = lvtp.hf.patch(model, keep=KEEP, positions=positions, restore_prompt=False)
    one = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
    assert torch.equal(one.sequences[:, -NEW:], first)
    ids = torch.cat([one.sequences, text], dim=1)
    if only_new_ids:
        ids = ids[:, one.past_key_values.get_seq_length() :]
    if inside:  # whatever ran since does not matter
        model.generate(**batch(model, [3, SMALL, 9]), max_new_tokens=1)
    else:
        pruning.remove()
    two = model.generate(input_ids=ids, attention_mask=mask, past_key_values=one.past_key_values, max_new_tokens=NEW)
    pruning.remove()
    assert torch.equal(two[:, -NEW:], wanted)


def test_second_turn_of_several_sequences(model):
    inputs = batch(model, *BATCHES["single"])
    oracle = assemble(model, inputs, KEEP)
    text = torch.randint(2, 100, (2, 5), generator=torch.Generator().manual_seed(7))
    with lvtp.hf.prune(model, keep=KEEP, restore_prompt=False):
        kwargs = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 2}
        one = model.generate(**inputs, **kwargs, return_dict_in_generate=True)
        ids = torch.cat([one.sequences, text], dim=1)
        two = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=one.past_key_values, max_new_tokens=NEW
        )
    for name in ("embeds", "ids", "mask"):
        setattr(oracle, name, getattr(oracle, name).repeat(2, *[1] * (getattr(oracle, name).dim() - 1)))
    oracle.positions = oracle.positions.repeat(1, 2, 1)
    oracle.deepstack = [layer.repeat(2, 1) for layer in oracle.deepstack]
    oracle.read(model, ids[:, oracle.ids.shape[1] :])
    assert torch.equal(two[:, -NEW:], oracle.greedy(model, NEW))


@pytest.mark.parametrize("rows", ["single", "video"])
def test_decoding_by_hand(model, rows):
    """Steps without positions go on from the model's own `rope_deltas`."""
    inputs = batch(model, *BATCHES[rows])
    for positions in ("original", "compact"):
        wanted = assemble(model, inputs, KEEP, positions).greedy(model, 3)
        with torch.no_grad(), lvtp.hf.prune(model, keep=KEEP, positions=positions):
            model(**batch(model, [3, SMALL, 9]))
            out = model(**inputs)
            tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
            for _ in range(2):
                out = model(input_ids=tokens[-1], past_key_values=out.past_key_values)
                tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        assert torch.equal(torch.cat(tokens, dim=1), wanted)


def test_second_turn_with_the_restored_prompt_raises(model):
    inputs = batch(model, *BATCHES["single"])
    with lvtp.hf.prune(model, keep=KEEP):
        one = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
        ids = torch.cat([one.sequences, one.sequences[:, -2:]], dim=1)
        with pytest.raises(ValueError, match="restore_prompt=False"):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=one.past_key_values)


def test_images_in_a_later_turn_raise(model):
    inputs = batch(model, *BATCHES["video"])
    with lvtp.hf.prune(model, keep=KEEP, restore_prompt=False):
        one = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
        with pytest.raises(ValueError, match="past_key_values must be empty"):
            model.generate(**inputs, past_key_values=one.past_key_values)


def test_a_reset_cache_starts_anew(model):
    inputs = batch(model, *BATCHES["single"])
    cache = StaticCache(model.config.get_text_config(), max_cache_len=64)
    with lvtp.hf.prune(model, keep=KEEP):
        one = model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW)
        cache.reset()
        assert torch.equal(model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW), one)


# ------------------------------------------------------------------------------------------------- nothing left behind


def test_the_tower_runs_once_for_each_modality(model):
    calls = []
    hook = model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    try:
        for rows, once in (("two_and_one", 1), ("video", 1), ("mixed", 2)):
            inputs = batch(model, *BATCHES[rows])
            for kwargs in ({}, {"num_beams": 3}, {"use_cache": False}, {"do_sample": True, "num_return_sequences": 2}):
                generate(model, inputs, **kwargs)
                assert len(calls) == once
                calls.clear()
    finally:
        hook.remove()


@pytest.mark.parametrize("where", [None, "caller", "tower", "scored layer", "decoder"])
def test_nothing_is_left_behind(model, where):
    inputs = batch(model, *BATCHES["mixed"])
    configs = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
    implementations = set(ALL_ATTENTION_FUNCTIONS)
    before = footprint(model)
    block = model.model.visual.blocks[0 if where == "tower" else 2]
    module = {"caller": model, "tower": block, "scored layer": block.attn, "decoder": model.model.language_model}.get(
        where
    )
    for run in (model.__call__, lambda **kwargs: model.generate(**kwargs, max_new_tokens=2, use_cache=False)):
        if module is None:
            with lvtp.hf.prune(model, keep=KEEP):
                run(**inputs)
        else:

            def fail(*_):
                raise KeyError(where)

            hook = module.register_forward_hook(fail)
            with pytest.raises(KeyError, match=where), lvtp.hf.prune(model, keep=KEEP):
                run(**inputs)
            hook.remove()
        assert footprint(model) == before
        assert all(module.config is configs[name] for name, module in model.named_modules() if name in configs)
        assert set(ALL_ATTENTION_FUNCTIONS) == implementations
