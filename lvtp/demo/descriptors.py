"""Patch descriptors and a saliency map that mean something without any training.

Random weights give random saliency, so the demonstration's main picture feeds the selectors these instead: what a
patch looks like (colour and DCT) as features, and how much it stands out (classical saliency) as importance.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lvtp.demo.photo import GRID, PATCH

LUMA_BAND = 6  # DCT frequencies a side kept of the lightness: 35 without the mean
CHROMA_BAND = 3  # and of each colour channel: 8 without the mean
SIGNATURE_SIDE = 96  # pixels: the scale of what the image signature calls an object
SIGNATURE_BLUR = 3.5  # pixels of that scale
CONTRAST_REACH = 0.6  # distance, in image sides, over which a patch is compared with the others
CONTRAST_BLUR = 1.0  # patches

# sRGB primaries to XYZ over the D65 white point (IEC 61966-2-1).
_RGB_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
_WHITE = (0.9505, 1.0, 1.089)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB [3, H, W] in [0, 1] to CIELAB [3, H, W]: equal distances are roughly equal differences to the eye."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,jhw->ihw", torch.tensor(_RGB_TO_XYZ), linear) / torch.tensor(_WHITE).view(3, 1, 1)
    knee = 6 / 29
    f = torch.where(xyz > knee**3, xyz.clamp_min(knee**3) ** (1 / 3), xyz / (3 * knee**2) + 4 / 29)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def dct_matrix(n: int) -> Tensor:
    """Orthonormal DCT-II, [n, n]: `C @ x` transforms, `C.T @ y` inverts."""
    k = torch.arange(n)
    matrix = torch.cos(math.pi / n * (k + 0.5) * k[:, None]) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def patch_descriptors(rgb: Tensor) -> Tensor:
    """fp32 [1, N, 54] of an image [3, H, W] in patches of 14 px, raster order.

    Mean colour (3), lightness DCT (35) and colour DCT (16). DCT magnitudes go through log(1 + x): the same texture
    shifted by a few pixels should stay similar. Columns are standardised over the image, so that cosine similarity
    compares how patches depart from the average one, and each block weighs the same whatever its width.
    """
    patches = rgb_to_lab(rgb).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [3, rows, cols, 14, 14]
    patches = patches.permute(1, 2, 0, 3, 4).flatten(0, 1)  # [N, 3, 14, 14]
    c = dct_matrix(PATCH)
    spectrum = c @ patches @ c.T
    luma = spectrum[:, 0, :LUMA_BAND, :LUMA_BAND].flatten(1)[:, 1:]
    chroma = spectrum[:, 1:, :CHROMA_BAND, :CHROMA_BAND].flatten(2)[:, :, 1:].flatten(1)
    blocks = [patches.mean((2, 3)), luma.abs().log1p(), chroma.abs().log1p()]
    return torch.cat([_standardise(b) / math.sqrt(b.shape[1]) for b in blocks], 1)[None]


def _standardise(columns: Tensor) -> Tensor:
    """Zero mean and unit variance over dim 0; a constant column becomes zeros."""
    centred = columns - columns.mean(0)
    return centred / centred.std(0).clamp_min(1e-3)


def saliency(rgb: Tensor) -> Tensor:
    """Importance of each patch, fp32 [1, N] in [0, 1], from two classical maps.

    The image signature (Hou, Harel and Koch, 2012) finds what is small against its background, region contrast
    (Cheng et al., 2011) what is coloured unlike its surroundings; a portrait needs both for a badge and a face.
    """
    lab = rgb_to_lab(rgb)
    return ((_image_signature(lab) + _region_contrast(lab)) / 2).flatten()[None]


def _image_signature(lab: Tensor) -> Tensor:
    """Inverse DCT of the sign of the DCT, squared, blurred: [GRID, GRID] in [0, 1]."""
    small = F.interpolate(lab[None], (SIGNATURE_SIDE, SIGNATURE_SIDE), mode="area")[0]
    c = dct_matrix(SIGNATURE_SIDE)
    outline = c.T @ (c @ small @ c.T).sign() @ c
    energy = _blur(outline.square().sum(0), SIGNATURE_BLUR)
    # Energy is an amplitude squared: without the root one bright badge would leave the rest at zero.
    return _unit(F.adaptive_avg_pool2d(energy[None, None], GRID)[0, 0].sqrt())


def _region_contrast(lab: Tensor) -> Tensor:
    """Mean colour distance to the other patches, weighted by nearness: [GRID, GRID] in [0, 1]."""
    colour = F.adaptive_avg_pool2d(lab[None], GRID)[0].flatten(1).T  # [N, 3]
    axis = torch.arange(GRID) / GRID
    place = torch.cartesian_prod(axis, axis)  # [N, 2], row then column
    near = torch.exp(-((torch.cdist(place, place) / CONTRAST_REACH) ** 2))
    contrast = (torch.cdist(colour, colour) * near).sum(1) / near.sum(1)
    return _unit(_blur(contrast.view(GRID, GRID), CONTRAST_BLUR))


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [H, W], mirrored at the border."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    padded = F.pad(image[None, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[0, 0]


def _unit(values: Tensor) -> Tensor:
    """Min-max scaled to [0, 1]; zeros where there is nothing to tell apart."""
    low, high = values.aminmax()
    return (values - low) / (high - low).clamp_min(1e-6)
