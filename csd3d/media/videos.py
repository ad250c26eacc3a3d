"""Reading videos: MP4, MOV, MKV, WebM, AVI, GIF or a folder of frames, with random access to frames.

A file is decoded once, to raw rgb in a temporary folder (3 H W bytes a frame; set TMPDIR to move it), and frames are
read from there on request. The pictures of a folder are decoded on request.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from operator import index
from pathlib import Path

import numpy as np

from csd3d.errors import InputError
from csd3d.files import natural_key
from csd3d.media.colour import colour_note
from csd3d.media.decoding import Decoded, Limits, decode, early_end
from csd3d.media.pictures import MAX_PIXELS, opened, read_image, upright_size
from csd3d.media.probe import Probe, probe
from csd3d.media.refusals import check_film
from csd3d.media.timing import DEFAULT_FPS
from csd3d.temporary import TemporaryFolder

MAX_FRAMES = 10_000
MAX_DECODED_GIB = 64.0  # 10 000 frames of 1080p take 58
SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".avif",
    ".bmp",
    ".tif",
    ".tiff",
    ".heic",
    ".heif",
)  # HEIC: refused by name
TRANSPARENT = "it has an alpha channel; what is transparent becomes white"


@dataclass
class VideoReader:
    """An open video of `count` upright frames at `fps` frames a second; `warnings` say what is out of the ordinary.

    sample_aspect: a pixel's width / height.  sound_from: the file, if it holds sound that fits the frames.
    start: seconds from the beginning of the sound's clock to the first frame.  times: when each frame begins after the
    first, and when the last one ends, in seconds, `count` + 1; None: evenly, at `fps`.
    Close it, or use it as a context manager, to delete its cache.
    """

    path: Path
    count: int
    height: int
    width: int
    fps: float
    read: Callable[[int], np.ndarray]  # one frame [H, W, 3] uint8
    warnings: list[str] = field(default_factory=list)
    sample_aspect: Fraction = Fraction(1)
    start: Fraction = Fraction(0)
    times: tuple[Fraction, ...] | None = None
    sound_from: Path | None = None
    cache: TemporaryFolder | None = None

    def frames(self, indices: Iterable[int]) -> np.ndarray:
        """Return the frames at `indices`, in that order, [n, H, W, 3] uint8. IndexError outside 0 .. count - 1."""
        wanted = [index(i) for i in indices]
        if wanted and not 0 <= min(wanted) <= max(wanted) < self.count:
            raise IndexError(f"{self.path}: frames {min(wanted)} .. {max(wanted)} asked for; it has {self.count}")
        result = np.empty((len(wanted), self.height, self.width, 3), np.uint8)
        for frame, i in zip(result, wanted, strict=True):
            frame[:] = self.read(i)
        return result

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_video(
    path: str | Path,
    fps: float | None = None,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
    max_decoded_gib: float = MAX_DECODED_GIB,
) -> VideoReader:
    """Open a video file or a folder of frames.

    `fps` overrides the rate of the video, which then has even frames and no sound; folders have none and default to 24.
    Transparent parts become white; HDR and wide gamuts become SDR (`Probe`), and colour profiles of pictures sRGB. A
    file that ends early or is damaged gives the frames before that, with a warning.

    Raises InputError if nothing can be decoded, the decoder is killed, the frames of a folder differ in size, a frame
    has more than `max_pixels`, or there are more than `max_frames` or, of a file, `max_decoded_gib` GiB of them.
    """
    path = Path(path)
    if fps is not None and not 0.01 <= fps <= 1000:
        raise InputError(f"fps: {fps}; expected frames a second, 0.01 to 1000")
    limits = Limits(max_frames, max_pixels, max_decoded_gib)
    return (_open_folder if os.path.isdir(path) else _open_file)(path, fps, limits)


# ------------------------------------------------------------------------------------------------------------- folders


def frames_of(folder: Path) -> list[Path]:
    """Return the pictures of a folder, which are its frames, in order; other files in it have no part in the video."""
    return sorted((f for f in folder.iterdir() if _is_frame(f)), key=lambda f: (natural_key(f.name), f.name))


def _open_folder(path: Path, fps: float | None, limits: Limits) -> VideoReader:
    files = frames_of(path)
    if not files:
        raise InputError(f"{path}: no frames in this folder; expected pictures ({', '.join(SUFFIXES)})")
    if len(files) > limits.frames:
        raise InputError(f"{path}: more than {limits.frames} frames; leave some out, or raise max_frames")
    heads = [_head(file, limits.pixels) for file in files]
    for file, head in zip(files, heads, strict=True):
        if head.size != heads[0].size:
            (width, height), (first_width, first_height) = head.size, heads[0].size
            raise InputError(f"{file}: {width}x{height}, but {files[0].name} {first_width}x{first_height}; one size")
    width, height = heads[0].size
    notes = [f"{path}: {TRANSPARENT}"] if any(head.has_alpha for head in heads) else []
    notes += [f"{path}: {note}" for note in dict.fromkeys(head.colours for head in heads if head.colours)]
    read = lambda i: _read_frame(files[i], limits.pixels)  # noqa: E731
    return VideoReader(path, len(files), height, width, float(fps or DEFAULT_FPS), read, notes)


@dataclass(frozen=True)
class Head:
    """A picture's size (width, height) as displayed, whether it has an alpha channel, and how its colours change."""

    size: tuple[int, int]
    has_alpha: bool
    colours: str | None


def _head(file: Path, max_pixels: int) -> Head:
    with opened(file, max_pixels) as image:
        return Head(upright_size(image), image.has_transparency_data, colour_note(image))


def _is_frame(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _read_frame(file: Path, max_pixels: int) -> np.ndarray:
    """Read a picture as a frame: 8 bits, over white."""
    picture = read_image(file, max_pixels)
    rgb = picture.rgb
    if picture.alpha is not None:
        rgb = 1 + (rgb - 1) * picture.alpha[:, :, None]
    return np.round(255 * rgb).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------------- files


def _open_file(path: Path, fps: float | None, limits: Limits) -> VideoReader:
    check_film(path, "a video or a folder of frames")
    found = probe(path, limits.pixels)
    try:
        cache = TemporaryFolder("video")
    except OSError as error:
        reason = f"its frames need a temporary folder ({error.strerror or error})"
        raise InputError(f"{path}: {reason}; set TMPDIR to one that can be written") from error
    try:
        done = decode(path, cache.path, found, limits)
    except BaseException:
        cache.close()
        raise
    timing = done.timing
    times, sound = (timing.times, path) if fps is None else (None, None)  # sound at another speed would not fit
    return VideoReader(
        path,
        done.count,
        done.height,
        done.width,
        float(fps or timing.rate),
        _reader(cache.path / "frames", (done.height, done.width, 3)),
        [f"{path}: {note}" for note in _notes(found, done, fps)],
        found.pixel_aspect,
        timing.start,
        times,
        sound if timing.has_sound else None,
        cache,
    )


def _notes(found: Probe, done: Decoded, fps: float | None) -> list[str]:
    """What was found out of the ordinary, and what becomes of it."""
    timing = done.timing
    notes = [early_end(done.fault, done.count)] if done.fault else []
    notes += [found.colour_note] if found.colour_note else []
    if done.transparent:
        notes.append(TRANSPARENT)
    if timing.remark and fps is None and not done.fault:
        notes.append(f"{timing.remark}; the result keeps their times")
    if fps is not None and timing.has_sound and abs(fps - timing.rate) > 0.001 * fps:
        notes.append(f"fps={fps:g} instead of its own {float(timing.rate):.5g}; the result has no sound")
    return notes


def _reader(file: Path, shape: tuple[int, int, int]) -> Callable[[int], np.ndarray]:
    """A function that reads one frame; no memory map, because its pages would count as memory of this process."""
    size = int(np.prod(shape))
    return lambda i: np.fromfile(file, np.uint8, size, offset=i * size).reshape(shape)
