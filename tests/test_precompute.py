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
