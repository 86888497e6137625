"""The photograph: loaded with Pillow, cropped as CLIP crops, normalised as CLIP normalises.

LLaVA-1.5's own processor would do, but it needs torchvision or a tokenizer; these few lines need neither.
"""

from pathlib import Path

import matplotlib.cbook
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SIDE = 336  # pixels, the input of LLaVA-1.5's tower (CLIP ViT-L/14 at 336 px)
PATCH = 14  # pixels
GRID = SIDE // PATCH  # 24 patches a side, 576 tokens

# openai/clip-vit-large-patch14-336, preprocessor_config.json.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def sample_photo() -> Path:
    """The portrait of Rear Admiral Grace Hopper that matplotlib installs (public domain, US Navy)."""
    return Path(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def load(path: str | Path) -> Image.Image:
    """RGB photograph, turned as its EXIF tag says. Raises OSError where there is no readable image."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def crop(image: Image.Image) -> Image.Image:
    """What the tower sees: the short side resized to 336 px (bicubic), then the central 336 x 336 square."""
    return ImageOps.fit(image, (SIDE, SIDE), method=Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to fp32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def normalise(rgb: Tensor) -> Tensor:
    """[3, H, W] in [0, 1] to CLIP's `pixel_values` [1, 3, H, W]."""
    mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    return ((rgb - mean) / std)[None]
