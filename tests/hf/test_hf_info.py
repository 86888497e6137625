import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

import lvtp.hf

from .tiny import visual

KEEPS = (3, 0.5, 1.0, lvtp.Budget(20), lvtp.Budget(20, dynamic=False))


def cache_bytes(cache):
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


@pytest.mark.parametrize("keep", KEEPS, ids=str)
def test_it_is_what_pruning_then_does(case, keep):
    member, variant = case
    inputs = member.batch("ragged")
    known = lvtp.hf.info(member.model, inputs, keep=keep, **variant)
    with torch.no_grad(), lvtp.hf.prune(member.model, keep=keep, **variant) as pruning:
        cache = member.model(**inputs, use_cache=True).past_key_values
    left = pruning.last.kept.sum(dim=1).tolist()
    before, after = zip(*known.prompt_tokens, strict=True)
    assert list(before) == inputs["attention_mask"].sum(dim=1).tolist()
    if "llava_" in member.name and variant.keys() <= {"newline", "scope"} and variant.get("newline") != "all":
        # Newlines that stay with their rows, or with an image that is kept whole: as many as can be.
        assert all(one >= other for one, other in zip(after, left, strict=True))
    if "llava_" not in member.name or variant == {"newline": "all"} or keep == 1.0:
        assert list(after) == left
    if not isinstance(keep, lvtp.Budget):
        assert [k for image in known.images for k in image.keeps] == list(pruning.last.counts)
    assert known.visual_tokens == int(visual(inputs["input_ids"]).sum())
    token = cache_bytes(cache) // (3 * cache.get_seq_length())  # of three prompts
    assert known.kv_bytes == (sum(before) * token, sum(after) * token)


def test_nothing_runs(case):
    member, variant = case
    hooks = [
        module.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
        for module in (member.model, member.module("tower"), member.module("language_model"))
    ]
    try:
        lvtp.hf.info(member.model, member.batch("two_and_one"), keep=3, **variant)
    finally:
        for hook in hooks:
            hook.remove()


def test_images_stand_where_it_says(case):
    member, variant = case
    inputs = member.batch("ragged")
    known = lvtp.hf.info(member.model, inputs, keep=3, **variant)
    seen = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for image in known.images:
        columns = slice(*image.columns)
        token = getattr(member.model.config, f"{image.modality}_token_id")
        here = inputs["input_ids"][image.prompt, columns] == token
        assert here[0]
        assert here[-1]
        assert here.sum() == image.placeholders  # timestamps may stand between the frames of a video
        assert not (seen[image.prompt, columns] & here).any()
        seen[image.prompt, columns] |= here
    assert torch.equal(seen, visual(inputs["input_ids"]))


def test_costs_are_those_of_the_model(member):
    model = member.build()
    model.set_experts_implementation("eager")  # those that the counter knows
    known = lvtp.hf.info(model, member.batch("single"), keep=3)
    config, decoder = model.config.get_text_config(), model.model.language_model
    for length, cached, counted in zip(*known.prompt_tokens, known.kv_bytes, known.prefill_flops, strict=True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            out = decoder(inputs_embeds=torch.randn(1, length, config.hidden_size))
        assert cached == cache_bytes(out.past_key_values)
        counts = counter.flop_counts["Global"]
        products = counts[torch.ops.aten.mm] + counts[torch.ops.aten.addmm]
        pairs = sum(range(1, length + 1))  # of a token and one that it sees: twice a dot product in every head
        assert counted == products + 2 * 2 * config.num_hidden_layers * config.hidden_size * pairs


class Packed(torch.nn.Module):
    """A linear layer whose weights are stored in some other way."""

    def __init__(self, linear, stored):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if stored == "nf4":  # two entries in a byte, in a column, as bitsandbytes has them
            self.weight = torch.nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), False)
        elif stored == "fp8":
            self.weight = torch.nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), False)
        else:  # not among the parameters, as torch's own int8 layers
            self.packed = linear.weight.detach().to(torch.int8)


@pytest.mark.parametrize("stored", ["nf4", "fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_quantized_weights_cost_what_they_compute(member, stored, dtype):
    """The cache holds what comes out of them, and products are as large as before."""
    model, inputs = member.build().to(dtype), member.batch("single")
    wanted = lvtp.hf.info(model, inputs, keep=3)
    for module in list(model.model.language_model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, Packed(child, stored))
    assert lvtp.hf.info(model, inputs, keep=3) == wanted


def test_it_reads_well():
    """At full size, on the meta device: there are no weights to load."""
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(LlavaNextConfig()).bfloat16()
    ids = torch.full((1, 47 + 2928), 5)
    ids[0, 35 : 35 + 2928] = model.config.image_token_id
    inputs = {"input_ids": ids, "pixel_values": torch.empty(1, 5, 0), "image_sizes": torch.tensor([[672, 672]])}
    assert str(lvtp.hf.info(model, inputs, scope="crop", keep=64)).splitlines() == [
        "LlavaNextForConditionalGeneration: 2928 visual tokens in 1 prompt",
        "  prompt 0: 2975 tokens -> 367",
        "    image at columns 35..2962: 5 x 576 -> 5 x 64",
        "  KV cache 1.453 GiB -> 183.5 MiB",
        "  prefill 40.85 TFLOPs -> 4.789 TFLOPs",
    ]
    text = str(lvtp.hf.info(model, inputs, scope="crop", keep=lvtp.Budget(320)))
    assert "5 x 576 -> by content" in text
    assert "2975 tokens -> 367" in text


def test_calls_without_images_lose_nothing(member):
    inputs = {name: value for name, value in member.batch("text_only_row").items() if name.endswith(("ids", "mask"))}
    known = lvtp.hf.info(member.model, {name: value[1:] for name, value in inputs.items()}, keep=3)
    assert known.images == ()
    assert known.prompt_tokens == ((9, 9),)
    assert known.kv_bytes[0] == known.kv_bytes[1]


def test_calls_are_checked_by_name(member):
    inputs = member.batch("two_and_one")
    with pytest.raises(ValueError, match="attention_mask must be given for a batch of 2"):
        lvtp.hf.info(member.model, {name: value for name, value in inputs.items() if name != "attention_mask"})
    with pytest.raises(ValueError, match="input_ids must hold one placeholder for each"):
        lvtp.hf.info(member.model, {**inputs, "input_ids": inputs["input_ids"].clamp(max=119)})
    with pytest.raises(ValueError, match="input_ids or inputs_embeds must be given"):
        lvtp.hf.info(member.model, {**inputs, "input_ids": None})
    with pytest.raises(ValueError, match="keep must be"):
        lvtp.hf.info(member.model, inputs, keep=0)
