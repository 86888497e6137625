"""K visual tokens of every image in a folder, through a CLIP-like vision tower, on any number of processes.

    torchrun --nproc-per-node 8 examples/precompute.py --model openai/clip-vit-large-patch14-336 --keep 64 photos out

OUT receives shard-00000.safetensors, ... ("tokens" [M, K, D], as they leave the second to last layer, and "indices"
[M, K]) and, once all are there, manifest.json: the shards, the images in each, and what was skipped, with the reason:
images, and subfolders that are links or cannot be read. The shards do not depend on the number of processes, and each
appears under its name only when it is whole: after a kill, at whatever moment, the same command goes on where it was.
"""

import argparse
import contextlib
import json
import os
import secrets
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel

import lvtp
from lvtp.demo.photo import load
from lvtp.importance import AttentionTap, cls_attention, received_attention

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
LAYER = -2  # as LLaVA reads its tower


def listed(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The images below `folder`, sorted; and its subfolders that are not looked into, with the reason."""
    names, closed = [], {}

    def note(error: OSError):
        closed[os.path.relpath(error.filename, folder) + os.sep] = f"{type(error).__name__}: {error.strerror}"

    for parent, folders, files in os.walk(folder, onerror=note):
        here = os.path.relpath(parent, folder)
        names += [os.path.normpath(os.path.join(here, f)) for f in files if Path(f).suffix.lower() in SUFFIXES]
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                closed[os.path.normpath(os.path.join(here, name)) + os.sep] = "a link to a folder is not followed"
    if os.curdir + os.sep in closed:
        sys.exit(f"{folder} cannot be read: {closed[os.curdir + os.sep]}")
    if not names:
        sys.exit(f"{folder} has no image in it ({', '.join(sorted(SUFFIXES))})")
    return sorted(names), closed


class Images(Dataset):
    def __init__(self, folder: Path, names: list[str], processor):
        self.folder, self.names, self.processor = folder, names, processor

    def __getitem__(self, i: int):
        """(name, pixels [3, H, W], "") or (name, None, why)."""
        try:
            image = load(self.folder / self.names[i])
            pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        except Exception as error:  # whatever an image makes its processor raise
            return self.names[i], None, f"{type(error).__name__}: {error}".replace(str(self.folder) + os.sep, "")
        return self.names[i], pixels, ""


@torch.inference_mode()
def keep_tokens(tower, pixels, args) -> tuple[torch.Tensor, torch.Tensor]:
    """pixels [B, 3, H, W] -> tokens [B, K, D], indices int64 [B, K]."""
    attention = tower.encoder.layers[LAYER].self_attn
    with AttentionTap(attention, attention.num_heads) as tap:
        features = tower(pixels, output_hidden_states=True).hidden_states[LAYER]
    if hasattr(tower.embeddings, "class_embedding"):  # CLIP: the attention of CLS, which is no patch
        importance, features = cls_attention(tap.query, tap.key)[:, 1:], features[:, 1:]
    else:  # SigLIP
        importance = received_attention(tap.query, tap.key)
    indices = getattr(lvtp, args.method)(features, importance, args.keep)
    return lvtp.take(features, indices)[0], indices


def write(file: Path, content: bytes) -> None:
    """Under a name of its own first: a file of the right name is complete, even where ranks whose torchrun was killed
    still write beside those of a new one."""
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
    temporary.write_bytes(content)
    temporary.replace(file)


def described(file: Path) -> dict:
    with safe_open(file, "pt") as shard:
        return json.loads(shard.metadata()["lvtp"])


def missing(shards: dict[Path, dict]) -> list[Path]:
    """The shards still to be made. Exits where one is there that is of other images or other settings."""
    for file, description in shards.items():
        there = described(file) if file.exists() else {}
        if there and {**description, "skipped": there["skipped"]} != there:
            sys.exit(f"{file} was made from other images or with other settings: choose another folder")
    return [file for file in shards if not file.exists()]


def run(args, rank: int, ranks: int) -> None:
    names, closed = listed(args.images)
    settings = {"model": args.model, "method": args.method, "keep": args.keep, "batch": args.batch}
    shards = {
        args.out / f"shard-{start // args.shard:05}.safetensors": {**settings, "images": names[start:][: args.shard]}
        for start in range(0, len(names), args.shard)
    }
    todo = [None]
    if rank == 0:  # one rank looks, before any writes
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.out).close()
        except OSError as error:
            sys.exit(f"{args.out} cannot be written to: {error.strerror}")
        for name, why in closed.items():
            print(f"skipped {name}: {why}", file=sys.stderr)
        for left_over in args.out.glob("*.tmp"):
            left_over.unlink(missing_ok=True)
        todo = [missing(shards)]
    if ranks > 1:
        dist.broadcast_object_list(todo, src=0)
    mine = todo[0][rank::ranks]

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(args.model).eval()
    tower = getattr(model, "vision_model", model).to(device)
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    if args.keep > patches:
        sys.exit(f"--keep must be at most {patches}, the tokens of an image in {args.model}, got {args.keep}")
    images = Images(args.images, names, AutoImageProcessor.from_pretrained(args.model, backend="pil"))
    place = {name: i for i, name in enumerate(names)}
    batches = [
        [place[name] for name in shards[file]["images"][start : start + args.batch]]
        for file in mine
        for start in range(0, len(shards[file]["images"]), args.batch)
    ]
    loaded = iter(DataLoader(images, batch_sampler=batches, collate_fn=list, num_workers=args.workers))
    with tqdm(total=sum(map(len, batches)), unit="image", disable=rank != 0) as bar:
        for file in mine:
            seen, tokens, indices, skipped = 0, [], [], {}
            while seen < len(shards[file]["images"]):
                batch = next(loaded)
                pixels = [image for _, image, _ in batch if image is not None]
                if pixels:
                    kept, places = keep_tokens(tower, torch.stack(pixels).to(device), args)
                    tokens.append(kept.cpu()), indices.append(places.cpu())
                for name, image, why in batch:
                    if image is None:
                        skipped[name] = why
                        bar.write(f"skipped {name}: {why}", file=sys.stderr)
                seen += len(batch)
                bar.update(len(batch))
            content = {"tokens": torch.cat(tokens), "indices": torch.cat(indices)} if tokens else {}
            metadata = {"lvtp": json.dumps({**shards[file], "skipped": skipped})}
            write(file, save(content, metadata))  # save_file leaves a temporary file of its own behind when killed

    if ranks > 1:
        dist.barrier()
    if rank == 0:
        found = {file.name: described(file) for file in shards}
        skipped = closed | {name: why for shard in found.values() for name, why in shard["skipped"].items()}
        kept = {file: [name for name in shard["images"] if name not in skipped] for file, shard in found.items()}
        text = json.dumps({**settings, "shards": kept, "skipped": skipped}, indent=1)
        write(args.out / "manifest.json", text.encode())


def at_least(low: int):
    def integer(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return int(text)

    return integer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path, help="a folder; subfolders count")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="a CLIP or SigLIP checkpoint with its image processor")
    parser.add_argument("--keep", type=at_least(1), required=True, help="tokens an image")
    parser.add_argument("--method", choices=("id_selection", "prune_sid"), default="id_selection")
    parser.add_argument("--batch", type=at_least(1), default=32, help="images at once")
    parser.add_argument("--shard", type=at_least(1), default=1024, help="images a shard")
    parser.add_argument("--workers", type=at_least(0), default=4, help="processes that read images, for each rank")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        rank, ranks = 0, 1
        if "RANK" in os.environ:  # under torchrun
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            stack.callback(dist.destroy_process_group)
            rank, ranks = dist.get_rank(), dist.get_world_size()
        run(args, rank, ranks)


if __name__ == "__main__":
    main()
