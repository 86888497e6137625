"""Prompts that come as embeddings, placeholders among them: what input_ids give, token for token."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

import lvtp.hf

from .members import MEMBERS

KEEP = 3


@pytest.fixture(params=MEMBERS, ids=lambda member: member.name)
def call(request):
    """A model, a call of it with input_ids, and the same with embeddings."""
    model, inputs = request.param.model, request.param.batch("ragged")
    embedded = {name: value for name, value in inputs.items() if name != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    return model, inputs, embedded


@pytest.mark.parametrize("options", [{}, {"score": "prompt"}, {"positions": "original"}], ids=str)
def test_logits(call, options):
    model, inputs, embedded = call
    with lvtp.hf.prune(model, keep=KEEP, **options) as pruning, torch.no_grad():
        wanted, kept = model(**inputs).logits, pruning.last.kept
        assert torch.equal(model(**embedded).logits, wanted)
        assert torch.equal(pruning.last.kept, kept)


def test_keeping_everything_is_the_unpruned_model(call):
    """Which may number embeddings otherwise than ids."""
    model, _, embedded = call
    with torch.no_grad():
        wanted = model(**embedded).logits
        with lvtp.hf.prune(model, keep=1.0):
            assert torch.equal(model(**embedded).logits, wanted)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"max_length": 80}], ids=str)
def test_generated_tokens(call, options):
    model, inputs, embedded = call
    width = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 5} | options
    if "max_length" in options:
        options = {"max_length": width + 3}
    with lvtp.hf.prune(model, keep=KEEP):
        assert torch.equal(model.generate(**embedded, **options), model.generate(**inputs, **options)[:, width:])


def test_second_turn_from_the_cache(call):
    model, inputs, embedded = call
    text = torch.randint(2, 100, (len(inputs["input_ids"]), 4), generator=torch.Generator().manual_seed(0))
    second = ({"input_ids": text}, {"inputs_embeds": model.get_input_embeddings()(text).detach()})
    logits = []
    for first, then in zip((inputs, embedded), second, strict=True):
        with lvtp.hf.prune(model, keep=KEEP, positions="original", restore_prompt=False), torch.no_grad():
            one = model.generate(**first, max_new_tokens=1, return_dict_in_generate=True)
            mask = lvtp.hf.prepare(model, inputs, keep=KEEP)["attention_mask"]
            mask = torch.cat([mask, torch.ones_like(text)], dim=1)
            logits.append(model(**then, attention_mask=mask, past_key_values=one.past_key_values).logits)
    assert torch.equal(*logits)


def test_gradients_reach_the_embeddings(call):
    model, inputs, embedded = call
    embeds = embedded["inputs_embeds"].requires_grad_()
    placeholders = (inputs["input_ids"] == 120) | (inputs["input_ids"] == 121)
    labels = inputs["input_ids"].masked_fill(placeholders | (inputs["attention_mask"] == 0), -100)
    with lvtp.hf.prune(model, keep=KEEP) as pruning:
        (gradient,) = torch.autograd.grad(model(**embedded, labels=labels).loss, embeds)
    text = pruning.last.kept & ~placeholders
    assert (gradient[text].abs().amax(dim=-1) > 0).float().mean() > 0.9  # the last tokens of rows predict nothing
    assert not gradient[~text].any()


def test_info_and_wrong_shapes(call):
    model, inputs, embedded = call
    assert lvtp.hf.info(model, embedded, keep=KEEP) == lvtp.hf.info(model, inputs, keep=KEEP)
    with pytest.raises(ValueError, match=r"inputs_embeds must be a \[B, S, D\] tensor"):
        lvtp.hf.prepare(model, {**embedded, "inputs_embeds": torch.ones(2, 3)}, keep=KEEP)


def test_without_a_cache(call):
    model, inputs, embedded = call
    width = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 3, "use_cache": False}
    with lvtp.hf.prune(model, keep=KEEP, positions="original"):
        assert torch.equal(model.generate(**embedded, **options), model.generate(**inputs, **options)[:, width:])


def merged(model, inputs):
    """The embeddings of a prompt with its images in their places, as the language model reads them."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def unseen(member):
    """Calls whose images were encoded before: name -> (arguments, the argument that is refused)."""
    model, inputs = member.model, member.batch("single")
    along = {name: inputs[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in inputs}
    features = BaseModelOutputWithPooling(pooler_output=[torch.zeros(16, 32)])
    embedded = {"inputs_embeds": merged(model, inputs), "attention_mask": inputs["attention_mask"]}
    return {
        "outputs": ({**along, "mm_encoder_outputs": {"image": features}}, "mm_encoder_outputs must be left out and"),
        "embeddings": (embedded, "inputs_embeds must come with"),
        "embeddings of known positions": ({**embedded, "position_ids": torch.arange(4)[None]}, "inputs_embeds must"),
        "embeddings and ids": ({**embedded, **along}, "inputs_embeds must come with"),
    }


@pytest.mark.parametrize("what", ["outputs", "embeddings", "embeddings of known positions", "embeddings and ids"])
def test_images_that_were_encoded_before_raise(member, what):
    model, (call, message) = member.model, unseen(member)[what]
    for function in (lvtp.hf.prepare, lvtp.hf.info):
        with pytest.raises(ValueError, match=message):
            function(model, call, keep=KEEP)
    for run in (model.__call__, model.generate):
        with lvtp.hf.prune(model, keep=KEEP) as pruning, torch.no_grad():
            model(**member.batch("single"))
            assert pruning.last is not None
            with pytest.raises(ValueError, match=message):
                run(**call)
            assert pruning.last is None


def test_what_prepare_returns_is_pruned_once(member):
    model, inputs = member.model, member.batch("single")
    prepared = lvtp.hf.prepare(model, inputs, keep=KEEP)
    with torch.no_grad():
        wanted = model(**prepared).logits
        with lvtp.hf.prune(model, keep=3) as pruning:
            assert torch.equal(model(**prepared).logits, wanted)
            assert set(pruning.last.counts) == {KEEP}
            model(**inputs)
            assert set(pruning.last.counts) == {3}
            model.generate(**lvtp.hf.prepare(model, inputs, keep=KEEP), max_new_tokens=1)
            assert set(pruning.last.counts) == {KEEP}


def test_last_is_of_the_latest_prompt(member):
    model, text = member.model, member.tiny.batch(member.model, [9])
    embedded = {**text, "inputs_embeds": model.get_input_embeddings()(text["input_ids"]).detach()}
    with lvtp.hf.prune(model, keep=KEEP, restore_prompt=False) as pruning, torch.no_grad():
        for run, call in ((model.__call__, text), (model.generate, text), (model.generate, embedded)):
            one = model.generate(**member.batch("single"), max_new_tokens=3, return_dict_in_generate=True)
            kept = pruning.last
            assert kept is not None
            model(input_ids=text["input_ids"][:, :2], past_key_values=one.past_key_values)
            assert pruning.last is kept  # a later turn of the same prompt
            run(**call, **({"max_new_tokens": 3} if run == model.generate else {}))
            assert pruning.last is None  # another prompt, without images
