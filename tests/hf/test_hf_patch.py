import copy
import gc
import inspect
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import PixtralVisionConfig, StaticCache

import lvtp.hf
from lvtp.hf import requirement
from lvtp.hf.families import family_of
from lvtp.hf.options import Options

from .members import MEMBERS, ONEVISION, QWENS, TOWERS
from .tiny import footprint, visual
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


# ---------------------------------------------------------------------------------------------- everything else raises


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "random"}, "method must be one of 'id_selection', 'prune_sid' or a callable, got 'random'"),
        ({"keep": 0}, "keep must be an int of at least 1"),
        ({"keep": -3}, "got -3"),
        ({"keep": 0.0}, "got 0.0"),
        ({"keep": 1.5}, "got 1.5"),
        ({"keep": float("nan")}, "got nan"),
        ({"keep": True}, "got True"),
        ({"keep": "64"}, "got '64'"),
        (
            {"score": "attention"},
            "score must be one of 'auto', 'cls', 'received', 'prompt' or a callable, got 'attention'",
        ),
        ({"positions": "mrope"}, "positions must be one of 'auto', 'compact', 'original', got 'mrope'"),
        ({"scope": "crop"}, "scope must be one of 'image' for LlavaForConditionalGeneration, got 'crop'"),
        ({"newline": "rows"}, "newline must be left out .* for LlavaForConditionalGeneration, got 'rows'"),
    ],
    ids=str,
)
def test_options_are_checked_at_once(model, options, message):
    with pytest.raises(ValueError, match=message):
        lvtp.hf.patch(model, **options)
    with pytest.raises(ValueError, match=message):
        lvtp.hf.prepare(model, {}, **options)


def test_options_are_checked_by_family(member):
    name = type(member.model).__name__
    scopes = {scope for scope in ("image", "crop", "frame") if scope in family_of(member.model, Options()).scopes}
    for scope in {"image", "crop", "frame", "video"} - scopes:
        with pytest.raises(ValueError, match=f"scope must be one of .* for {name}, got '{scope}'"):
            lvtp.hf.patch(member.model, scope=scope)
    takes = "one of 'rows', 'drop', 'all'" if {"newline": "all"} in member.variants else "left out"
    with pytest.raises(ValueError, match=f"newline must be {takes} .*for {name}, got 'some'"):
        lvtp.hf.patch(member.model, newline="some")
    if member in (ONEVISION, *QWENS):
        with pytest.raises(ValueError, match="score='cls' needs a vision tower with a CLS token"):
            lvtp.hf.patch(member.model, score="cls")


def test_restore_prompt_is_a_bool(model):
    with pytest.raises(ValueError, match="restore_prompt must be True or False, got 'no'"):
        lvtp.hf.patch(model, restore_prompt="no")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": None}, "attention_mask must be given for a batch of 3"),
        ({"attention_mask": torch.ones(3, 3)}, "attention_mask must have the shape of input_ids"),
        ({"input_ids": None}, "input_ids must be given beside the pixels"),
        ({"input_ids": torch.ones(3)}, r"input_ids must be a \[B, S\] tensor, got shape \[3\]"),
        (
            {"input_ids": torch.ones(3, 200), "attention_mask": torch.ones(3, 200)},
            "one placeholder for each of the .* got 0",
        ),
        ({"inputs_embeds": torch.ones(3, 3, 32)}, "inputs_embeds must be left out"),
        ({"mm_encoder_outputs": {}}, "mm_encoder_outputs must be left out"),
        ({"logits_to_keep": torch.tensor([3])}, "logits_to_keep must be an int"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_calls_are_checked_by_name(member, change, message):
    call = {name: value for name, value in {**member.batch("ragged"), **change}.items() if value is not None}
    with lvtp.hf.prune(member.model, keep=KEEP):
        for run in (member.model.__call__, member.model.generate):
            with pytest.raises(ValueError, match=message):
                run(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.randn(2, 3, 32, 32)}, "one placeholder for each of the 32 image tokens .* got 48"),
        ({"image_sizes": torch.ones(3, 2)}, "image_sizes must be left out"),
        ({"vision_feature_layer": 0}, "vision_feature_layer must name the output of one of the tower's 3 layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_llava_cannot_encode_raises(model, inputs, change, message):
    with pytest.raises(ValueError, match=message), lvtp.hf.prune(model, keep=KEEP):
        model(**{**inputs, **change})


def test_unknown_tensors_along_the_prompt_raise(member):
    model, inputs = member.model, member.batch("two_and_one")
    for shape in (inputs["input_ids"].shape, inputs["input_ids"].shape[1:]):
        with pytest.raises(ValueError, match=r"shift_labels of shape .* runs along the prompt"):
            lvtp.hf.prepare(model, {**inputs, "shift_labels": torch.zeros(shape)}, keep=KEEP)


def test_hidden_placeholders_raise(member):
    model, inputs = member.model, member.batch("single")
    inputs["attention_mask"][visual(inputs["input_ids"])] = 0
    with pytest.raises(ValueError, match="attention_mask must not hide image placeholders"):
        lvtp.hf.prepare(model, inputs, keep=KEEP)


def test_unsupported_models_raise_by_name(model):
    assert lvtp.hf.supported() == tuple(type(member.model).__name__ for member in MEMBERS)
    for other in (model.model, model.model.vision_tower, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"got {type(other).__name__}"):
            lvtp.hf.patch(other)


def test_unsupported_towers_raise_by_name():
    for member in TOWERS:
        model = member.build()
        model.config.vision_config = PixtralVisionConfig()
        with pytest.raises(ValueError, match=r"score='auto' needs a vision tower of type .* got pixtral"):
            lvtp.hf.patch(model)


def test_transformers_is_required_by_name(monkeypatch):
    def absent(name):
        raise requirement.PackageNotFoundError(name)

    for found in ("5.19.0", "5.23.0.dev0", "6.0.0rc1"):
        monkeypatch.setattr(requirement, "version", lambda name, found=found: found)
        requirement.check_transformers()
    for found in ("4.57.1", "5.18.0"):
        monkeypatch.setattr(requirement, "version", lambda name, found=found: found)
        with pytest.raises(ImportError, match=rf"needs transformers >= 5.19, found {found}. Remedy: pip install"):
            requirement.check_transformers()
    monkeypatch.setattr(requirement, "version", absent)
    with pytest.raises(ImportError, match=r"which is not installed\. Remedy: pip install 'transformers>=5.19'"):
        requirement.check_transformers()


def test_importing_lvtp_does_not_import_transformers():
    code = "import lvtp, lvtp.importance, sys; assert 'transformers' not in sys.modules; lvtp.hf.prune"
    subprocess.run([sys.executable, "-c", code], check=True)
