"""Crops, newlines, pooled frames and tiles: what the shared tests do not ask."""

import pytest
import torch

import lvtp.hf
from lvtp.hf.internvl import InternVL
from lvtp.hf.llava_next import LlavaNext
from lvtp.hf.llava_onevision import LlavaOnevision

from . import tiny_anyres, tiny_internvl
from .members import INTERNVL, NEXT, ONEVISION
from .oracle import eager_attention
from .tiny import IMAGE_TOKEN

ANYRES = pytest.mark.parametrize("member", [NEXT, ONEVISION], ids=lambda member: member.name)


def family(member):
    return LlavaNext() if member is NEXT else LlavaOnevision()


def shaped(member, *shapes):
    """The call of one prompt with images of these shapes."""
    return tiny_anyres.batch(member.model, [2, *shapes, 3])


# ------------------------------------------------------------------------------------------------------- crops, rows


@ANYRES
@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize(("shape", "crops"), [("tall", 3), ("wide", 3), ("square", 5)])
def test_per_crop_mode_of_the_papers(member, k, shape, crops):
    """5 crops x 32, 64 or 128 at full size: as many tokens a crop, and nothing else of the image."""
    if member is ONEVISION and k * crops > tiny_anyres.placeholders(member.model, shape)[1]:
        return
    inputs = shaped(member, shape)
    with torch.no_grad(), lvtp.hf.prune(member.model, keep=k, scope="crop") as pruning:
        logits = member.model(**inputs).logits
    assert logits.shape[1] == 2 + k * crops + 3
    assert pruning.last.counts == (k,) * crops
    oracle = member.assemble(inputs, k, scope="crop")
    assert pruning.last.kept[0].nonzero().flatten().tolist() == oracle.kept[0]
    assert oracle.kept[0][: 2 + k * crops] == list(range(2 + k * crops))


@ANYRES
def test_crops_keep_tokens_that_unpadding_drops(member):
    """The picture was padded on the left and right: what the selector finds there stays."""
    inputs = shaped(member, "tall")
    corner = torch.zeros(16)
    corner[0] = 1  # of every crop: padding

    def score(features):
        return corner.expand(features.shape[:2])

    prepared = lvtp.hf.prepare(member.model, inputs, keep=1, scope="crop", score=score)
    tokens = torch.cat(list(prepared["mm_encoder_outputs"]["image"].pooler_output))
    _, _, projected = tiny_anyres.seen(member.model, inputs["pixel_values"][0, :3])
    torch.testing.assert_close(tokens, projected[:, 0])


@ANYRES
def test_more_tokens_of_crops_than_the_image_has_places_raise(member):
    inputs = shaped(member, "tall")  # 3 crops of 16 tokens, 40 placeholders
    assert lvtp.hf.prepare(member.model, inputs, keep=13, scope="crop")["input_ids"].shape[1] == 5 + 39
    for call in (lvtp.hf.prepare, lvtp.hf.info):
        with pytest.raises(ValueError, match=r"keep must leave at most the 40 tokens .* got 42 over all its crops"):
            call(member.model, inputs, keep=14, scope="crop")
    assert torch.equal(
        lvtp.hf.prepare(member.model, inputs, keep=16, scope="crop")["input_ids"], inputs["input_ids"]
    )  # fmt: skip


@ANYRES
@pytest.mark.parametrize("dynamic", [True, False])
def test_budgets_of_more_tokens_of_crops_than_there_are_places_raise(member, dynamic):
    inputs = shaped(member, "tall")  # 3 crops of 16 tokens, 40 placeholders
    known = lvtp.hf.info(member.model, inputs, keep=lvtp.Budget(40, dynamic), scope="crop")
    assert known.prompt_tokens == ((5 + 40, 5 + 40),)
    for call in (lvtp.hf.prepare, lvtp.hf.info):
        with pytest.raises(ValueError, match=r"keep must leave at most the 40 tokens .* got 4[1-7] over all its crops"):
            call(member.model, inputs, keep=lvtp.Budget(41, dynamic), scope="crop")
        assert call(member.model, inputs, keep=lvtp.Budget(48, dynamic), scope="crop")  # all of them
        with pytest.raises(ValueError, match=r"total must be at least 1 for each of the 3 images .*, got 2"):
            call(member.model, inputs, keep=lvtp.Budget(2, dynamic), scope="crop")


@ANYRES
def test_newlines_stay_with_their_rows(member):
    """keep=1 with all importance on one token: what is left is that token and the newline after its row."""
    inputs = shaped(member, "wide")  # 16 of the overview, then 2 rows of 8 and a newline
    for token, left in ((3, [3]), (16, [16, 24]), (23, [23, 24]), (24, [25, 33])):

        def scores(features, scores, k, token=token):
            assert features.shape[1] == 32
            return torch.full((1, 1), token)

        with torch.no_grad(), lvtp.hf.prune(member.model, scores, 1) as pruning:
            member.model(**inputs)
        assert (pruning.last.kept[0].nonzero().flatten() - 2).tolist() == [-2, -1, *left, 34, 35, 36]
        for newline, expected in (("drop", left[:1]), ("all", sorted({left[0], 24, 33}))):
            with torch.no_grad(), lvtp.hf.prune(member.model, scores, 1, newline=newline) as pruning:
                member.model(**inputs)
            assert (pruning.last.kept[0].nonzero().flatten() - 2).tolist() == [-2, -1, *expected, 34, 35, 36]


@ANYRES
def test_image_sizes_are_asked_for_by_name(member):
    inputs = shaped(member, "wide")
    del inputs["image_sizes"]
    for call in (lvtp.hf.prepare, lvtp.hf.info):
        with pytest.raises(ValueError, match="image_sizes must be given beside pixel_values, got none"):
            call(member.model, inputs, keep=3)


@ANYRES
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"newline": "rows"}, "newline must be 'drop' with scope='crop'"),
        ({"newline": "all"}, "newline must be 'drop' with scope='crop'"),
        ({"positions": "original"}, "positions must be 'compact' with scope='crop'"),
        ({"score": "prompt"}, "score='prompt' needs scope='image'"),
    ],
    ids=str,
)
def test_what_crops_cannot_do_raises(member, options, message):
    with pytest.raises(ValueError, match=message):
        lvtp.hf.patch(member.model, scope="crop", **options)
    lvtp.hf.patch(member.model, scope="crop", newline="drop").remove()


# Height and width; then, at full size, what the processors of transformers 5.19 and 5.23 give an image: placeholders,
# and how many of them are newlines.
TRUE_SIZES = [
    ((480, 640), (2340, 36), (2929, 40)),
    ((336, 336), (1176, 24), (1485, 27)),
    ((1000, 200), (1656, 72), (2187, 81)),
    ((672, 672), (2928, 48), (3699, 54)),
    ((333, 1007), (2328, 24), (2943, 27)),
    ((77, 500), (968, 8), (1224, 9)),
    ((1500, 1501), (2928, 48), (7371, 81)),  # shrunk by OneVision
]


@ANYRES
def test_sizes_at_full_size(member):
    text = {"model_type": "llama", "num_hidden_layers": 1}
    column = 1 if member is NEXT else 2
    with torch.device("meta"):
        model = type(member.model)(type(member.model.config)(text_config=text))
    arguments = {"image_sizes": torch.tensor([size[0] for size in TRUE_SIZES])}
    sizes = family(member).sizes(model, "image", arguments, "image")
    assert [(size.placeholders, size.placeholders - sum(size.units)) for size in sizes] == [
        size[column] for size in TRUE_SIZES
    ]
    crops = family(member).sizes(model, "image", arguments, "crop")
    assert {tokens for size in crops for tokens in size.units} == {576 if member is NEXT else 729}


# --------------------------------------------------------------------------------------------- OneVision: shrunk, video


def test_the_shrunk_branch_is_taken():
    """Without it, the square image of the shared tests would have 8 rows and not 5."""
    sizes = lvtp.hf.info(ONEVISION.model, shaped(ONEVISION, "square", "wide"), keep=3).images
    assert [image.placeholders for image in sizes] == [16 + 5 * 6, 16 + 2 * 9]
    features, _, _ = tiny_anyres.seen(ONEVISION.model, shaped(ONEVISION, "square")["pixel_values"][0])
    seen = []
    lvtp.hf.prepare(
        ONEVISION.model, shaped(ONEVISION, "square"), keep=3,
        method=lambda features, scores, k: seen.append(features) or scores.topk(k).indices,
    )  # fmt: skip
    shrunk = tiny_anyres.grid(ONEVISION.model, features, "square").flatten(0, 1)
    torch.testing.assert_close(seen[0][0], torch.cat([features[0], shrunk]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"newline": "drop"}, {"newline": "all"}, {"scope": "crop"}], ids=str)
def test_several_images_in_a_prompt_are_not_cut(options):
    """`batch_num_images`: two images of one prompt are a single crop and a newline each."""
    model = ONEVISION.model
    ids = torch.tensor([[5, 6, *[IMAGE_TOKEN] * 17, 7, *[IMAGE_TOKEN] * 17, 8]])
    pixels = torch.randn(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
        "image_sizes": torch.tensor([[32, 8], [10, 32]]), "batch_num_images": torch.tensor([2]),
    }  # fmt: skip
    wanted = model(**inputs).logits
    with lvtp.hf.prune(model, keep=16, **options):
        assert torch.equal(model(**inputs).logits, wanted)
    with torch.no_grad(), lvtp.hf.prune(model, keep=3, **options) as pruning:
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=2)
    newlines = 0 if options.get("newline") == "drop" or "scope" in options else 2
    assert logits.shape[1] == 4 + 2 * 3 + newlines
    assert tokens.shape[1] == ids.shape[1] + 2
    assert pruning.last.counts == (3, 3)
    assert lvtp.hf.info(model, inputs, keep=3, **options).prompt_tokens == ((38, logits.shape[1]),)


def test_a_frame_has_a_budget_of_its_own():
    inputs = tiny_anyres.batch(ONEVISION.model, [2, "video", 1, "video", 3])
    for scope, counts in (("frame", (2,) * 6), ("image", (2, 2)), ("crop", (2, 2))):
        with torch.no_grad(), lvtp.hf.prune(ONEVISION.model, keep=2, scope=scope) as pruning:
            ONEVISION.model(**inputs)
        assert pruning.last.counts == counts
        oracle = ONEVISION.assemble(inputs, 2, scope=scope)
        assert pruning.last.kept[0].nonzero().flatten().tolist() == oracle.kept[0]


# -------------------------------------------------------------------------------------------- importance, measured


def encoded(of, model, pixels, score="auto", **arguments):
    return torch.stack(of.encode(model, "image", {"pixel_values": pixels, **arguments}, score, "crop").importance)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_internvl_scores_equal_eager_attention(norms, layer):
    model = tiny_internvl.build(use_qk_norm=norms)
    pixels = tiny_internvl.batch(model, [1, (2,)])["pixel_values"]
    at = 0 if layer == 1 else layer
    got = encoded(InternVL(), model, pixels, vision_feature_layer=layer)
    torch.testing.assert_close(got, tiny_internvl.importance(model, pixels, at), rtol=1e-5, atol=1e-6)
    received = eager_attention(model, pixels, at).mean((1, 2))[:, 1:, None]
    wanted = torch.stack([tiny_internvl.blocks(tile)[..., 0].mean(1) for tile in received])
    got = encoded(InternVL(), model, pixels, "received", vision_feature_layer=layer)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@ANYRES
def test_anyres_scores_equal_eager_attention(member):
    inputs = shaped(member, "square")
    pixels = inputs["pixel_values"]
    _, wanted, _ = tiny_anyres.seen(member.model, pixels[0])
    got = encoded(family(member), member.model, pixels, image_sizes=inputs["image_sizes"])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    if member is NEXT:
        received = eager_attention(member.model, pixels[0], -2).mean((1, 2))[:, 1:]
        got = encoded(family(member), member.model, pixels, "received", image_sizes=inputs["image_sizes"])
        torch.testing.assert_close(got, received, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------ one tensor, several sizes


def test_tiles_that_keep_as_many_are_one_tensor():
    prepared = lvtp.hf.prepare(INTERNVL.model, INTERNVL.batch("ragged"), keep=3)
    assert prepared["mm_encoder_outputs"]["image"].pooler_output.shape == (6, 3, 32)
    prepared = lvtp.hf.prepare(INTERNVL.model, INTERNVL.batch("ragged"), keep=lvtp.Budget(20))
    assert prepared["mm_encoder_outputs"]["image"].pooler_output.shape == (40, 1, 32)


@pytest.mark.parametrize("scope", ["image", "crop", "frame"])
def test_a_tile_is_a_unit_in_every_scope(scope):
    with torch.no_grad(), lvtp.hf.prune(INTERNVL.model, keep=3, scope=scope) as pruning:
        INTERNVL.model(**INTERNVL.batch("single"))
    assert pruning.last.counts == (3, 3, 3)
    assert pruning.last.scope == scope
