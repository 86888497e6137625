"""Positions on three axes, deepstack and the calls of Qwen-VL: what the shared tests do not ask."""

import copy

import pytest
import torch

import lvtp.hf

from .members import QWENS
from .tiny_qwen import CLIP, SHORT, SMALL, WIDE, batch

KEEP = 4
NEW = 5
LONG = [[1, ("video", 4, 4, 4), 1]]  # time, in Qwen2.5-VL, runs ahead of all that follows


@pytest.fixture(params=QWENS, ids=lambda member: member.name)
def member(request):
    return request.param


@pytest.fixture
def model(member):
    return member.model


def first(features, scores, k):
    return torch.arange(k).expand(len(features), k)


def counted(model, inputs):
    """Positions [3, B, S] and `rope_deltas` [B, 1] of the unpruned prompt, by the model's own function."""
    return model.model.get_rope_index(**{name: value for name, value in inputs.items() if "pixel" not in name})


# ----------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("rows", ["ragged", "long"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_those_of_the_unpruned_prompt(member, rows, side):
    model = member.model
    inputs = batch(model, *LONG, side=side) if rows == "long" else member.batch(rows, side=side)
    wanted, deltas = counted(model, inputs)
    options = {"keep": KEEP, "method": first if rows == "long" else "id_selection"}
    with lvtp.hf.prune(model, **options) as pruning:
        model(**inputs)
    kept = pruning.last.kept
    prepared = lvtp.hf.prepare(model, inputs, **options)
    real = prepared["attention_mask"].bool()
    through = prepared["attention_mask"].cumsum(1) - 1
    assert prepared["position_ids"].shape == (4, *real.shape)
    assert torch.equal(prepared["position_ids"][1:, real], wanted[:, kept])
    assert torch.equal(prepared["position_ids"][0, real], through[real])
    dropped = inputs["attention_mask"].sum(1) - kept.sum(1)
    assert torch.equal(model.model.rope_deltas, deltas + dropped[:, None])
    assert torch.equal(pruning.last.next_position, inputs["attention_mask"].sum(1) + deltas[:, 0])
    with lvtp.hf.prune(model, keep=1.0):
        model(**inputs)
    assert torch.equal(model.model.rope_deltas, deltas)


def test_given_positions_are_kept_with_their_tokens(member):
    model, inputs = member.model, member.batch("single")
    width = inputs["input_ids"].shape[1]
    ours = lvtp.hf.prepare(model, inputs, keep=KEEP)
    axes, _ = counted(model, inputs)
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


@pytest.mark.parametrize("rows", [[[2, SMALL, 5]], [[2, CLIP, 4]], LONG], ids=["image", "video", "long"])
def test_decoding_by_hand(member, rows):
    """Steps without positions go on from the model's own `rope_deltas`."""
    model = member.model
    inputs = batch(model, *rows)
    for positions in ("original", "compact"):
        wanted = member.assemble(inputs, KEEP, positions).greedy(model, 3)
        with torch.no_grad(), lvtp.hf.prune(model, keep=KEEP, positions=positions):
            model(**batch(model, [3, SMALL, 9]))
            out = model(**inputs)
            tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
            for _ in range(2):
                out = model(input_ids=tokens[-1], past_key_values=out.past_key_values)
                tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        assert torch.equal(torch.cat(tokens, dim=1), wanted)


@pytest.mark.parametrize("rows", ["single", "ragged"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("only_new_ids", [True, False])
def test_a_later_turn_needs_no_pruning(member, rows, positions, only_new_ids):
    model, inputs = member.model, member.batch(rows)
    oracle = member.assemble(inputs, KEEP, positions)
    text = torch.randint(2, 100, (len(inputs["input_ids"]), 5), generator=torch.Generator().manual_seed(7))
    oracle = oracle.read(model, torch.cat([oracle.greedy(model, NEW), text], dim=1))
    with lvtp.hf.prune(model, keep=KEEP, positions=positions, restore_prompt=False):
        one = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
    ids, cache = torch.cat([one.sequences, text], dim=1), one.past_key_values
    ids = ids[:, cache.get_seq_length() :] if only_new_ids else ids
    two = model.generate(input_ids=ids, attention_mask=oracle.mask, past_key_values=cache, max_new_tokens=NEW)
    assert torch.equal(two[:, -NEW:], oracle.greedy(model, NEW))


@pytest.mark.filterwarnings("ignore")  # transformers warns of its own arguments
def test_speculation_after_a_video_changes_no_token(model):
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.05 * torch.randn_like(assistant.lm_head.weight))
    inputs = batch(model, [2, CLIP, 4])
    with lvtp.hf.prune(model, keep=KEEP):
        wanted = model.generate(**inputs, max_new_tokens=12)
        for kwargs in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
            assert torch.equal(model.generate(**inputs, max_new_tokens=12, **kwargs), wanted)


# ---------------------------------------------------------------------------------------------------- frames, deepstack


def test_a_frame_has_a_budget_of_its_own(model):
    inputs = batch(model, [2, CLIP, 1, SMALL, 3], [4, WIDE, SHORT, 5])
    for keep, scope, counts in (
        (KEEP, "frame", (4,) * 7),
        (KEEP, "image", (4,) * 4),
        (0.5, "frame", (5, 4, 3, 3, 3, 3, 3)),  # images, then videos
    ):
        with lvtp.hf.prune(model, keep=keep, scope=scope) as pruning:
            model(**inputs)
        assert pruning.last.counts == counts
        assert pruning.last.scope == scope


@pytest.mark.parametrize("member", QWENS[2:], ids=lambda member: member.name)
def test_deepstack_drops_with_the_tokens(member):
    model, inputs = member.model, member.batch("ragged")
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


# ----------------------------------------------------------------------------------------------- everything else raises


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("mm_token_type_ids", "mm_token_type_ids must be given to count positions"),
        ("image_grid_thw", "image_grid_thw must be given beside pixel_values"),
        ("video_grid_thw", "video_grid_thw must be given beside pixel_values_videos"),
    ],
)
def test_what_positions_are_counted_from_is_asked_for_by_name(member, absent, message):
    call = {name: value for name, value in member.batch("ragged").items() if name != absent}
    with lvtp.hf.prune(member.model, keep=KEEP):
        for run in (member.model.__call__, member.model.generate):
            with pytest.raises(ValueError, match=message):
                run(**call)
