"""MP4 out of frames: H.264, yuv420p, even sides, index at the front, so that every browser plays it."""

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
    """Write frames `[H, W, 3]` as MP4, enlarged `scale`-fold (Lanczos) and cropped to even sides; nothing stays if it
    fails.

    Raises InputError for no frames, ValueError for frames of differing size.
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
    """Frames before | after with a white divider of `divider` pixels, uint8; ends with the shorter of the two."""
    for left, right in zip(before, after, strict=False):
        left, right = to_uint8(left), to_uint8(right)
        yield np.concatenate([left, np.full((len(left), divider, 3), 255, np.uint8), right], axis=1)


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """A uint8 image `scale` times as large, Lanczos; small renders look like pictures then, not like tiles."""
    if scale == 1:
        return image
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.LANCZOS))


def to_uint8(image: Picture) -> np.ndarray:
    """`[H, W, 3]` in [0, 1] (array or tensor, any device), or already uint8 → uint8; NaN becomes black. Raises
    ValueError on other shapes.
    """
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"expected a picture [H, W, 3], got {array.shape}")
    if array.dtype == np.uint8:
        return array
    return np.round(255.0 * np.nan_to_num(array.astype(np.float32)).clip(0.0, 1.0)).astype(np.uint8)
