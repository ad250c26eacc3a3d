"""Regions of a picture, each with its own instruction; the rest of the picture stays unchanged.

Symbols: K regions; masks [K, H, W] in [0, 1] on the picture's pixels; shares [K, h, w] of the instructions in each
latent pixel: the area of the region in the pixel, with overlaps divided so that the shares sum to at most 1.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.errors import InputError
from csd3d.media import MAX_PIXELS, read_image
from csd3d.schema import path_key

logger = logging.getLogger("csd3d")
SAME_SHAPE = 0.02  # largest relative difference of the aspect ratios of mask and picture
BORDER = 3  # pixels inside a region over which the result fades from the source to the edit


@dataclass
class Region:
    """A part of the picture and its instruction. If no region has a mask or a box, they are equal vertical strips."""

    prompt: str = ""  # the instruction; empty: unchanged
    mask: str = path_key()  # a picture of the region, white inside, of any size
    box: list[float] | None = None  # x0, y0, x1, y1 in pixels

    def __post_init__(self) -> None:
        if self.mask and self.box is not None:
            raise ValueError(f"the region {self.prompt!r} has a mask and a box: give one of them")
        if self.box is not None and len(self.box) != 4:
            raise ValueError(f"box is {self.box}: give [x0, y0, x1, y1] in pixels")


def check_regions(regions: list[Region]) -> None:
    """Raise ValueError if only some regions have a place, or none has a prompt."""
    placed = [bool(region.mask) or region.box is not None for region in regions]
    if any(placed) and not all(placed):
        number = placed.index(False) + 1
        raise ValueError(f"regions: the one at {number} has neither mask nor box, others have: give it one too")
    if regions and not any(region.prompt.strip() for region in regions):
        raise ValueError("regions: none has a prompt: say what to change in at least one")


def region_masks(regions: list[Region], height: int, width: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Masks [K, H, W] in [0, 1] of the regions of a picture of `height` x `width`; the files have at most `max_pixels`.

    Raises InputError for masks that are empty, unreadable or of another shape, and for boxes outside the picture.
    """
    if not any(region.mask or region.box is not None for region in regions):
        return strips(len(regions), height, width)
    masks = [
        read_mask(region.mask, height, width, max_pixels) if region.mask else box_mask(region.box, height, width)
        for region in regions
    ]
    for i in range(len(masks)):
        for k in range(i):
            if torch.equal(masks[i], masks[k]):
                logger.warning("regions %d and %d are the same: their instructions are mixed evenly", k + 1, i + 1)
    return torch.stack(masks)


def strips(count: int, height: int, width: int) -> Tensor:
    """Masks [count, H, W] of equal vertical strips, left to right; border pixels are shared in proportion."""
    if count > width:
        raise InputError(f"regions: {count} strips do not fit into a picture {width} pixels wide; give fewer")
    columns = torch.stack([_covered(i * width / count, (i + 1) * width / count, width) for i in range(count)])
    return columns[:, None].repeat(1, height, 1)


def box_mask(box: list[float], height: int, width: int) -> Tensor:
    """The mask [H, W] of a box in pixels, which may reach beyond the picture; pixels at its edge count in part."""
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        raise InputError(f"regions: box {box} is empty; give [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise InputError(f"regions: box {box} lies outside the picture of {width}x{height}")
    return _covered(y0, y1, height)[:, None] * _covered(x0, x1, width)


def read_mask(path: str, height: int, width: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The mask [H, W] of a file: brightness, times alpha if it has one, resized to the picture's size."""
    try:
        picture = read_image(Path(path).expanduser(), max_pixels)
    except InputError as error:
        raise InputError(f"regions: mask {error}") from None
    mask = torch.tensor(picture.rgb).mean(-1)
    if picture.alpha is not None:
        mask = mask * torch.tensor(picture.alpha)
    if mask.max() < 0.5 / 255:
        raise InputError(f"regions: mask {path}: it is empty (all black); paint the region white")
    tall, wide = mask.shape
    if abs(tall * width / (wide * height) - 1) > SAME_SHAPE:
        sizes = f"it is {wide}x{tall}, for a picture of {width}x{height}"
        raise InputError(f"regions: mask {path}: {sizes}; give one of its shape")
    if (tall, wide) != (height, width):
        logger.info("%s: the mask of %dx%d is resized to the picture's %dx%d", path, wide, tall, width, height)
        mask = F.interpolate(mask[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    return mask.clamp(0, 1)


def latent_shares(masks: Tensor, picture: tuple[int, int], latent: tuple[int, int], unit: float) -> Tensor:
    """Shares [K, h, w] of masks [K, H, W] in latent pixels of `unit` pixels a side, for working size `picture`.

    A share is the part of the latent pixel's area in the region, divided by the sum where regions overlap. Latent
    pixels that reach into the padding use the part inside the picture.
    """
    resized = masks[None].float()
    if tuple(masks.shape[1:]) != picture:
        resized = F.interpolate(resized, picture, mode="bilinear", antialias=True)
    pad = [round(side * unit) - size for side, size in zip(latent, picture, strict=True)]
    padded = F.pad(resized, (0, pad[1], 0, pad[0]), mode="replicate")
    shares = F.adaptive_avg_pool2d(padded, latent)[0].clamp(0, 1)
    return shares / shares.sum(0).clamp_min(1)


def soft_union(masks: Tensor) -> Tensor:
    """A mask [H, W]: 0 outside all regions; inside it rises from 1/2 at the border to 1 over `BORDER` pixels."""
    union = masks.amax(0)[None, None].float()
    near = F.avg_pool2d(F.pad(union, (BORDER,) * 4, mode="replicate"), 2 * BORDER + 1, stride=1)
    return (union * near)[0, 0]


def _covered(begin: float, end: float, length: int) -> Tensor:
    """The part of each of `length` pixels in a row that lies between `begin` and `end`, [length]."""
    pixel = torch.arange(length, dtype=torch.float64)
    return (torch.clamp(pixel + 1, max=float(end)) - torch.clamp(pixel, min=float(begin))).clamp(0, 1).float()
