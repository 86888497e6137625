"""The photograph: loaded with Pillow, cropped as CLIP crops, normalised as CLIP normalises.

LLaVA-1.5's own processor would do, but it needs torchvision or a tokenizer; these few lines need neither.
"""

import stat
from pathlib import Path

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
    import matplotlib.cbook  # here, because load() does without

    return Path(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def load(path: str | Path) -> Image.Image:
    """RGB photograph, turned as its EXIF tag says; 16 bits of grey become 8. Raises OSError where there is none.

    So do a pipe, which would wait for its writer, and 32 bits of grey, of which nobody says where white is.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError("not a regular file")
    try:
        with Image.open(path) as image:
            return _eight_bits(ImageOps.exif_transpose(image), image.format).convert("RGB")
    except OSError:
        raise
    except Exception as error:  # a broken file makes Pillow raise anything
        raise OSError(f"{type(error).__name__}: {error}") from error


def _eight_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    """Pillow's own conversion of these modes clips at 255 instead of scaling."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):  # both up to 65535
        return Image.fromarray((np.asarray(image, np.float32) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise OSError(f"32-bit grey (mode {image.mode}): save it with 8 or 16 bits")
    return image


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
