"""Reading videos: MP4, MOV, MKV, WebM, AVI, GIF or a folder of frames, with random access to frames.

A file is decoded once, to raw rgb in a temporary folder (3 H W bytes a frame; set TMPDIR to move it), and frames are
read from there on request. The pictures of a folder are decoded on request.
"""

import itertools
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from operator import index
from pathlib import Path
from typing import IO

import numpy as np

from csd3d.errors import InputError
from csd3d.files import natural_key
from csd3d.media.ffmpeg import command, complaint, exact_rate, location, source
from csd3d.media.pictures import MAX_PIXELS, check_file, opened, read_image, upright_size

MAX_FRAMES = 10_000
DEFAULT_FPS = Fraction(24)  # for frames without times
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass
class VideoReader:
    """An open video of `count` upright frames at `fps` frames a second; `warnings` describe faults of the file, and
    `sample_aspect` is a pixel's width / height. Close it, or use it as a context manager, to delete its cache."""

    path: Path
    count: int
    height: int
    width: int
    fps: float
    read: Callable[[int], np.ndarray]  # one frame [H, W, 3] uint8
    warnings: list[str] = field(default_factory=list)
    sample_aspect: Fraction = Fraction(1)
    cache: tempfile.TemporaryDirectory | None = None

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
            self.cache.cleanup()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_video(
    path: str | Path, fps: float | None = None, max_frames: int = MAX_FRAMES, max_pixels: int = MAX_PIXELS
) -> VideoReader:
    """Open a video file or a folder of frames.

    `fps` overrides the rate of the video; folders have none and default to 24. Frames of unequal duration (GIF, phones)
    keep their number and total duration. A file that ends early or is damaged gives the frames before that, with a
    warning. Raises InputError if nothing can be decoded, the frames of a folder differ in size, a frame has more than
    `max_pixels`, or there are more than `max_frames`.
    """
    path = Path(path)
    if fps is not None and not 0.01 <= fps <= 1000:
        raise InputError(f"fps: {fps}; expected frames a second, 0.01 to 1000")
    return (_open_folder if path.is_dir() else _open_file)(path, fps, max_frames, max_pixels)


def _too_long(path: Path, max_frames: int) -> InputError:
    return InputError(f"{path}: more than {max_frames} frames; cut it, or raise max_frames")


# ------------------------------------------------------------------------------------------------------------- folders


def _open_folder(path: Path, fps: float | None, max_frames: int, max_pixels: int) -> VideoReader:
    files = sorted((f for f in path.iterdir() if _is_frame(f)), key=lambda f: (natural_key(f.name), f.name))
    if not files:
        raise InputError(f"{path}: no frames in this folder; expected pictures ({', '.join(SUFFIXES)})")
    if len(files) > max_frames:
        raise _too_long(path, max_frames)
    sizes = [_frame_size(file, max_pixels) for file in files]
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise InputError(f"{file}: {size[0]}x{size[1]}, but {files[0].name} {sizes[0][0]}x{sizes[0][1]}; one size")
    width, height = sizes[0]
    return VideoReader(
        path, len(files), height, width, float(fps or DEFAULT_FPS), lambda i: _read_frame(files[i], max_pixels)
    )


def _is_frame(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _frame_size(file: Path, max_pixels: int) -> tuple[int, int]:
    with opened(file, max_pixels) as image:
        return upright_size(image)


def _read_frame(file: Path, max_pixels: int) -> np.ndarray:
    """Read a picture as a frame: 8 bits, over white."""
    picture = read_image(file, max_pixels)
    rgb = picture.rgb
    if picture.alpha is not None:
        rgb = 1 + (rgb - 1) * picture.alpha[:, :, None]
    return np.round(255 * rgb).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------------- files


def _open_file(path: Path, fps: float | None, max_frames: int, max_pixels: int) -> VideoReader:
    check_file(path, "a video or a folder of frames")
    cache = tempfile.TemporaryDirectory(prefix="csd3d-video-", ignore_cleanup_errors=True)
    try:
        (count, height, width), problem = _decode(path, Path(cache.name), max_frames, max_pixels)
        times = (Path(cache.name) / "times").read_text()
        rate, uneven = _timing(times, damaged=problem is not None)
    except BaseException:
        cache.cleanup()
        raise
    warnings = [] if problem is None else [f"{path}: ends early or is damaged ({problem}); its first {count} frames"]
    warnings += [f"{path}: {uneven}, written at their mean rate"] if uneven and fps is None else []
    aspect = _header(times, "sar") or Fraction(1)
    aspect = aspect if f" {width}x{height}" in times else 1 / aspect  # a phone video, turned upright
    read = _reader(Path(cache.name) / "frames", (height, width, 3))
    return VideoReader(path, count, height, width, float(fps or rate), read, warnings, aspect, cache)


def _reader(file: Path, shape: tuple[int, int, int]) -> Callable[[int], np.ndarray]:
    """A function that reads one frame; no memory map, because its pages would count as memory of this process."""
    size = int(np.prod(shape))
    return lambda i: np.fromfile(file, np.uint8, size, offset=i * size).reshape(shape)


def _decode(path: Path, cache: Path, max_frames: int, max_pixels: int) -> tuple[tuple[int, int, int], str | None]:
    """Write `cache`/frames, raw rgb, and `cache`/times; return (count, height, width), and the fault found or None."""
    stream = ["-map", "0:V:0", "-fps_mode", "passthrough"]
    raw = [*stream, "-pix_fmt", "rgb24", "-sws_flags", "bicubic+accurate_rnd+full_chroma_int"]
    raw += ["-c:v", "ppm", "-f", "image2pipe", "pipe:1"]
    times = [*stream, "-c", "copy", "-f", "framecrc", location(cache / "times")]
    strict = ["-fflags", "+discardcorrupt", "-max_pixels", str(max_pixels)]
    arguments = command(*strict, *source(path), *raw, *times)
    with open(cache / "log", "w+", errors="replace") as errors:
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        try:
            with process.stdout:
                shape, changed = _store(process.stdout, cache / "frames", path, max_frames)
            process.wait()
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        problem = changed or complaint(errors.read(2**20))
    if problem is not None and shape[0] > 1 and _is_gif(path):
        shape = (shape[0] - 1, *shape[1:])  # ffmpeg returns the last frame even if it is incomplete
    if shape[0] == 0:
        expected = "expected MP4, MOV, MKV, WebM, AVI, GIF or a folder of frames"
        raise InputError(f"{path}: no frame can be decoded ({problem or 'it holds no pictures'}); {expected}")
    return shape, problem


def _is_gif(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GIF8"


def _store(stream: IO[bytes], file: Path, path: Path, max_frames: int) -> tuple[tuple[int, int, int], str | None]:
    """Write the frames of a stream to `file`; return (count, height, width), and why it ended early or None."""
    count, size = 0, (0, 0)
    try:
        with file.open("wb") as out:
            for *found, data in _ppm_pictures(stream):
                size = tuple(found) if count == 0 else size
                if tuple(found) != size:
                    return (count, *size), f"its size changes from {size[1]}x{size[0]} to {found[1]}x{found[0]}"
                if count == max_frames:
                    raise _too_long(path, max_frames)
                out.write(data)
                count += 1
    except OSError as error:
        hint = "set TMPDIR to a folder with more room"
        raise InputError(f"{path}: its frames can't be kept in {file.parent} ({error.strerror}); {hint}") from error
    return (count, *size), None


def _ppm_pictures(stream: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Yield (height, width, rgb) of each complete picture in a stream of binary PPM."""
    while stream.readline() == b"P6\n":
        width, height = map(int, stream.readline().split())
        stream.readline()
        data = stream.read(3 * width * height)
        if len(data) < 3 * width * height:
            return
        yield height, width, data


# ---------------------------------------------------------------------------------------------------------------- time


def _timing(text: str, damaged: bool) -> tuple[Fraction, str | None]:
    """Return the frame rate, and a remark if frames differ in duration, from ffmpeg's framecrc listing: a header
    "#tb 0: 1/30000", rows "0, dts, pts, duration, size, crc". In a `damaged` stream, gaps are ignored."""
    tick = _header(text, "tb")
    rows = [row.split(",")[1:4] for row in text.splitlines() if row and row[0] != "#"]
    times = sorted((int(pts if pts.strip("- ").isdigit() else dts), int(length)) for dts, pts, length in rows)
    if tick is None or not times:
        return DEFAULT_FPS, None
    steps = [after - before for (before, _), (after, _) in itertools.pairwise(times)]
    usual = statistics.median(steps) if steps else 0
    if damaged:
        steps = [step for step in steps if step <= 1.5 * usual]
    last = times[-1][1] if times[-1][1] > 0 else round(usual)
    rate = frame_rate(len(steps) + 1, sum(steps) + last, tick) or DEFAULT_FPS
    if steps and max(steps) > 1.5 * min(steps) + 2:
        low, high = (float(1000 * tick * step) for step in (min(steps), max(steps)))
        return rate, f"frames last between {low:.0f} and {high:.0f} ms"
    return rate, None


def _header(text: str, key: str) -> Fraction | None:
    found = re.search(rf"^#{key} 0: (\d+)/(\d+)$", text, re.MULTILINE)
    return Fraction(int(found[1]), int(found[2])) if found and int(found[1]) and int(found[2]) else None


def frame_rate(count: int, ticks: int, tick: Fraction) -> Fraction | None:
    """Frames a second of `count` frames that last `ticks` of `tick` seconds in all, rounded to a common rate (whole, or
    whole × 1000/1001) within one tick; None if they last no time."""
    if ticks <= 0:
        return None
    measured = Fraction(count) / (ticks * tick)
    near = [Fraction(round(measured)), Fraction(1000 * round(measured * 1001 / 1000), 1001)]
    misses = [(abs(count / (rate * tick) - ticks), rate) for rate in near if rate > 0]
    miss, rate = min(misses, default=(2, measured))
    return rate if miss <= 1 else exact_rate(measured)
