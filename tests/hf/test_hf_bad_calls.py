"""Options and calls that cannot be served raise, by name."""

import inspect
import re

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

import lvtp.hf
from lvtp.hf import requirement
from lvtp.hf.families import family_of
from lvtp.hf.options import Options

from .members import MEMBERS, ONEVISION, QWENS, TOWERS
from .tiny import TOWER, text_config, visual
from .tiny_llava import BATCHES, batch

KEEP = 5


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


@pytest.mark.parametrize("function", [lvtp.hf.prune, lvtp.hf.patch, lvtp.hf.prepare, lvtp.hf.info])
def test_options_are_the_same_everywhere(function):
    """Names, order, defaults and types; `prepare` and `info` return no prompt that could be restored."""
    taken = list(inspect.signature(function).parameters.values())
    options = list(inspect.signature(Options).parameters.values())
    if function in (lvtp.hf.prepare, lvtp.hf.info):
        assert taken.pop(1).name == "inputs"
        options.pop()
    assert [(option.name, option.default, option.annotation) for option in taken[1:]] == [
        (option.name, option.default, option.annotation) for option in options
    ]
    documented = re.search(r"Args:\n(.*?)(\n\n|\Z)", inspect.getdoc(function), re.DOTALL).group(1)
    named = re.findall(r"^    ([\w, ]+): ", documented, re.MULTILINE)
    assert {name for names in named for name in names.split(", ")} == set(inspect.signature(function).parameters)


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
        ({"input_ids": None}, "input_ids or inputs_embeds must be given beside the pixels"),
        ({"input_ids": torch.ones(3)}, r"input_ids must be a \[B, S\] tensor, got shape \[3\]"),
        (
            {"input_ids": torch.ones(3, 200), "attention_mask": torch.ones(3, 200)},
            "one placeholder for each of the .* got 0",
        ),
        ({"inputs_embeds": torch.ones(3, 3, 32)}, "inputs_embeds must have the rows and columns of input_ids"),
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
def test_what_llava_cannot_encode_raises(model, change, message):
    inputs = batch(model, *BATCHES["two_and_one"])
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


def four(model, inputs, **options):
    """All functions that take a model and options."""
    yield lambda: lvtp.hf.prune(model, **options)
    yield lambda: lvtp.hf.patch(model, **options)
    yield lambda: lvtp.hf.prepare(model, inputs, **options)
    yield lambda: lvtp.hf.info(model, inputs, **options)


@pytest.mark.parametrize("score", ["auto", lambda features: features.norm(dim=-1)], ids=["auto", "callable"])
def test_towers_with_images_of_several_sizes_raise_everywhere(score):
    sizes = {**TOWER, "image_size": 64, "patch_size": 8}
    config = LlavaConfig(vision_config=PixtralVisionConfig(**sizes), text_config=text_config(), image_token_index=120)
    inputs = {"input_ids": torch.full((1, 32), 120), "pixel_values": torch.zeros(1, 3, 32, 64)}
    inputs["image_sizes"] = torch.tensor([[32, 64]])
    for call in four(LlavaForConditionalGeneration(config), inputs, score=score):
        with pytest.raises(ValueError, match=r"takes images of one size, got PixtralVisionModel \(pixtral\)"):
            call()


def test_what_is_no_model_raises_everywhere():
    for call in four(torch.compile(torch.nn.Linear(2, 2)), {}):
        with pytest.raises(TypeError, match=r"model must be one of LlavaForConditionalGeneration, .* got Linear"):
            call()


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
