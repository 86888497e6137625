import pytest
import torch

import lvtp.hf

from .oracle import relative_error
from .oracle_qwen import assemble
from .tiny_qwen import BATCHES, BUILDERS, CLIP, SMALL, WIDE, batch, build, shared

KEEP = 4
ROWS = ("single", "two_and_one", "text_only_row", "video", "mixed")


@pytest.fixture(params=BUILDERS)
def model(request):
    return shared(request.param)


def text_labels(inputs):
    return inputs["input_ids"].masked_fill((inputs["mm_token_type_ids"] > 0) | (inputs["attention_mask"] == 0), -100)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scope", ["image", "frame"])
def test_keeping_everything_is_bitwise_the_unpruned_model(model, rows, scope):
    inputs = batch(model, *BATCHES[rows])
    inputs["labels"] = text_labels(inputs)
    wanted = model(**inputs)
    deltas = model.model.rope_deltas
    for keep, positions in ((18, "original"), (1.0, "compact")):
        with lvtp.hf.prune(model, keep=keep, scope=scope, positions=positions) as pruning:
            got = model(**inputs)
        assert torch.equal(got.logits, wanted.logits)
        assert torch.equal(got.loss, wanted.loss)
        assert torch.equal(model.model.rope_deltas, deltas)
        assert torch.equal(pruning.last.kept, inputs["attention_mask"].bool())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scope", ["image", "frame"])
@pytest.mark.parametrize(
    ("method", "positions", "side"),
    [("id_selection", "original", "left"), ("prune_sid", "original", "right"), ("id_selection", "compact", "right")],
)
def test_logits_equal_the_oracle(model, rows, scope, method, positions, side):
    inputs = batch(model, *BATCHES[rows], side=side)
    oracle = assemble(model, inputs, KEEP, positions, method, scope)
    wanted = oracle.logits(model)[oracle.mask.bool()]
    with lvtp.hf.prune(model, method, KEEP, positions=positions, scope=scope) as pruning:
        logits = model(**inputs).logits
    prepared = lvtp.hf.prepare(model, inputs, method=method, keep=KEEP, positions=positions, scope=scope)
    real = prepared["attention_mask"].bool()
    assert relative_error(logits[real], wanted) <= 1e-5
    for row, columns in enumerate(oracle.kept):
        assert pruning.last.kept[row].nonzero().flatten().tolist() == columns
    assert pruning.last.next_position.tolist() == oracle.next_position
    assert torch.equal(prepared["position_ids"][:, real], oracle.positions[:, oracle.mask.bool()])


LONG = [[1, ("video", 4, 4, 4), 1]]  # time, in Qwen2.5-VL, runs ahead of all that follows


@pytest.mark.parametrize("rows", [BATCHES["mixed"], LONG], ids=["mixed", "long"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_those_of_the_unpruned_prompt(model, rows, side):
    inputs = batch(model, *rows, side=side)
    counted = {name: value for name, value in inputs.items() if "pixel" not in name}
    wanted, deltas = model.model.get_rope_index(**counted)
    with lvtp.hf.prune(model, keep=KEEP) as pruning:
        model(**inputs)
    kept = pruning.last.kept
    prepared = lvtp.hf.prepare(model, inputs, keep=KEEP)
    real = prepared["attention_mask"].bool()
    through = prepared["attention_mask"].cumsum(1) - 1
    assert prepared["position_ids"].shape == (4, *real.shape)
    assert torch.equal(prepared["position_ids"][1:, real], wanted[:, kept])
    assert torch.equal(prepared["position_ids"][0, real], through[real])
    dropped = inputs["attention_mask"].sum(1) - kept.sum(1)
    assert torch.equal(model.model.rope_deltas, deltas + dropped[:, None])
    assert torch.equal(pruning.last.next_position, inputs["attention_mask"].sum(1) + deltas[:, 0])


def test_pruning_changes_the_logits(model):
    """The control: without it, every comparison here would pass on a model that ignores its images."""
    inputs = batch(model, *BATCHES["mixed"])
    logits = [model(**inputs).logits[[0, 2], -1]]
    for options in ({}, {"scope": "frame"}, {"positions": "compact"}):
        with lvtp.hf.prune(model, keep=KEEP, **options):
            logits.append(model(**inputs).logits[[0, 2], -1])
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().amax(-1).min() > 0.1


def test_a_frame_has_a_budget_of_its_own(model):
    inputs = batch(model, [2, CLIP, 1, SMALL, 3], [4, WIDE, ("video", 2, 6, 4), 5])
    for scope, counts in (("frame", (4,) * 7), ("image", (4,) * 4)):
        with lvtp.hf.prune(model, keep=KEEP, scope=scope) as pruning:
            model(**inputs)
        assert pruning.last.counts == counts  # images, then videos
        assert pruning.last.scope == scope
    with lvtp.hf.prune(model, keep=0.5, scope="frame") as pruning:
        model(**inputs)
    assert pruning.last.counts == (5, 4, 3, 3, 3, 3, 3)


def test_a_request_has_a_budget_over_its_images_and_frames(model):
    inputs = batch(model, [2, CLIP, 1, SMALL, 3], [30], [4, WIDE, ("video", 2, 6, 4), 5])
    with lvtp.hf.prune(model, keep=lvtp.Budget(total=16, dynamic=True), scope="frame") as pruning:
        logits = model(**inputs).logits
        prompt = model.generate(**inputs, max_new_tokens=2)[:, :-2]
    small, wide, *frames = pruning.last.counts
    assert small + sum(frames[:3]) == wide + sum(frames[3:]) == 16
    visual = inputs["mm_token_type_ids"] > 0
    assert (pruning.last.kept & visual).sum(1).tolist() == [16, 0, 16]
    assert logits.shape[1] == pruning.last.kept.sum(1).max()
    assert torch.equal(prompt, inputs["input_ids"])


@pytest.mark.parametrize("scope", ["image", "frame"])
@pytest.mark.parametrize("keep", [4, 0.5, 1.0, lvtp.Budget(16)], ids=str)
def test_info_is_what_pruning_then_does(model, scope, keep):
    inputs = batch(model, *BATCHES["mixed"])
    known = lvtp.hf.info(model, inputs, keep=keep, scope=scope)
    with torch.no_grad(), lvtp.hf.prune(model, keep=keep, scope=scope) as pruning:
        cache = model(**inputs, use_cache=True).past_key_values
    before, after = zip(*known.prompt_tokens, strict=True)
    assert list(before) == inputs["attention_mask"].sum(1).tolist()
    assert list(after) == pruning.last.kept.sum(1).tolist()
    if not isinstance(keep, lvtp.Budget):
        assert [count for image in known.images for count in image.keeps] == list(pruning.last.counts)
    assert known.visual_tokens == int((inputs["mm_token_type_ids"] > 0).sum())
    token = sum(tensor[0, :, :1].nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert known.kv_bytes == (sum(before) * token, sum(after) * token)


def test_deepstack_drops_with_the_tokens():
    model = shared("qwen3")
    inputs = batch(model, *BATCHES["mixed"])
    with lvtp.hf.prune(model, keep=KEEP, scope="frame") as pruning:
        logits = model(**inputs).logits
    prepared = lvtp.hf.prepare(model, inputs, keep=KEEP, scope="frame")
    units = iter(pruning.last.indices)  # images, then videos
    for kind, frames in (("image", [1, 1]), ("video", [3, 2])):
        pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
        whole = getattr(model.model, f"get_{kind}_features")(inputs[pixels], inputs[f"{kind}_grid_thw"])
        pruned = prepared["mm_encoder_outputs"][kind]
        picks = [next(units) for _ in range(sum(frames))]
        assert len(pruned.deepstack_features) == 2
        for layer in range(2):
            items = zip(whole.deepstack_features[layer], frames, strict=True)
            split = [frame for item, n in items for frame in item.chunk(n)]
            wanted = [frame[index] for frame, index in zip(split, picks, strict=True)]
            assert all(map(torch.equal, pruned.deepstack_features[layer], wanted))
    for outputs in prepared["mm_encoder_outputs"].values():
        outputs.deepstack_features = [[item * 0 for item in layer] for layer in outputs.deepstack_features]
    real = prepared["attention_mask"].bool()
    assert (model(**prepared).logits - logits)[real].abs().max() > 0.1


def test_experts_change_nothing():
    model = shared("qwen3_moe")
    inputs = batch(model, *BATCHES["mixed"])
    oracle = assemble(model, inputs, KEEP, scope="frame")
    wanted = oracle.logits(model)[oracle.mask.bool()]
    whole = model(**inputs).logits
    with lvtp.hf.prune(model, keep=KEEP, scope="frame"):
        got = model(**inputs).logits[oracle.mask.bool()]
        tokens = model.generate(**inputs, max_new_tokens=4)[:, -4:]
    assert relative_error(got, wanted) <= 1e-5
    assert torch.equal(tokens, oracle.greedy(model, 4))
    with lvtp.hf.prune(model, keep=1.0):
        assert torch.equal(model(**inputs).logits, whole)


def test_loss_and_gradients_equal_the_oracle(model):
    inputs = batch(model, *BATCHES["mixed"])
    labels = text_labels(inputs)
    oracle = assemble(model, inputs, KEEP)
    wanted_labels = torch.full_like(oracle.mask, -100)
    for row, columns in enumerate(oracle.kept):
        wanted_labels[row, -len(columns) :] = labels[row, columns]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        return loss.detach(), grads

    logits = oracle.logits(model)[:, :-1].flatten(0, 1)
    wanted, wanted_gradients = gradients(torch.nn.functional.cross_entropy(logits, wanted_labels[:, 1:].flatten()))
    with lvtp.hf.prune(model, keep=KEEP):
        got, got_gradients = gradients(model(**inputs, labels=labels).loss)
    model.zero_grad()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    assert got_gradients.keys() == wanted_gradients.keys()
    assert any("visual.blocks.0" in name for name in got_gradients)
    scale = max(gradient.abs().max() for gradient in wanted_gradients.values()).item()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_given_positions_are_kept_with_their_tokens(model):
    inputs = batch(model, *BATCHES["single"])
    width = inputs["input_ids"].shape[1]
    ours = lvtp.hf.prepare(model, inputs, keep=KEEP)
    counted = {name: value for name, value in inputs.items() if "pixel" not in name}
    axes, _ = model.model.get_rope_index(**counted)
    given = lvtp.hf.prepare(model, {**inputs, "position_ids": axes}, keep=KEEP)
    assert torch.equal(given["position_ids"], ours["position_ids"])
    flat = lvtp.hf.prepare(model, {**inputs, "position_ids": torch.arange(width)[None]}, keep=KEEP)
    with lvtp.hf.prune(model, keep=KEEP) as pruning:
        model(**inputs)
    assert torch.equal(flat["position_ids"][1:], pruning.last.kept.nonzero()[:, 1].expand(3, 1, -1))
    with pytest.raises(ValueError, match="position_ids must be left out with positions='compact'"):
        lvtp.hf.prepare(model, {**inputs, "position_ids": axes}, keep=KEEP, positions="compact")
    with pytest.raises(ValueError, match=r"position_ids must have 3 axes .* got 4"):
        lvtp.hf.prepare(model, {**inputs, "position_ids": torch.arange(width).expand(4, 1, -1)}, keep=KEEP)


def test_prepared_inputs_give_the_same_logits_once(model):
    inputs = batch(model, *BATCHES["mixed"])
    before = {name: (value, value.clone()) for name, value in inputs.items()}
    prepared = lvtp.hf.prepare(model, inputs, keep=KEEP)
    assert not {"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"} & prepared.keys()
    assert inputs.keys() == before.keys()
    assert all(inputs[name] is value and torch.equal(value, clone) for name, (value, clone) in before.items())
    with lvtp.hf.prune(model, keep=KEEP):
        assert torch.equal(model(**inputs).logits, model(**prepared).logits)


def test_bfloat16():
    for family in BUILDERS:
        model = build(family).bfloat16()
        with lvtp.hf.prune(model, keep=KEEP) as pruning:
            logits = model(**batch(model, *BATCHES["mixed"])).logits
        assert logits.dtype == torch.bfloat16
        assert pruning.last.counts == (4,) * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_token_type_ids": None}, "mm_token_type_ids must be given to count positions"),
        ({"image_grid_thw": None}, "image_grid_thw must be given beside pixel_values"),
        ({"video_grid_thw": None}, "video_grid_thw must be given beside pixel_values_videos"),
        ({"attention_mask": None}, "attention_mask must be given for a batch of 3"),
        ({"inputs_embeds": torch.ones(3, 2, 64)}, "inputs_embeds must be left out"),
    ],
    ids=str,
)
def test_calls_are_checked_by_name(model, change, message):
    inputs = batch(model, *BATCHES["mixed"])
    call = {name: value for name, value in {**inputs, **change}.items() if value is not None}
    with lvtp.hf.prune(model, keep=KEEP):
        for run in (model.__call__, model.generate):
            with pytest.raises(ValueError, match=message):
                run(**call)


def test_options_are_checked_by_name(model):
    name = type(model).__name__
    for options, message in (
        ({"scope": "crop"}, f"scope must be one of 'image', 'frame' for {name}, got 'crop'"),
        ({"newline": "rows"}, f"newline must be left out .* for {name}"),
        ({"score": "cls"}, f"score='cls' needs a vision tower with a CLS token, that of {name} has none"),
    ):
        with pytest.raises(ValueError, match=message):
            lvtp.hf.patch(model, **options)
