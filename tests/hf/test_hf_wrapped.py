"""Models that another library has wrapped or hooked: PEFT, accelerate, torch.compile."""

import copy

import pytest
import torch
from transformers import Pipeline

import lvtp.hf

from . import tiny_anyres, tiny_llava, tiny_qwen
from .oracle import relative_error
from .tiny import footprint

KEEP = 4
FAMILIES = ("llava", "qwen2_5")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def build(family):
    if family == "llava_next":
        return tiny_anyres.build_next()
    return tiny_llava.build() if family == "llava" else tiny_qwen.build(family)


def batch(model):
    if model.config.model_type == "llava_next":
        inputs = tiny_anyres.batch(model, *tiny_anyres.BATCHES_NEXT["two_and_one"])
    else:
        tiny = tiny_llava if model.config.model_type == "llava" else tiny_qwen
        inputs = tiny.batch(model, *tiny.BATCHES["two_and_one"])
    return {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}


def generate(model, inputs, keep=KEEP, **options):
    with lvtp.hf.prune(model, keep=keep):
        return model.generate(**inputs, max_new_tokens=5, **options)


# ------------------------------------------------------------------------------------------------------------- PEFT


def with_lora(family, task_type=None):
    """Adapters that change every output, in the tower and in the language model; in double, in which W + B A is exact
    enough."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False, task_type=task_type
    )
    torch.manual_seed(1)
    return peft.get_peft_model(build(family).double(), config)


@pytest.fixture(params=[None, "CAUSAL_LM", "past the hooks"])
def lora(request, family, monkeypatch):
    if request.param == "past the hooks":  # as PEFT was before 0.21
        tuner = pytest.importorskip("peft.tuners.tuners_utils").BaseTuner
        monkeypatch.setattr(tuner, "forward", lambda self, *args, **kwargs: self.model.forward(*args, **kwargs))
        return with_lora(family, "CAUSAL_LM")
    return with_lora(family, request.param)


def test_a_peft_model_gives_what_the_merged_model_gives(lora):
    merged = copy.deepcopy(lora).merge_and_unload()
    inputs = batch(merged)
    lora.generate(**inputs, max_new_tokens=1)  # leaves things of its own, as transformers does
    before = footprint(lora)
    with lvtp.hf.prune(merged, keep=KEEP), torch.no_grad():
        wanted = merged(**inputs).logits
    with lvtp.hf.prune(lora, keep=KEEP) as pruning, torch.no_grad():
        got = lora(**inputs).logits
        assert pruning.last.counts == (KEEP,) * 3
        with lora.disable_adapter():
            assert relative_error(lora(**inputs).logits, wanted) > 0.01
    assert relative_error(got, wanted) <= 1e-5
    for options in ({}, {"num_beams": 2}):
        assert torch.equal(generate(lora, inputs, **options), generate(merged, inputs, **options))
    assert not torch.equal(generate(lora, inputs), generate(lora, inputs, keep=1.0))
    assert footprint(lora) == before


def test_gradients_reach_the_adapters(lora):
    """That of W + B A, of the merged model, gives those of B and of A."""
    merged = copy.deepcopy(lora).merge_and_unload().requires_grad_()
    inputs = batch(merged)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 120, -100)
    for model in (merged, lora):
        with lvtp.hf.prune(model, keep=KEEP):
            model(**inputs).loss.backward()
    weights = dict(merged.named_parameters())
    trained = {name: module for name, module in lora.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert {"language_model" in name for name in trained} == {True, False}
    scale = max(weight.grad.abs().max() for weight in weights.values() if weight.grad is not None).item()
    for name, module in trained.items():
        gradient, factor = weights[f"{name}.weight"].grad, module.scaling["default"]
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        if gradient is None:  # LLaVA does not run the last layer of its tower
            assert a.grad is None
            continue
        torch.testing.assert_close(a.grad, factor * b.T @ gradient, rtol=1e-3, atol=1e-5 * scale)
        torch.testing.assert_close(b.grad, factor * gradient @ a.T, rtol=1e-3, atol=1e-5 * scale)
    assert all("lora" in name for name, weight in lora.named_parameters() if weight.grad is not None)


def test_prepare_and_info_take_a_peft_model(family):
    lora = with_lora(family)
    inputs = batch(lora)
    wanted = generate(lora, inputs)
    assert lvtp.hf.info(lora, inputs, keep=KEEP).images == lvtp.hf.info(lora.get_base_model(), inputs, keep=KEEP).images
    prepared = lvtp.hf.prepare(lora, inputs, keep=KEEP)
    new = lora.generate(**prepared, max_new_tokens=5)[:, prepared["input_ids"].shape[1] :]
    assert torch.equal(new, wanted[:, inputs["input_ids"].shape[1] :])


def test_learned_prompts_stay():
    peft = pytest.importorskip("peft")
    model = build("llava")
    inputs = batch(model)
    sizes = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4, "num_transformer_submodules": 1}
    prompted = peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", **sizes))
    with lvtp.hf.prune(prompted, keep=KEEP) as pruning, torch.no_grad():
        got = prompted(**inputs).logits
        assert pruning.last.kept[:, :2].all()
        assert pruning.last.counts == (KEEP,) * 3
        embeds = torch.cat([prompted.get_prompt(2), model.get_input_embeddings()(inputs["input_ids"])], dim=1)
        mask = torch.cat([torch.ones(2, 2), inputs["attention_mask"]], dim=1)
        wanted = model(inputs_embeds=embeds, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
    assert torch.equal(got, wanted)


def test_what_peft_wraps_is_checked_by_name():
    peft = pytest.importorskip("peft")
    inside = peft.get_peft_model(build("llava").model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="got LlavaModel"):
        lvtp.hf.patch(inside)


# ------------------------------------------------------------------------------------------------------- accelerate


def outputs(model, inputs, **options):
    """Logits and greedy tokens under pruning."""
    with lvtp.hf.prune(model, keep=KEEP, **options), torch.no_grad():
        return model(**inputs).logits, model.generate(**inputs, max_new_tokens=4)


@pytest.mark.parametrize("score", ["auto", "prompt"])
@pytest.mark.parametrize("family", [*FAMILIES, "llava_next"])  # the last has a parameter outside of all layers
def test_offloaded_models_give_the_same(family, score):
    accelerate = pytest.importorskip("accelerate")
    inputs = batch(build(family))
    wanted = outputs(build(family), inputs, score=score)
    model = accelerate.cpu_offload(build(family), execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    assert all(map(torch.equal, outputs(model, inputs, score=score), wanted))


def test_models_dispatched_to_disk_give_the_same(family, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    inputs = batch(build(family))
    wanted = outputs(build(family), inputs)
    model = build(family)
    places = {f"model.{name}": "disk" for name, _ in model.model.named_children()} | {"lm_head": "cpu"}
    with lvtp.hf.prune(model, keep=KEEP), torch.no_grad():  # before the hooks are there
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
        assert torch.equal(model(**inputs).logits, wanted[0])
    assert all(map(torch.equal, outputs(model, inputs), wanted))


# ---------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("what", ["decoder", "tower", "everything"])
def test_compiled_models_give_the_same(what):
    """Hooks that come after the first run of a compiled model are not called by what was compiled."""
    model = tiny_llava.build()
    inputs = batch(model)
    with lvtp.hf.prune(model, keep=KEEP), torch.no_grad():
        wanted = model(**inputs).logits
    parts = {"decoder": model.model.language_model, "tower": model.model.vision_tower, "everything": model}
    parts[what].compile(backend="eager")
    with torch.no_grad():
        model(**inputs)
        with lvtp.hf.prune(model, keep=KEEP):
            assert torch.equal(model(**inputs).logits, wanted)


def test_what_torch_compile_returns_is_taken():
    model = tiny_llava.build()
    inputs = batch(model)
    wanted, tokens = outputs(model, inputs)
    compiled = torch.compile(model, backend="eager")
    logits, got = outputs(compiled, inputs)
    assert relative_error(logits, wanted) <= 1e-5
    assert torch.equal(got, tokens)


def test_steps_by_hand_of_what_torch_compile_returns():
    """The prompt's cache says where positions go on, whatever was compiled."""
    model = tiny_llava.build()
    inputs = batch(model)
    tokens, mask = torch.full((len(inputs["input_ids"]), 1), 7), inputs["attention_mask"]
    logits = []
    for callee in (model, torch.compile(model, backend="eager")):
        with torch.no_grad(), lvtp.hf.prune(callee, keep=KEEP, positions="original"):
            cache = callee(**inputs, use_cache=True).past_key_values
            step = {"input_ids": tokens, "attention_mask": torch.cat([mask, torch.ones_like(tokens)], dim=1)}
            logits.append(callee(**step, past_key_values=cache).logits)
    assert relative_error(logits[1], logits[0]) <= 1e-5


@pytest.mark.parametrize("outside", [True, False])
def test_wrappers_may_be_around_each_other(outside):
    peft = pytest.importorskip("peft")
    model = tiny_llava.build()
    inputs = batch(model)
    wanted, known = lvtp.hf.prepare(model, inputs, keep=KEEP), lvtp.hf.info(model, inputs, keep=KEEP)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])  # gives what the model gives until it is trained
    if outside:
        wrapped = peft.get_peft_model(torch.compile(model), lora)
    else:
        wrapped = torch.compile(peft.get_peft_model(model, lora))
    before = footprint(model)
    assert lvtp.hf.info(wrapped, inputs, keep=KEEP).images == known.images
    assert torch.equal(lvtp.hf.prepare(wrapped, inputs, keep=KEEP)["input_ids"], wanted["input_ids"])
    with lvtp.hf.prune(wrapped, keep=KEEP) as pruning, torch.no_grad():
        model(**inputs)
    assert pruning.last.counts == (KEEP,) * 3
    assert footprint(model) == before


# -------------------------------------------------------------------------------------------------------- pipelines


def test_the_model_of_a_pipeline_is_pruned():
    class Generate(Pipeline):
        def _sanitize_parameters(self, **_):
            return {}, {}, {}

        def preprocess(self, inputs):
            return inputs

        def _forward(self, inputs):
            return {"tokens": self.model.generate(**inputs, max_new_tokens=5)}

        def postprocess(self, outputs):
            return outputs["tokens"]

    model = tiny_llava.build()
    inputs = batch(model)
    wanted = generate(model, inputs)
    pipeline = Generate(model=model, tokenizer=None)
    with lvtp.hf.prune(pipeline, keep=KEEP) as pruning:
        assert torch.equal(pipeline(inputs), wanted)
    assert pruning.last.counts == (KEEP,) * 3
    assert lvtp.hf.info(pipeline, inputs, keep=KEEP) == lvtp.hf.info(model, inputs, keep=KEEP)
