"""A clip is a picture or a video: frames of one size, read when needed; a picture has one frame.

If a job names no file, the clip comes from the registry: `registry.get("demo", "strip")` or `"orbit"`, functions
(DemoConfig, instruction) -> Clip, which may know the true edits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from csd3d import fingerprint
from csd3d.media import MAX_PIXELS, frames_of, open_video, read_image
from csd3d.memory import check_fits
from csd3d.metrics.motion import Flow
from csd3d.schema import Within

BYTES_PER_PIXEL = 200  # of a demo clip: frames, true edits, flow, and what rendering them takes
FRAMES_AT_ONCE = 16
PIXELS_AT_ONCE = 2**20


@dataclass
class DemoConfig:
    """The demo clip that is edited if no file is given."""

    seed: int = 0  # chooses the demo clip
    width: Annotated[int, Within(1, 8192)] = 512  # width of a picture in pixels; videos are square
    height: Annotated[int, Within(1, 8192)] = 128  # height in pixels
    frames: Annotated[int, Within(1, 1000)] = 24  # frames of a video

    def __post_init__(self) -> None:
        for key in ("width", "height", "frames"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a whole number of at least 1")
        # of a picture, and of a video, which is square
        needed = BYTES_PER_PIXEL * max(self.width * self.height, self.frames * self.height**2)
        check_fits(needed, f"width {self.width}, height {self.height}, frames {self.frames}: the demo clip")


@dataclass(frozen=True)
class Captions:
    """Captions of a clip. before: one for each part of a frame, or one for all.  after: the same for each right answer
    to the instruction."""

    before: list[str]
    after: list[list[str]]


@dataclass
class Clip:
    """`count` frames of height x width pixels.

    read(indices): the frames [n, 3, H, W], float32 in [0, 1].
    alpha [H, W] and bits (a channel) of a picture are kept in the result.
    fps: frames a second, None for a picture.  sample_aspect: width / height of a video's pixels.  sound_from: the file
    whose sound the result gets.  begin, times: when its frames are shown, as in `frame_writer`.
    answers [K, F, H, W, 3], float in [0, 1] or uint8: the true edits, if known.  captions: of clip and answers.
    flow(a, b): a video's true optical flow (`Flow`), if known.
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
    begin: Fraction | None = None
    times: Sequence[Fraction] | None = None
    answers: np.ndarray | None = None
    captions: Captions | None = None
    flow: Flow | None = None
    warnings: Sequence[str] = ()

    @property
    def is_video(self) -> bool:
        return self.fps is not None

    @property
    def kind(self) -> str:
        """Either "picture" or "video"."""
        return "video" if self.is_video else "picture"

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.height, self.width

    def chunks(self) -> Iterator[list[int]]:
        """All frame numbers, in lists of as many as may be in memory together."""
        count = max(1, min(FRAMES_AT_ONCE, PIXELS_AT_ONCE // (self.height * self.width)))
        return (list(range(i, min(i + count, self.count))) for i in range(0, self.count, count))


def open_picture(path: str, max_pixels: int = MAX_PIXELS) -> Clip:
    """Open a picture file as a clip of one frame; raises InputError if it cannot be read."""
    picture = read_image(Path(path).expanduser(), max_pixels)
    pixels = torch.tensor(picture.rgb).permute(2, 0, 1)[None]
    read = lambda indices: pixels[list(indices)]  # noqa: E731
    notes = [f"{path}: {note}" for note in picture.notes]
    size = picture.rgb.shape[:2]
    return Clip(Path(path).name, 1, *size, read, alpha=picture.alpha, bits=picture.bits, warnings=notes)


def contents_of(path: str) -> dict[str, str]:
    """Return {path: fingerprint} of a folder of frames, of which only the pictures count; {} of anything else."""
    folder = Path(path).expanduser()
    if not path or not folder.is_dir():
        return {}
    return {path: fingerprint.of_files({file.name: file for file in frames_of(folder)})}


def open_clip(path: str, **options: float | None) -> Clip:
    """Open a video file or a folder of frames; raises InputError if it cannot be read. The file stays open.

    options: `fps` and the limits of `open_video`.
    """
    video = open_video(Path(path).expanduser(), **options)

    def read(indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(video.frames(indices)).permute(0, 3, 1, 2).float() / 255

    return Clip(
        Path(path).name,
        video.count,
        video.height,
        video.width,
        read,
        fps=video.fps,
        sample_aspect=video.sample_aspect,
        sound_from=video.sound_from,
        begin=video.start,
        times=video.times,
        warnings=video.warnings,
    )
