"""`keep` as a budget for a request, and `method` as a selector of the caller's own."""

import pytest
import torch

import lvtp.hf

from .members import INTERNVL, LLAVA, NEXT, ONEVISION
from .oracle import relative_error

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
