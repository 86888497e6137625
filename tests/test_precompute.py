"""examples/precompute.py: killed ten times, resumed on two ranks, and the output is that of an undisturbed run."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
EXAMPLE = Path(__file__).parents[1] / "examples" / "precompute.py"
IMAGES, KILLS, KEEP = 200, 10, 4

# Forked from a process that has imported everything, a run starts at once. Each is killed after a random number of new
# files and a random moment more; one that gets through before that loses a shard and does not count.
KILLER = """
import os, random, runpy, signal, sys, time
main = runpy.run_path(sys.argv[1])["main"]
whole, killed, arguments = sys.argv[2], sys.argv[3], sys.argv[4:]
os.mkdir(killed)

def fork(out):
    pid = os.fork()
    if pid == 0:
        main([*arguments, out])
        os._exit(0)
    return pid

assert os.waitpid(fork(whole), 0)[1] == 0
random.seed(0)
kills = 0
while kills < int(os.environ["KILLS"]):
    pid, files = fork(killed), len(os.listdir(killed)) + random.randrange(4)
    while not (ended := os.waitpid(pid, os.WNOHANG)[0]) and len(os.listdir(killed)) < files:
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.02))
    if not ended:
        os.kill(pid, signal.SIGKILL)
        ended = not os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    if ended:
        os.remove(os.path.join(killed, "shard-00000.safetensors"))
    kills += not ended
print(sum(name.endswith("safetensors") for name in os.listdir(killed)))
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
    subprocess.run(killer, check=True, env={**os.environ, "KILLS": str(KILLS)})
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
