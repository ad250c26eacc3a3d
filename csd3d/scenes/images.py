"""Decoding a capture's pictures: sizes from headers first, then pixels; alpha, 16 bits, masks, area downscaling."""

from pathlib import Path

import numpy as np

from csd3d.errors import InputError
from csd3d.media.pictures import channels, opened, upright_size

BACKGROUNDS = {"white": 1.0, "black": 0.0}


def image_size(path: Path, max_pixels: int) -> tuple[int, int]:
    """(width, height) as stored, from the header alone; InputError over `max_pixels`."""
    with opened(path) as image:
        width, height = image.size
    if width * height > max_pixels:
        raise InputError(f"{path}: {width}x{height} pixels; the limit scene.max_pixels is {max_pixels}")
    return width, height


def turned_size(path: Path) -> tuple[int, int] | None:
    """(width, height) as displayed, where the file's EXIF orientation swaps them; else None."""
    with opened(path) as image:
        size = upright_size(image)
        return None if size == image.size else size


def read_image(path: Path, size: tuple[int, int], background: str, turned: bool) -> tuple[np.ndarray, bool]:
    """Decodes to [H, W, 3] float32 in 0..1, and says whether any of it showed `background`.

    `size` (width, height) is of the capture's raster, smaller than the file's or equal: area-averaged to it.
    `turned` applies the EXIF orientation.
    """
    with opened(path) as image:
        values, _ = channels(image, turned)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: holds pixels that are not finite")
    has_alpha = False
    if values.shape[2] in (2, 4):
        alpha = values[:, :, -1:]
        has_alpha = bool(alpha.min() < 1)
        values = values[:, :, :-1] * alpha + (1 - alpha) * BACKGROUNDS[background]
    values = area_resize(values, *size)
    return np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values, has_alpha


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Decodes a mask to [H, W] bool, True = usable: where every pixel averaged into this one is non-zero."""
    with opened(path) as image:
        values, _ = channels(image, turned=False)
    colour = values if values.shape[2] in (1, 3) else values[:, :, :-1]
    usable = (colour.max(axis=2, keepdims=True) > 0).astype(np.float32)
    return area_resize(usable, *size)[:, :, 0] > 1 - 1e-6


def area_resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Averages [H, W, C] down to [height, width, C]: each new pixel is the mean over the area that it covers."""
    channels = (_area_along(_area_along(channel, height, 0), width, 1) for channel in np.moveaxis(image, -1, 0))
    return np.stack(list(channels), axis=-1)  # one at a time: the integral is in float64


def _area_along(image: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Along one axis: differences of the running integral at the new pixels' edges, which may cut old pixels."""
    count = image.shape[axis]
    if count == size:
        return image
    values = np.moveaxis(image, axis, 0)
    integral = np.concatenate((np.zeros_like(values[:1], dtype=np.float64), values.cumsum(axis=0, dtype=np.float64)))
    edges = np.linspace(0, count, size + 1)
    below = np.minimum(edges.astype(int), count - 1)
    part = (edges - below).reshape(-1, *[1] * (values.ndim - 1))
    at_edges = integral[below] * (1 - part) + integral[below + 1] * part
    return np.moveaxis(np.diff(at_edges, axis=0) * (size / count), 0, axis).astype(image.dtype)
