"""What pictures and videos have in common: frames of one size, read as they are needed; a picture is one frame."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csd3d.media import open_video, read_image
from csd3d.metrics.motion import Flow


@dataclass
class WorldConfig:
    """What is edited where no file is given: which strip of objects or orbit of one, and how large."""

    seed: int = 0
    width: int = 512
    height: int = 128
    frames: int = 24

    def __post_init__(self) -> None:
        for key in ("width", "height", "frames"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a whole number of at least 1")


@dataclass(frozen=True)
class Captions:
    """What is to be seen `before` the edit, a caption for each part of a frame or one for all; and `after`, as each of
    the valid answers has it."""

    before: list[str]
    after: list[list[str]]


@dataclass
class Footage:
    """F = `count` frames of height x width. `read(indices)` gives some of them, [n, 3, H, W] float32 in [0, 1].

    Of a picture, `alpha` [H, W] and `bits` a channel are to be kept; of a video (`fps` is not None) its rate, the shape
    of its pixels, and the sound of the file `sound_from`. `answers` [K, F, H, W, 3], float in [0, 1] or uint8, are the
    true edits, where they are known, `captions` what they show, `flow(a, b)` the true flow of a video (`Flow`).
    """

    name: str
    count: int
    height: int
    width: int
    read: Callable[[Sequence[int]], Tensor]
    alpha: np.ndarray | None = None
    bits: int = 8
    fps: float | None = None
    sample_aspect: Fraction = Fraction(1)
    sound_from: Path | None = None
    answers: np.ndarray | None = None
    captions: Captions | None = None
    flow: Flow | None = None
    warnings: Sequence[str] = ()

    @property
    def is_video(self) -> bool:
        return self.fps is not None

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width


def open_picture(path: str) -> Footage:
    """A picture file; InputError where it can't be read."""
    picture = read_image(Path(path).expanduser())
    pixels = torch.tensor(picture.rgb).permute(2, 0, 1)[None]
    return Footage(
        Path(path).name, 1, *picture.rgb.shape[:2], _frames_of(pixels), alpha=picture.alpha, bits=picture.bits
    )


def open_clip(path: str) -> Footage:
    """A video file or a folder of frames; InputError where it can't be read. It lives as long as the footage does."""
    video = open_video(Path(path).expanduser())

    def read(indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(video.frames(indices)).permute(0, 3, 1, 2).float() / 255

    return Footage(
        Path(path).name,
        video.count,
        video.height,
        video.width,
        read,
        fps=video.fps,
        sample_aspect=video.sample_aspect,
        sound_from=video.path,
        warnings=video.warnings,
    )


def _frames_of(pixels: Tensor) -> Callable[[Sequence[int]], Tensor]:
    return lambda indices: pixels[list(indices)]
