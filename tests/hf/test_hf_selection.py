"""`keep` as a budget for a request, and `method` as a selector of the caller's own."""

import numpy as np
import pytest
import torch

import lvtp.hf

from .members import INTERNVL, LLAVA, NEXT, ONEVISION, QWENS
from .oracle import relative_error
from .tiny import footprint

NEW = 4
# Families and scopes whose units have all one size, and a batch of such.
EVEN = [
    pytest.param(LLAVA, {}, "ragged", [3, 0, 1], id="llava"),
    pytest.param(NEXT, {"scope": "crop"}, "ragged", [9, 0, 5], id="llava_next-crop"),
    pytest.param(ONEVISION, {"scope": "frame"}, "text_only_row", [3, 0], id="llava_onevision-frame"),
    pytest.param(INTERNVL, {}, "ragged", [3, 0, 3], id="internvl"),
]


def projector_inputs(member, inputs):
    """[n, N, Dv] of all crops, as the projector gets them."""
    seen = []
    hook = member.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            member.model(**inputs)
    finally:
        hook.remove()
    (features,) = seen
    return member.model.model.apply_pooling(features) if member is ONEVISION else features


@pytest.mark.parametrize(("member", "variant", "rows", "units"), EVEN)
def test_a_budget_is_shared_by_content_within_each_request(member, variant, rows, units):
    inputs = member.batch(rows)
    wanted, total = [], 7 if member is ONEVISION else 17
    for features in projector_inputs(member, inputs).split(units):
        if len(features):
            wanted += lvtp.dynamic_budget(features, min(total, len(features) * features.shape[1])).tolist()
    assert len(set(wanted)) > 1
    oracle = member.assemble(inputs, wanted, **variant)
    with torch.no_grad(), lvtp.hf.prune(member.model, keep=lvtp.Budget(total), **variant) as pruning:
        logits = member.model(**inputs).logits
        tokens = member.model.generate(**inputs, max_new_tokens=NEW)
        beams = member.model.generate(**inputs, max_new_tokens=NEW, num_beams=2)
    assert list(pruning.last.counts) == wanted
    assert relative_error(logits, oracle.logits(member.model), oracle.mask) <= 1e-5
    assert torch.equal(tokens[:, -NEW:], oracle.greedy(member.model, NEW))
    assert torch.equal(beams[:, -NEW:], oracle.generate(member.model, max_new_tokens=NEW, num_beams=2))


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_budget_over_images_and_videos_of_several_sizes(case, dynamic):
    member, variant = case
    inputs = member.batch("ragged")
    with torch.no_grad(), lvtp.hf.prune(member.model, keep=lvtp.Budget(21, dynamic), **variant) as pruning:
        logits = member.model(**inputs).logits
        tokens = member.model.generate(**inputs, max_new_tokens=2)
    counts = list(pruning.last.counts)
    oracle = member.assemble(inputs, counts, **variant)
    assert relative_error(logits, oracle.logits(member.model), oracle.mask) <= 1e-5
    assert torch.equal(tokens, torch.cat([inputs["input_ids"], oracle.greedy(member.model, 2)], dim=1))
    known = lvtp.hf.info(member.model, inputs, keep=21, **variant)
    units = [(image.prompt, tokens) for image in known.images for tokens in image.units]
    for prompt in (0, 2):
        room = [tokens for where, tokens in units if where == prompt]
        given = [kept for kept, (where, _) in zip(counts, units, strict=True) if where == prompt]
        assert sum(given) == min(21, sum(room))
        if not dynamic:
            assert max(given) - min(given) <= 1 or any(map(int.__eq__, given, room))


def test_a_budget_for_fewer_tokens_than_images_raises():
    with pytest.raises(ValueError, match=r"total must be at least 1 for each of the 3 images .* got 2"):
        lvtp.hf.prepare(LLAVA.model, LLAVA.batch("ragged"), keep=lvtp.Budget(2))


# --------------------------------------------------------------------------------------------- selectors of one's own


def top(features, scores, k):
    """Indices in no particular order, as selectors give them."""
    return scores.topk(k, dim=1).indices.flip(1)


def test_a_selector_of_ones_own(case):
    member, variant = case
    inputs, calls = member.batch("ragged"), []

    def method(features, scores, k):
        calls.append((features.shape, scores.shape, k))
        return top(features, scores, k)

    with torch.no_grad(), lvtp.hf.prune(member.model, method, 3, **variant) as pruning:
        member.model(**inputs)
        tokens = member.model.generate(**inputs, max_new_tokens=2)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 2
    assert {k for _, _, k in calls} == {3}
    for features, scores, _ in calls:
        assert features[:2] == scores
        assert len(features) == 3
    assert sum(scores[0] for _, scores, _ in calls) == 2 * len(pruning.last.counts)
    assert set(pruning.last.counts) == {3}
    assert all(indices.diff().gt(0).all() for indices in pruning.last.indices)


def test_it_may_be_one_of_ours_with_other_arguments():
    inputs = LLAVA.batch("two_and_one")
    with lvtp.hf.prune(LLAVA.model, lambda features, scores, k: lvtp.prune_sid(features, scores, k), 5):
        got = LLAVA.model(**inputs).logits
    with lvtp.hf.prune(LLAVA.model, "prune_sid", 5):
        assert torch.equal(LLAVA.model(**inputs).logits, got)
    with lvtp.hf.prune(LLAVA.model, lambda features, scores, k: lvtp.prune_sid(features, None, k), 5):
        assert not torch.equal(LLAVA.model(**inputs).logits, got)


def test_it_is_not_asked_where_everything_is_kept():
    inputs = LLAVA.batch("two_and_one")
    lvtp.hf.prepare(LLAVA.model, inputs, method=lambda *_: pytest.fail("asked"), keep=16)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda x, s, k: x[:, :k], TypeError, r"int64 \[3, 5\], got float32 \[3, 5, 32\]; selectors that merge"),
        (lambda x, s, k: (top(x, s, k), x[:, :k]), TypeError, "got tuple; selectors that merge"),
        (lambda x, s, k: s.topk(k).values, TypeError, r"got float32 \[3, 5\]"),
        (lambda x, s, k: s > 0, TypeError, r"got bool \[3, 16\]"),
        (lambda x, s, k: None, TypeError, "got NoneType"),
        (lambda x, s, k: top(x, s, k)[:, 1:], ValueError, r"k=5 indices for each of 3 images, .* got int64 \[3, 4\]"),
        (lambda x, s, k: top(x, s, k)[0], ValueError, r"got int64 \[5\]"),
        (lambda x, s, k: top(x, s, k) * 0, ValueError, "every token at most once"),
        (lambda x, s, k: top(x, s, k) - 16, ValueError, r"indices in \[0, 16\), got -"),
        (lambda x, s, k: top(x, s, k) + 16, ValueError, r"indices in \[0, 16\), got "),
    ],
)
def test_selectors_that_do_not_keep_the_contract_are_refused(result, error, message):
    with pytest.raises(error, match=f"method must return .*{message}"):
        lvtp.hf.prepare(LLAVA.model, LLAVA.batch("two_and_one"), method=result, keep=5)


# ------------------------------------------------------------------------------------------------- numbers and nothing


@pytest.mark.parametrize(
    ("given", "meant"), [(np.int64(3), 3), (np.uint8(3), 3), (np.float32(0.5), 0.5), (np.float64(0.5), 0.5)], ids=repr
)
def test_numbers_of_numpy_are_numbers(given, meant):
    model, inputs = LLAVA.model, LLAVA.batch("single")
    wanted = lvtp.hf.prepare(model, inputs, keep=meant)["input_ids"]
    assert torch.equal(lvtp.hf.prepare(model, inputs, keep=given)["input_ids"], wanted)
    assert lvtp.hf.info(model, inputs, keep=given) == lvtp.hf.info(model, inputs, keep=meant)
    with lvtp.hf.prune(model, keep=given) as pruning, torch.no_grad():
        model(**inputs)
    assert pruning.last.kept.sum() == wanted.shape[1]
    for nothing in (np.int64(0), np.bool_(True), np.float32(1.5), np.array([3])):
        with pytest.raises(ValueError, match="keep must be an int of at least 1"):
            lvtp.hf.prune(model, keep=nothing)


def test_one_context_may_be_entered_again(model):
    inputs = LLAVA.batch("single")
    context = lvtp.hf.prune(model, keep=3)
    before = footprint(model)
    for _ in range(2):
        with context as outer, context as inner, torch.no_grad():
            model(**inputs)
            assert inner.last.counts == (3,)
            assert outer.last is None
        assert footprint(model) == before


def no_frames(member):
    """A video without any, as a call brings it."""
    if member is ONEVISION:
        return {"pixel_values_videos": torch.zeros(1, 0, 3, 32, 32)}
    pixels = member.batch("single")["pixel_values"][:0]
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.zeros(0, 3, dtype=torch.long)}


@pytest.mark.parametrize("member", [ONEVISION, *QWENS], ids=lambda member: member.name)
def test_a_video_without_frames_is_none(member):
    model, inputs, empty = member.model, member.batch("two_and_one"), no_frames(member)
    wanted = lvtp.hf.info(model, inputs, keep=3)
    assert lvtp.hf.info(model, inputs | empty, keep=3) == wanted
    with lvtp.hf.prune(model, keep=3) as pruning, torch.no_grad():
        logits = model(**inputs).logits
        kept = pruning.last.kept
        assert torch.equal(model(**inputs, **empty).logits, logits)
        assert torch.equal(pruning.last.kept, kept)
    text = member.tiny.batch(model, [9])
    assert lvtp.hf.prepare(model, text | empty, keep=3).keys() == (text | empty).keys()
    assert lvtp.hf.info(model, text | empty, keep=3).images == ()
    inputs["input_ids"][0, -1] = model.config.video_token_id
    for call in (lvtp.hf.prepare, lvtp.hf.info):
        with pytest.raises(ValueError, match="each of the 0 video tokens of 0 videos, got 1"):
            call(model, inputs | empty, keep=3)
