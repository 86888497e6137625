import copy
import gc
import inspect
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import StaticCache

import lvtp.hf

from .tiny import footprint
from .tiny_llava import BATCHES, batch, build

KEEP = 5


@pytest.fixture
def inputs(model):
    return batch(model, *BATCHES["two_and_one"])


# ------------------------------------------------------------------------------------------------- nothing left behind


def test_nothing_is_left_behind(member):
    model, inputs = member.model, member.batch("two_and_one")
    before = footprint(model)
    with lvtp.hf.prune(model, keep=KEEP):
        assert footprint(model) != before
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2)
        model.generate(**inputs, max_new_tokens=2, num_beams=2, use_cache=False)
    assert footprint(model) == before
    handle = lvtp.hf.patch(model, keep=KEEP, positions="original")
    model.generate(**inputs, max_new_tokens=2, use_cache=False)
    handle.remove()
    handle.remove()
    assert footprint(model) == before
    assert model.generate.__func__ is type(model).generate


@pytest.mark.parametrize("where", ["caller", "tower", "scored", "projector", "language_model"])
def test_nothing_is_left_behind_after_an_exception(member, where):
    def fail(*_):
        raise KeyError(where)

    model, inputs = member.model, member.batch("ragged")
    module = model if where == "caller" else member.module(where)
    before = footprint(model)
    for run in (model.__call__, lambda **kwargs: model.generate(**kwargs, max_new_tokens=2, use_cache=False)):
        hook = module.register_forward_hook(fail)
        with pytest.raises(KeyError, match=where), lvtp.hf.prune(model, keep=KEEP, positions="original"):
            run(**inputs)
        hook.remove()
        assert footprint(model) == before


def test_a_refused_argument_installs_nothing(model):
    before = footprint(model)
    with pytest.raises(ValueError, match="keep"):
        lvtp.hf.patch(model, keep=0)
    assert footprint(model) == before


def test_the_innermost_counts(member):
    model, inputs = member.model, member.batch("two_and_one")
    before = footprint(model)
    with lvtp.hf.prune(model, keep=6) as outer:
        with lvtp.hf.prune(model, keep=3) as inner:
            model(**inputs)
            model.generate(**inputs, max_new_tokens=1)
            assert set(inner.last.counts) == {3}
            assert outer.last is None
            with pytest.raises(ValueError, match="input_ids"):
                model.generate(**{**inputs, "input_ids": None})
        model.generate(**inputs, max_new_tokens=1)
        assert set(outer.last.counts) == {6}
    assert footprint(model) == before


def test_handles_may_be_removed_in_any_order(member):
    model, inputs = member.model, member.batch("two_and_one")
    before = footprint(model)
    first, second = lvtp.hf.patch(model, keep=6), lvtp.hf.patch(model, keep=3)
    first.remove()
    model(**inputs)
    assert set(second.last.counts) == {3}
    second.remove()
    assert footprint(model) == before


def test_a_deep_copy_is_unpatched(member):
    model, inputs = member.model, member.batch("two_and_one")
    wanted = model.generate(**inputs, max_new_tokens=2)
    with lvtp.hf.prune(model, keep=KEEP) as pruning:
        twin = copy.deepcopy(model)
        assert torch.equal(twin.generate(**inputs, max_new_tokens=2), wanted)
        assert twin.generate.__self__ is twin
        assert pruning.last is None
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits) is False


def test_a_patched_model_can_be_freed():
    model = build()
    handle, gone = lvtp.hf.patch(model), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    handle.remove()


def test_a_generate_of_the_instance_comes_back(inputs):
    model = build()
    calls = []

    def own(*args, **kwargs):
        calls.append(kwargs)
        return type(model).generate(model, *args, **kwargs)

    model.generate = own
    with lvtp.hf.prune(model, keep=KEEP):
        model.generate(**inputs, max_new_tokens=1)
    assert "pixel_values" not in calls[0]
    assert model.generate is own


def test_a_wrapper_put_on_top_stays(inputs):
    model = build()
    wanted = model.generate(**inputs, max_new_tokens=2)
    with lvtp.hf.prune(model, keep=KEEP):
        ours = model.generate
        wrapper = model.generate = lambda **kwargs: ours(**kwargs)
    assert model.generate is wrapper
    assert torch.equal(model.generate(**inputs, max_new_tokens=2), wanted)


def test_signatures_are_kept(member):
    model = member.model
    wanted = inspect.signature(model.generate), inspect.signature(model.get_image_features)
    with lvtp.hf.prune(model):
        assert (inspect.signature(model.generate), inspect.signature(model.get_image_features)) == wanted


def test_calls_without_images_pass_through(member):
    model, inputs = member.model, member.tiny.batch(member.model, [9], [5])
    wanted, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3)
    for positions in ("compact", "original"):
        with lvtp.hf.prune(model, keep=KEEP, positions=positions) as pruning:
            assert torch.equal(model(**inputs).logits, wanted)
            assert torch.equal(model.generate(**inputs, max_new_tokens=3), tokens)
        assert pruning.last is None
    assert lvtp.hf.prepare(model, inputs) == inputs


def test_decoding_steps_compile_to_one_graph(model):
    """What generate compiles for a static cache: the hook must not break it."""

    def step():
        cache = StaticCache(model.config.get_text_config(), max_cache_len=8)
        model(input_ids=torch.tensor([[2, 3, 4]]), position_ids=torch.arange(3)[None], past_key_values=cache)
        compiled = torch.compile(model.__call__, backend="eager", fullgraph=True)
        mask = (torch.arange(8) <= 3)[None, None, None]  # [1, 1, 1, 8]
        ids, positions = torch.tensor([[5]]), torch.tensor([[3]])
        return compiled(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits

    with torch.no_grad():
        wanted = step()
        torch.compiler.reset()
        with lvtp.hf.prune(model, keep=KEEP):
            assert torch.equal(step(), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(member, dtype):
    model, inputs = member.build().to(dtype), member.batch("ragged")
    model.set_experts_implementation("eager")  # the default one has no float64
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    for variant in member.variants:
        with torch.no_grad(), lvtp.hf.prune(model, keep=3, **variant) as pruning:
            logits = model(**inputs).logits
        assert logits.dtype == dtype
        assert set(pruning.last.counts) == {3}


def test_importing_lvtp_does_not_import_transformers():
    code = "import lvtp, lvtp.importance, sys; assert 'transformers' not in sys.modules; lvtp.hf.prune"
    subprocess.run([sys.executable, "-c", code], check=True)
