"""MP4 from frames: H.264, yuv420p, even sides, index at the front, so that every browser plays it."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from csd3d.errors import InputError
from csd3d.files import write_whole
from csd3d.media import encode

Picture = np.ndarray | Tensor  # [H, W, 3], float in [0, 1] or uint8


def write_video(path: Path, frames: Iterable[Picture], fps: int = 24, scale: int = 1, crf: int = 18) -> None:
    """Write frames `[H, W, 3]` as MP4, enlarged by `scale` (Lanczos) and cropped to even sides.

    Raises InputError for no frames, ValueError for frames of differing size; then no file is left.
    """
    pictures = (_even(enlarge(to_uint8(frame), scale)) for frame in frames)
    try:
        write_whole(Path(path), lambda partial: encode(partial, pictures, fps, crf))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _even(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    return frame[: height - height % 2, : width - width % 2]


def side_by_side(before: Iterable[Picture], after: Iterable[Picture], divider: int = 2) -> Iterator[np.ndarray]:
    """Yield uint8 frames before | after with a white divider of `divider` pixels, until one of the two ends."""
    for left, right in zip(before, after, strict=False):
        left, right = to_uint8(left), to_uint8(right)
        yield np.concatenate([left, np.full((len(left), divider, 3), 255, np.uint8), right], axis=1)


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """Return a uint8 image enlarged by `scale` with a Lanczos filter."""
    if scale == 1:
        return image
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.LANCZOS))


def to_uint8(image: Picture) -> np.ndarray:
    """Return a picture `[H, W, 3]`, float in [0, 1] or uint8, as uint8; NaN becomes black.

    Raises ValueError for other shapes.
    """
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"expected a picture [H, W, 3], got {array.shape}")
    if array.dtype == np.uint8:
        return array
    return np.round(255.0 * np.nan_to_num(array.astype(np.float32)).clip(0.0, 1.0)).astype(np.uint8)
