"""MP4 out of frames: H.264, yuv420p, even sides, index at the front, so that every browser plays it."""

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image
from torch import Tensor

from csd3d.errors import InputError

Picture = np.ndarray | Tensor  # [H, W, 3], float in [0, 1] or uint8


def write_video(path: Path, frames: Iterable[Picture], fps: int = 24, scale: int = 1, crf: int = 18) -> None:
    """Write frames `[H, W, 3]` as MP4, enlarged `scale`-fold (Lanczos) and cropped to even sides; nothing stays if it
    fails.

    Raises InputError for no frames, ValueError for frames of differing size.
    """
    frames = (enlarge(to_uint8(frame), scale) for frame in frames)
    first = next(frames, None)
    if first is None:
        raise InputError(f"{path}: a video needs at least one frame")
    height, width = (side - side % 2 for side in first.shape[:2])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.mp4")
    try:
        _encode(partial, chain([first], frames), (width, height), first.shape, fps, crf)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _encode(path: Path, frames: Iterator[np.ndarray], size: tuple[int, int], shape: tuple, fps: int, crf: int) -> None:
    """Feed frames of `shape`, cropped to `size` (width, height), to ffmpeg's libx264."""
    # untagged, each player guesses another matrix
    tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    filters = ["-vf", f"scale=out_color_matrix=bt709:out_range=tv,{tags}"]
    options = [*filters, "-crf", str(crf), "-preset", "medium", "-movflags", "+faststart"]
    encoder = imageio_ffmpeg.write_frames(
        str(path), size, fps=fps, codec="libx264", quality=None, macro_block_size=1, output_params=options,
        ffmpeg_log_level="error",
    )  # fmt: skip
    encoder.send(None)
    try:
        for frame in frames:
            if frame.shape != shape:
                raise ValueError(f"video frames differ in size: {frame.shape} after {shape}")
            encoder.send(np.ascontiguousarray(frame[: size[1], : size[0]]))
    finally:
        encoder.close()


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
