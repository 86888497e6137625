"""examples/precompute.py: killed ten times, alone and under torchrun, and the output is that of an undisturbed run."""

import json
import os
import random
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds a process's children in /proc")
EXAMPLE = Path(__file__).parents[1] / "examples" / "precompute.py"
IMAGES, KILLS, KEEP = 200, 10, 4

# Forked from a process that has imported everything, a run starts at once: half of them alone, half as two ranks under
# the agent that torchrun is, and the last is torchrun itself. Each is killed, and whoever it started, after a random
# number of new files and a random moment more; one that gets through before that loses a shard and does not count.
KILLER = """
import os, random, runpy, signal, subprocess, sys, time
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

main = runpy.run_path(sys.argv[1])["main"]
whole, killed, arguments = sys.argv[2], sys.argv[3], sys.argv[4:]
os.mkdir(killed)
AGENT = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="killed", start_method="fork", max_restarts=0)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", sys.argv[1]]

def start(way, out):
    if way == "torchrun":
        return subprocess.Popen([*TORCHRUN, *arguments, out], stderr=subprocess.DEVNULL).pid
    pid = os.fork()
    if pid == 0:
        if way == "agent":
            elastic_launch(LaunchConfig(1, 1, 2, **AGENT), main)([*arguments, out])
        else:
            main([*arguments, out])
        os._exit(0)
    return pid

def family(pid):
    children = open(f"/proc/{pid}/task/{pid}/children").read().split()
    return [pid, *(one for child in children for one in family(int(child)))]

assert os.waitpid(start("alone", whole), 0)[1] == 0
random.seed(0)
kills, ways = 0, ["alone", "agent"] * (int(os.environ["KILLS"]) // 2)
ways[-1] = "torchrun"
while kills < len(ways):
    new = random.randrange(4) if ways[kills] != "torchrun" else random.randrange(1, 4)  # its imports alone take seconds
    pid, files = start(ways[kills], killed), len(os.listdir(killed)) + new
    ended, status = 0, 0
    while not ended and len(os.listdir(killed)) < files:
        time.sleep(0.001)
        ended, status = os.waitpid(pid, os.WNOHANG)
    time.sleep(random.uniform(0, 0.02))
    if not ended:
        os.kill(pid, signal.SIGSTOP)  # it starts no more
        for one in reversed(family(pid)):
            os.kill(one, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        kills += 1
    else:
        assert status == 0, (ways[kills], status)
        os.remove(os.path.join(killed, "shard-00000.safetensors"))
print(kills)
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A tiny CLIP tower and a folder of images, two of them broken."""
    from PIL import Image
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("precompute")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder / "model")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "model"
    )
    (folder / "images" / "more").mkdir(parents=True)
    for i in range(IMAGES):
        pixels = random.Random(i).randbytes(40 * 36 * 3)
        Image.frombytes("RGB", (40, 36), pixels).save(folder / "images" / ("more" if i % 2 else "") / f"{i:03}.png")
    whole = (folder / "images" / "004.png").read_bytes()
    (folder / "images" / "004.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "010.jpg").write_text("not an image")
    options = ["--model", folder / "model", "--keep", KEEP, "--batch", "4", "--shard", "7", "--workers", "0"]
    return [*map(str, options), str(folder / "images")]


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_ten_times_and_resumed_on_two_ranks_the_output_is_that_of_one_run(arguments, tmp_path):
    from safetensors.torch import load_file

    killer = [sys.executable, "-c", KILLER, EXAMPLE, tmp_path / "whole", tmp_path / "killed", *arguments]
    environment = {**os.environ, "KILLS": str(KILLS), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run(killer, check=True, env=environment)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, EXAMPLE, *arguments, tmp_path / "killed"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")

    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert set(manifest["skipped"]) == {"004.png", "010.jpg"}
    assert sum(map(len, manifest["shards"].values())) == IMAGES - 1
    for file, names in manifest["shards"].items():
        shard = load_file(tmp_path / "whole" / file)
        assert shard["tokens"].shape == (len(names), KEEP, 32)
        assert shard["indices"].shape == (len(names), KEEP)


def test_ranks_left_over_from_a_killed_torchrun_may_write_the_same_shards(tmp_path):
    write, file, content = runpy.run_path(str(EXAMPLE))["write"], tmp_path / "shard", os.urandom(1 << 20)
    write(file, content)
    with ThreadPoolExecutor(4) as ranks:
        writes = [ranks.submit(write, file, content) for _ in range(100)]
        while not all(w.done() for w in writes):
            assert file.read_bytes() == content
        [w.result() for w in writes]
    assert list(tmp_path.iterdir()) == [file]


def saved(path: Path, array, orientation: int | None = None) -> None:
    from PIL import Image

    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(array).save(path, exif=exif)


def test_every_kind_of_file_is_read_as_a_viewer_shows_it_or_skipped_with_the_reason(arguments, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    numpy = pytest.importorskip("numpy")
    rng, images, out = numpy.random.default_rng(0), tmp_path / "images", tmp_path / "out"
    (images / "closed").mkdir(parents=True)
    rgb = rng.integers(0, 256, (48, 40, 3), dtype=numpy.uint8)
    saved(images / "upright.png", rgb)
    saved(images / "turned.png", numpy.rot90(rgb), orientation=6)  # to be turned clockwise by a viewer
    grey = rng.integers(0, 256, (40, 40), dtype=numpy.uint8)
    saved(images / "grey8.png", grey)
    saved(images / "grey16.png", grey.astype(numpy.uint16) * 257)
    saved(images / "grey32.tif", grey.astype(numpy.float32))
    saved(images / os.fsdecode(b"caf\xe9.png"), grey)
    os.mkfifo(images / "pipe.png")
    (images / "gone.png").symlink_to(tmp_path / "nowhere")
    (images / "elsewhere").symlink_to(tmp_path)
    scandir = os.scandir

    def refuse(path):  # the tests may run as a user for whom no folder is closed
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    runpy.run_path(str(EXAMPLE))["main"]([*arguments[:-1], str(images), str(out)])

    manifest = json.loads((out / "manifest.json").read_text())
    names = [name for shard in manifest["shards"].values() for name in shard]
    assert names == sorted(["upright.png", "turned.png", "grey8.png", "grey16.png", os.fsdecode(b"caf\xe9.png")])
    tokens = dict(zip(names, [t for f in manifest["shards"] for t in load_file(out / f)["tokens"]], strict=True))
    assert (tokens["turned.png"] == tokens["upright.png"]).all()
    assert (tokens["grey16.png"] == tokens["grey8.png"]).all()
    skipped = manifest["skipped"]
    assert set(skipped) == {"closed/", "elsewhere/", "gone.png", "grey32.tif", "pipe.png"}
    assert "Permission denied" in skipped["closed/"]
    assert "link to a folder" in skipped["elsewhere/"]
    assert "No such file" in skipped["gone.png"]
    assert "32-bit grey" in skipped["grey32.tif"]
    assert "not a regular file" in skipped["pipe.png"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--batch", "0"], "--batch: must be at least 1, got 0"),
        (["--keep", "-1"], "--keep: must be at least 1, got -1"),
        (["--shard", "0"], "--shard: must be at least 1, got 0"),
        (["--workers", "-1"], "--workers: must be at least 0, got -1"),
        (["--batch", "few"], "--batch: invalid integer value: 'few'"),
        (["--keep", "17"], "--keep must be at most 16, the tokens of an image"),
    ],
)
def test_options_out_of_range_are_named(arguments, tmp_path, capsys, option, message):
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLE))["main"]([*arguments, str(tmp_path / "out"), *option])
    assert message in (capsys.readouterr().err if stopped.value.code == 2 else stopped.value.code)


def test_folders_that_cannot_be_used_are_named(arguments, tmp_path):
    main, absent, file = runpy.run_path(str(EXAMPLE))["main"], tmp_path / "absent", tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit, match="absent cannot be read: FileNotFoundError: No such file"):
        main([*arguments[:-1], str(absent), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="file cannot be written to: "):
        main([*arguments, str(file)])
