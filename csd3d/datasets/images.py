"""Decoding the pictures and masks of a capture: sizes from headers first, then pixels, averaged down."""

from pathlib import Path

import numpy as np

from csd3d.datasets.panoramas import cut_pixels
from csd3d.errors import InputError
from csd3d.media.pictures import channels, check_file, opened, upright_size

MAX_PIXELS = 50_000_000  # of one picture file
BACKGROUNDS = {"white": 1.0, "black": 0.0}


def image_size(path: Path, max_pixels: int) -> tuple[int, int]:
    """Width and height as stored, from the header alone; InputError above `max_pixels`, also for a file of more bytes
    than so many pixels take, as some decoders read a whole file at once."""
    check_file(path, "a picture")
    size = path.stat().st_size
    if size > 8 * max_pixels + 2**20:  # 8 bytes: RGBA of 16 bits, uncompressed
        raise InputError(
            f"{path}: {size} bytes, too many for {max_pixels} pixels (a capture's limit: scene.max_pixels)"
        )
    with opened(path) as image:
        width, height = image.size
    if width * height > max_pixels:
        raise InputError(f"{path}: {width}x{height} pixels; the limit is {max_pixels} (a capture's: scene.max_pixels)")
    return width, height


def turned_size(path: Path) -> tuple[int, int] | None:
    """Width and height as displayed if the EXIF orientation swaps them, else None."""
    with opened(path) as image:
        size = upright_size(image)
        return None if size == image.size else size


def read_image(path: Path, size: tuple[int, int], background: str, turned: bool) -> tuple[np.ndarray, bool]:
    """Decode a picture to [H, W, 3] float32 in 0..1; also return whether it shows `background` anywhere.

    It is area-averaged to `size` (width, height), at most the size of the file. `turned` applies the EXIF orientation.
    """
    values, has_alpha = decode(path, background, turned)
    return area_resize(values, *size), has_alpha


def decode(path: Path, background: str, turned: bool) -> tuple[np.ndarray, bool]:
    """As `read_image`, in the file's own size."""
    with opened(path) as image:
        values, _ = channels(image, turned)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: holds pixels that are not finite")
    has_alpha = False
    if values.shape[2] in (2, 4):
        alpha = values[:, :, -1:]
        has_alpha = bool(alpha.min() < 1)
        values = values[:, :, :-1] * alpha + (1 - alpha) * BACKGROUNDS[background]
    return np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values, has_alpha


def face(values: np.ndarray, cut: int | None, full: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """A decoded picture, or the face `cut` of a panorama at its `full` size (width, height), resized to `size`."""
    return area_resize(values if cut is None else cut_pixels(values, cut, full[0]), *size)


def read_square(path: Path, side: int) -> np.ndarray:
    """The middle square of a picture as displayed, area-averaged to [side, side, 3] float32 in 0..1, over white.

    Raises InputError for a picture that is smaller, too large or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such picture")
    stored = image_size(path, MAX_PIXELS)
    size = turned_size(path) or stored
    if min(size) < side:
        raise InputError(f"{path}: {size[0]}x{size[1]} pixels; give a picture of at least {side} a side")
    width, height = (round(length * side / min(size)) for length in size)
    values, _ = read_image(path, (width, height), "white", turned=True)
    left, top = (width - side) // 2, (height - side) // 2
    return np.ascontiguousarray(values[top : top + side, left : left + side])


def read_mask(
    path: Path, size: tuple[int, int], cut: int | None = None, full: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode a mask to [H, W] bool: True (usable) if all file pixels under the new pixel are non-zero."""
    with opened(path) as image:
        values, _ = channels(image, turned=False)
    colour = values if values.shape[2] in (1, 3) else values[:, :, :-1]
    usable = (colour.max(axis=2, keepdims=True) > 0).astype(np.float32)
    return face(usable, cut, full or size, size)[:, :, 0] > 1 - 1e-6


def area_resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize [H, W, C] to [height, width, C]: each new pixel is the mean over the area that it covers."""
    channels = (_area_along(_area_along(channel, height, 0), width, 1) for channel in np.moveaxis(image, -1, 0))
    return np.stack(list(channels), axis=-1)  # one at a time: the integral is in float64


def _area_along(image: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Average along one axis, by differences of the running integral at the edges of the new pixels."""
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
