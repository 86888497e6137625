"""The demonstration: its descriptors, its picture, its numbers, and what the command says when something is missing."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import lvtp
from lvtp import cli

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("lvtp.hf", exc_type=ImportError)  # which wants a transformers that is new enough

from lvtp.demo import descriptors, loops, measure, model, photo, picture, run, table  # noqa: E402

N = model.VISUAL_TOKENS


def patchwork(tiles):
    """[3, 336, 336] of [3, 14, 14] tiles, one a patch: `tiles` maps (row, column) to a tile."""
    rows = [torch.cat([tiles(r, c) for c in range(photo.GRID)], 2) for r in range(photo.GRID)]
    return torch.cat(rows, 1)


# ----------------------------------------------------------------------------------------------------- photograph


def test_the_sample_photo_is_installed_with_matplotlib():
    assert photo.sample_photo().is_file()
    assert photo.crop(photo.load(photo.sample_photo())).size == (336, 336)


def test_crop_takes_the_middle_and_load_follows_exif(tmp_path):
    image = Image.new("RGB", (1200, 400), "blue")
    image.paste((255, 0, 0), (400, 0, 800, 400))
    assert np.asarray(photo.crop(image)).mean((0, 1)) == pytest.approx([255, 0, 0], abs=1)

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    image.save(tmp_path / "turned.png", exif=exif)
    assert photo.load(tmp_path / "turned.png").size == (400, 1200)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sixteen_bit_grey_is_scaled_to_eight(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp = np.linspace(0, 65535, 40 * 30).reshape(40, 30).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "16.png", exif=exif)
    Image.fromarray((ramp / 257).round().astype(np.uint8)).save(tmp_path / "8.png", exif=exif)
    assert np.array_equal(photo.load(tmp_path / "16.png"), photo.load(tmp_path / "8.png"))


def test_sixteen_bit_grey_of_other_formats(tmp_path):
    values = np.array([[0, 257, 65535]], np.uint16)
    (tmp_path / "g.pgm").write_bytes(b"P5 3 1 65535\n" + values.astype(">u2").tobytes())
    Image.fromarray(values).save(tmp_path / "g.tif")
    for name in ("g.pgm", "g.tif"):
        assert np.asarray(photo.load(tmp_path / name))[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_of_unknown_white_is_refused(tmp_path, dtype):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "g.tif")
    with pytest.raises(OSError, match="32-bit grey"):
        photo.load(tmp_path / "g.tif")


def test_normalise_is_clips():
    mean = torch.tensor(photo.CLIP_MEAN).view(3, 1, 1).expand(3, 2, 2)
    assert photo.normalise(mean).abs().max() == 0
    assert photo.normalise(torch.ones(3, 1, 1)).flatten().tolist() == pytest.approx([1.9303, 2.0749, 2.1459], abs=1e-4)


# ---------------------------------------------------------------------------------------------------- descriptors


def test_lab_of_known_colours():
    rgb = torch.tensor([[1.0, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 1]]).view(3, 1, 4)  # white, black, red, blue
    lab = descriptors.rgb_to_lab(rgb).flatten(1).T
    published = torch.tensor([[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]])
    assert (lab - published).abs().max() < 0.1


def test_dct_is_orthonormal_and_compacts_a_constant():
    c = descriptors.dct_matrix(14)
    assert torch.allclose(c @ c.T, torch.eye(14), atol=1e-5)
    assert (c @ torch.ones(14))[1:].abs().max() < 1e-5


def test_descriptors_tell_flat_from_textured_and_colours_apart():
    stripes = torch.zeros(3, 14, 14)
    stripes[:, :, ::4] = 1
    flat, red = torch.full((3, 14, 14), 0.25), torch.tensor([0.8, 0.1, 0.1]).view(3, 1, 1).expand(3, 14, 14)
    kinds = [flat, stripes, red]
    features = descriptors.patch_descriptors(patchwork(lambda r, c: kinds[(r + c) % 3]))
    similarity = lvtp.cosine_similarity(features)[0]
    kind = (torch.arange(N) // photo.GRID + torch.arange(N) % photo.GRID) % 3
    same = kind[:, None] == kind
    assert similarity[same].min() > 0.99
    assert similarity[~same].max() < 0.6


def test_descriptors_hardly_move_with_a_shifted_texture():
    """Otherwise stripes of one kind would count as diverse. A plain spectrum with signs gives a similarity below 0."""
    stripes = torch.zeros(3, 14, 14)
    stripes[:, :, :7] = 1
    flat = torch.full((3, 14, 14), 0.5)
    kinds = [stripes, stripes.flip(2), flat, flat]
    features = descriptors.patch_descriptors(patchwork(lambda r, c: kinds[c % 4]))
    similarity = lvtp.cosine_similarity(features)[0]
    assert similarity[0, 1] > 0.9 > 0.0 > similarity[0, 2]


@pytest.mark.parametrize(("row", "column"), [(5, 5), (12, 17), (20, 9)])
def test_saliency_peaks_on_a_planted_object(row, column):
    rgb = 0.4 + 0.05 * torch.rand(3, 336, 336, generator=torch.Generator().manual_seed(0))
    y, x = row * photo.PATCH, column * photo.PATCH
    rgb[:, y : y + 28, x : x + 28] = torch.tensor([0.9, 0.2, 0.1]).view(3, 1, 1)
    importance = descriptors.saliency(rgb)[0]
    planted = {r * photo.GRID + c for r in (row, row + 1) for c in (column, column + 1)}
    assert set(importance.topk(4).indices.tolist()) == planted
    assert importance.min() >= 0
    assert importance.max() <= 1


def test_a_flat_photograph_has_no_saliency_and_still_gives_picks():
    rgb = torch.full((3, 336, 336), 0.5)
    importance = descriptors.saliency(rgb)
    assert importance.isfinite().all()
    for picks in run.select(descriptors.patch_descriptors(rgb), importance).values():
        assert len(set(picks.tolist())) == len(picks)


# ---------------------------------------------------------------------------------------------------------- loops


@pytest.fixture(scope="module")
def portrait():
    """(photograph, features [1, 576, 54], importance [1, 576])"""
    image = photo.crop(photo.load(photo.sample_photo()))
    rgb = photo.to_tensor(image)
    return image, descriptors.patch_descriptors(rgb), descriptors.saliency(rgb)


@pytest.mark.parametrize("k", [16, 64, 130])
def test_the_plain_loops_compute_what_lvtp_computes(portrait, k):
    """What is timed against must be the same work."""
    _, features, importance = portrait
    assert (
        loops.id_selection_loop(features[0], importance[0], k) == lvtp.id_selection(features, importance, k)[0].tolist()
    )
    assert loops.prune_sid_loop(features[0], importance[0], k) == lvtp.prune_sid(features, importance, k)[0].tolist()


# -------------------------------------------------------------------------------------------------------- picture


def test_the_panels_show_the_picks(tmp_path):
    """Read back from the PNG: a cell is in colour exactly where its patch was picked."""
    colours = torch.rand(3, photo.GRID, photo.GRID, generator=torch.Generator().manual_seed(1))
    colours[0], colours[1] = 1.0, 0.1  # never grey
    rgb = colours.repeat_interleave(photo.PATCH, 1).repeat_interleave(photo.PATCH, 2)
    image = Image.fromarray((rgb.permute(1, 2, 0) * 255).byte().numpy())
    picks = run.draw(tmp_path / "p.png", image, descriptors.patch_descriptors(rgb), descriptors.saliency(rgb), "a test")
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(int)
    for row, method in enumerate(run.METHODS):
        for column, k in enumerate(run.BUDGETS, 1):
            left, top = picture.panel_origin(row, column)
            middle = slice(picture.CELL // 2, None, picture.CELL)
            cells = pixels[top : top + picture.SIDE, left : left + picture.SIDE][middle, middle]
            shown = (np.ptp(cells, axis=-1) > 60).flatten().nonzero()[0]
            assert shown.tolist() == sorted(picks[method, k].tolist())
            assert len(shown) == k


def test_groups_and_order_colour_the_frames():
    picks = torch.tensor([3, 9, 4])
    labels = torch.zeros(N, dtype=torch.int64)
    labels[9] = 1
    by_group = picture.group_panel("", picks, labels).colours
    assert by_group[0] == by_group[2] != by_group[1]
    assert len(set(picture.order_panel("", picks).colours)) == 3


def test_numbers_hide_neither_patches_nor_each_other():
    block = [r * photo.GRID + c for r in range(4) for c in range(4)]  # in the corner, where there is least room
    spread = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:16].tolist()
    for tokens in (spread, block[::2]):
        cells = picture.number_cells(tokens)
        assert len(set(cells)) == len(tokens)
        assert not set(cells) & {divmod(t, photo.GRID) for t in tokens}
        assert all(0 <= y < photo.GRID and 0 <= x < photo.GRID for y, x in cells)
    assert picture.number_cells(block)[0] == (0, 0)  # no free cell beside it: on the patch itself


# -------------------------------------------------------------------------------------------------------- numbers


def test_flops_are_those_of_llava_7b():
    """The closed form of a LLaMA prefill, logits of the last token: 2 FLOPs a multiply-add."""
    n, layers, hidden, mlp, vocabulary = 47, 32, 4096, 11008, 32064
    weights = 4 * hidden**2 + 3 * hidden * mlp
    expected = layers * (2 * n * weights + 4 * n**2 * hidden) + 2 * hidden * vocabulary
    assert measure.prefill_flops(measure.LLAVA_7B_TEXT, n) == expected


def test_flops_removed_fall_with_the_budget():
    removed = measure.flops_removed(measure.LLAVA_7B_TEXT, 47, N, [576, 192, 64, 16, 0])
    assert list(removed.values()) == sorted(removed.values())
    assert removed[576] == 0
    assert removed[0] == 1
    assert removed[16] > 0.97


def test_variants_are_interleaved_and_warm_up_is_left_out():
    calls = []
    times = measure.median_times({name: lambda name=name: calls.append(name) for name in "ab"}, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * (measure.WARM_UP + 3)
    assert all(t > 0 for t in times.values())


def test_serving_backend_is_the_first_that_does_not_refuse():
    def refused_by(*backends):
        def call():
            if lvtp.ops._backend.get() in backends:
                raise RuntimeError("refused")

        return call

    assert measure.serving_backend(refused_by()) == "native"
    assert measure.serving_backend(refused_by("native", "triton")) == "reference"


def test_table_aligns_and_refers_to_its_notes():
    rows = [
        table.Row("ID-Selection", 64, 0.0005, 0.004, 0.15, 0.03, 0.891),
        table.Row("PruneSID", 16, 0.016, 0.020, 0.15, 0.02, 0.9728),
    ]
    lines = table.render(rows, ["first " * 30, "second"], "a machine").splitlines()
    assert re.split(r"\s{2,}", lines[3]) == [
        "ID-Selection", "64", "0.500 ms", "4.00 ms", "8.0x", "150 ms", "30.0 ms", "89.1%",
    ]  # fmt: skip
    assert re.split(r"\s{2,}", lines[4])[-1] == "97.3%"
    assert len({len(line) for line in lines[:5]}) == 1
    assert max(map(len, lines)) <= table.NOTE_WIDTH
    assert lines[-1] == "Machine: a machine."
    assert [line[:3] for line in lines if line.startswith("[")] == ["[1]", "[2]"]


def test_the_machine_is_named():
    text = measure.machine(torch.device("cpu"))
    assert f"torch {torch.__version__}" in text
    assert re.search(r"\d+ threads, .*\d{4}-\d\d-\d\d \d\d:\d\d", text)
    assert not text.startswith(",")


# ---------------------------------------------------------------------------------------------------------- model


@pytest.fixture(scope="module")
def subject(portrait):
    return model.untrained_subject(portrait[0])


def test_the_untrained_model_has_llavas_token_geometry(subject):
    features, importance = run.tower_tokens(subject)
    assert features.shape == (1, 576, 1024)
    assert importance.shape == (1, 576)
    assert (subject.inputs["input_ids"] == subject.model.config.image_token_id).sum() == N
    assert "untrained" in subject.name
    assert "no meaning" in subject.decode(torch.tensor([5]))


def test_the_untrained_model_is_seeded_and_leaves_the_generator_alone(subject):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = model.untrained()
    assert torch.equal(before, torch.get_rng_state())
    weight = "model.language_model.layers.3.mlp.up_proj.weight"
    assert torch.equal(again.state_dict()[weight], subject.model.state_dict()[weight].cpu())


@pytest.mark.parametrize("method", list(run.METHODS))
def test_the_model_keeps_the_tokens_that_the_picture_shows(subject, method):
    with torch.inference_mode():
        picks = run.select(*run.tower_tokens(subject))
        with lvtp.hf.prune(subject.model, method=method, keep=16) as pruning:
            subject.model.generate(**subject.inputs, max_new_tokens=1, do_sample=False)
    assert pruning.last.indices[0].tolist() == sorted(picks[method, 16].tolist())


# -------------------------------------------------------------------------------------------------------- command


def demo(*arguments):
    return cli.main(["demo", *map(str, arguments)])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run, "SELECTION_ROUNDS", 1)
    monkeypatch.setattr(run, "PREFILL_ROUNDS", 1)
    monkeypatch.setattr(measure, "WARM_UP", 0)


def test_demo_without_arguments_writes_pictures_and_a_table(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert demo() == 0
    out = tmp_path / "out" / "demo"
    for name in ("descriptors.png", "tower.png"):
        assert Image.open(out / name).width > 3 * 336
    text = (out / "table.txt").read_text()
    assert len(re.findall(r"^(?:ID-Selection|PruneSID) +(?:64|16)(?: +[\d.]+ ms){2} .*%$", text, re.M)) == 4
    shares = [float(s) for s in re.findall(r"(\d+\.\d)%$", text, re.M)]
    assert len(shares) == 4
    assert max(shares) > 97
    printed = capsys.readouterr().out
    assert text.strip() in printed
    assert "untrained" in text
    assert printed.rstrip().splitlines()[-2].endswith("descriptors.png")
    assert printed.rstrip().splitlines()[-1].endswith("tower.png")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A LLaVA of true token geometry and nothing else, saved as transformers saves one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("checkpoint")
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "photograph", "woman", "hat"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            additional_special_tokens=["<image>"],
        ),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=336, patch_size=14),
        text_config=LlamaConfig(**small, vocab_size=len(words)),
        image_token_id=words.index("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def copied(checkpoint, folder, **changes):
    """The checkpoint with keys of config.json changed."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_demo_runs_a_checkpoint_and_prints_its_words(quick, checkpoint, tmp_path, capsys):
    assert demo("--model", checkpoint, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    answers = re.findall(r"^- generate, .*: '(.*)'$", printed, re.M)
    assert len(answers) == 5
    assert set(" ".join(answers).split()) <= {"photograph", "woman", "hat"}
    assert str(checkpoint) in (tmp_path / "table.txt").read_text()
    assert "untrained" not in printed


def refused(capsys, *arguments):
    """The message of a demo that cannot run: one paragraph on stderr, exit code 2, no traceback."""
    assert demo(*arguments) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("lvtp: ")
    return message


def test_a_photograph_that_is_none(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    assert "notes.txt is not a photograph" in refused(capsys, tmp_path / "notes.txt")
    assert "absent.jpg" in refused(capsys, tmp_path / "absent.jpg")
    assert "not a regular file" in refused(capsys, os.devnull)


def test_an_output_folder_that_cannot_be_written_to_is_refused_before_the_model_is_built(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_subject", lambda *_: pytest.fail("built a model"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "tower.png").mkdir(parents=True)
    for out in ("file", "folder"):
        assert f"--out {tmp_path / out} cannot be written to" in refused(capsys, "--out", tmp_path / out)

    def full(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(run.tempfile, "TemporaryFile", full)
    assert "Permission denied" in refused(capsys, "--out", tmp_path / "closed")


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems take text alone")
def test_names_that_are_not_utf_8(quick, capsys, tmp_path, checkpoint):
    name = os.fsdecode(b"caf\xe9")
    assert "caf\\udce9 is not a photograph" in refused(capsys, tmp_path / name)
    shown, folder = tmp_path / f"{name}.png", copied(checkpoint, tmp_path / f"model {name}")
    Image.new("RGB", (400, 400)).save(shown)
    assert demo(shown, "--model", checkpoint, "--out", tmp_path / f"out {name}") == 0
    assert "Photograph caf\\udce9.png" in capsys.readouterr().out
    assert (tmp_path / f"out {name}" / "table.txt").exists()
    assert "cannot be loaded" in refused(capsys, shown, "--model", folder, "--out", tmp_path / "out")


def test_a_checkpoint_that_cannot_be_had(capsys, tmp_path, monkeypatch):
    assert "is not a folder" in refused(capsys, "--model", tmp_path / "absent")
    assert "without --model" in refused(capsys, "--model", tmp_path)  # an empty folder
    # As without a network, but without waiting for its retries.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "llava-hf/no-such-checkpoint cannot be loaded" in refused(capsys, "--model", "llava-hf/no-such-checkpoint")


def test_a_checkpoint_that_is_not_llava(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert '"llama" checkpoint' in refused(capsys, "--model", tmp_path)


def test_weights_that_are_not_safetensors(capsys, tmp_path, checkpoint):
    """Pickled weights can run code when loaded; these are never opened."""
    folder = copied(checkpoint, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"would fail if it were read")
    assert "safetensors" in refused(capsys, "--model", folder)


def test_weights_that_are_incomplete(capsys, tmp_path, checkpoint):
    from safetensors.torch import load_file, save_file

    folder = copied(checkpoint, tmp_path / "incomplete")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "mlp.up_proj" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks weights" in refused(capsys, "--model", folder)


def test_remote_code_is_not_run(capsys, tmp_path, checkpoint):
    trap = tmp_path / "trapped" / "it_ran"
    folder = copied(
        checkpoint, tmp_path / "trapped", model_type="trap", auto_map={"AutoConfig": "configuration_trap.TrapConfig"}
    )
    (folder / "configuration_trap.py").write_text(f"open({str(trap)!r}, 'w')\nclass TrapConfig: pass\n")
    assert "cannot be loaded" in refused(capsys, "--model", folder)
    assert not trap.exists()


@pytest.mark.parametrize("package", ["matplotlib", "PIL"])
def test_a_missing_package_has_a_one_line_remedy(package):
    code = f"import sys; sys.modules[{package!r}] = None; from lvtp.cli import main; sys.exit(main(['demo']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f'lvtp: the demonstration needs {package}: pip install "lvtp[demo]"'


def test_importing_lvtp_needs_no_extra():
    code = "import sys, lvtp, lvtp.cli; print({'matplotlib', 'PIL', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_info_prints_the_build(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"version: {lvtp.__version__}" in printed
    assert re.search(r"^backends:\n(  \w+: .+\n)+", printed, re.M)


def test_a_reader_that_has_seen_enough_ends_it_without_a_traceback():
    read, write = os.pipe()
    os.close(read)
    info = subprocess.run([sys.executable, "-m", "lvtp", "info"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (info.returncode, info.stderr) == (141, "")


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([])
    assert error.value.code == 2
    assert "demo" in capsys.readouterr().err
