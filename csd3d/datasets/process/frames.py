"""Sharp frames of a film, or the photos of a folder, evenly chosen: blurred ones and repetitions are left out.

Two passes, so that a film of any length needs little memory and disk: one looks at every frame in small, the other
writes the chosen ones.
"""

import itertools
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from skimage.measure import blur_effect

from csd3d.datasets.images import MAX_PIXELS, area_resize, decode, image_size
from csd3d.errors import InputError
from csd3d.files import natural_key
from csd3d.media.decoding import read_pictures
from csd3d.media.ffmpeg import command, complaint, killed, source, start
from csd3d.media.pictures import check_file
from csd3d.media.videos import SUFFIXES

MAX_SIDE = 1920  # of a frame as it is written; larger ones are averaged down
LEAST_SIDE = 32  # pixels
LOOK_SIDE = 640  # of a frame as it is judged
MAX_LOOKED_AT = 100_000  # frames of a film
LEAST_FRAMES = 8
BLUR = 0.75  # of a picture (Crete et al. 2007), 0 sharp to 1: below 0.55 in sharp ones, 0.8 where no detail is left
MUCH_LESS_SHARP = 0.35  # of the median sharpness round a frame: left out
ALIKE = 0.4  # grey levels of 255: mean difference of two thumbnails of 32x32 that show the same from the same place


@dataclass
class Chosen:
    """Frames written to a folder: their files, and what each is of the source: a photo's name or a frame's number."""

    files: list[str] = field(default_factory=list)
    origins: list[str | int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    looked_at: int = 0
    blurred: int = 0
    repeated: int = 0


@dataclass(frozen=True)
class Look:
    """A frame in small: variance of its Laplacian, and a thumbnail [32, 32]."""

    sharpness: float
    thumbnail: np.ndarray


def choose_frames(path: Path, count: int, folder: Path, tell: Callable[[str], None]) -> Chosen:
    """Writes up to `count` frames of `path`, a film or a folder of photos, as PNG to `folder`.

    Raises InputError where nothing can be read, where fewer than `LEAST_FRAMES` differ, or where they are blurred.
    """
    if not path.exists():
        raise InputError(f"{path}: no such film or folder of photos")
    looks, write = _photos(path, tell) if path.is_dir() else _film(path, tell)
    best, chosen = pick(looks, count)
    chosen.looked_at = len(looks)
    if len(best) < LEAST_FRAMES:
        left_out = f"{len(looks)} frames, {chosen.blurred} blurred, {chosen.repeated} the same as the one before"
        raise InputError(
            f"{path}: {len(best)} usable frames ({left_out}); expected at least {LEAST_FRAMES}: "
            "film for longer, and walk around what you film"
        )
    write(best, folder, chosen)
    blur = np.median([_blur(folder / file) for file in chosen.files[:: max(1, len(chosen.files) // 20)]])
    if blur > BLUR:
        raise InputError(
            f"{path}: too blurred to find details in (blur {blur:.2f} of 1; sharp pictures have 0.2 to 0.55); "
            "film slowly, in good light, with the focus on the object"
        )
    return chosen


def pick(looks: Sequence[Look], count: int) -> tuple[list[int], Chosen]:
    """The sharpest frame of each of `count` equal parts, without those that are blurred or repeat the one before."""
    chosen = Chosen()
    edges = np.linspace(0, len(looks), min(count, len(looks)) + 1).round().astype(int)
    best = [max(range(a, b), key=lambda i: looks[i].sharpness) for a, b in itertools.pairwise(edges)]
    kept: list[int] = []
    for place, i in enumerate(best):
        around = [looks[j].sharpness for j in best[max(0, place - 5) : place + 6]]
        if looks[i].sharpness < MUCH_LESS_SHARP * np.median(around):
            chosen.blurred += 1
        elif kept and np.abs(looks[i].thumbnail - looks[kept[-1]].thumbnail).mean() < ALIKE:
            chosen.repeated += 1
        else:
            kept.append(i)
    return kept, chosen


def look(grey: np.ndarray) -> Look:
    """What is kept of a frame [H, W] uint8."""
    thumbnail = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    return Look(float(cv2.Laplacian(grey, cv2.CV_32F).var()), thumbnail)


def _blur(file: Path) -> float:
    return float(blur_effect(_small(cv2.imread(str(file), cv2.IMREAD_GRAYSCALE))))


def _small(grey: np.ndarray) -> np.ndarray:
    height, width = grey.shape
    scale = min(1.0, LOOK_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return grey if scale == 1 else cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


Write = Callable[[list[int], Path, Chosen], None]


def _add(chosen: Chosen, folder: Path, rgb: np.ndarray, origin: str | int) -> None:
    """Writes one frame [H, W, 3] uint8 under the next number."""
    name = f"{len(chosen.files):05}.png"
    if not cv2.imwrite(str(folder / name), rgb[:, :, ::-1]):
        raise InputError(f"{folder / name}: cannot be written; is the disk full?")
    chosen.files.append(name)
    chosen.origins.append(origin)
    chosen.sizes.append((rgb.shape[1], rgb.shape[0]))


# ------------------------------------------------------------------------------------------------------------- photos


def photos_of(folder: Path) -> list[Path]:
    """The pictures of a folder, 2 after 1 and before 10."""
    files = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    return sorted((file for file in files if file.is_file()), key=lambda file: natural_key(file.name))


def _photos(folder: Path, tell: Callable[[str], None]) -> tuple[list[Look], Write]:
    files = photos_of(folder)
    if not files:
        raise InputError(f"{folder}: no photos in this folder; expected pictures ({', '.join(SUFFIXES)})")
    tell(f"looking at {len(files)} photos")
    looks = [look(_small(cv2.cvtColor(_photo(file), cv2.COLOR_RGB2GRAY))) for file in files]

    def write(best: list[int], into: Path, chosen: Chosen) -> None:
        for i in best:
            _add(chosen, into, _photo(files[i]), files[i].name)

    return looks, write


def _photo(file: Path) -> np.ndarray:
    """A photo as displayed, no side over `MAX_SIDE`, white behind transparency: [H, W, 3] uint8."""
    image_size(file, MAX_PIXELS)  # refuses larger ones before they are decoded
    values, _ = decode(file, "white", turned=True)
    height, width = values.shape[:2]
    if min(height, width) < LEAST_SIDE:
        raise InputError(f"{file}: {width}x{height} pixels; expected at least {LEAST_SIDE} a side")
    scale = min(1.0, MAX_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.round(255 * area_resize(values, *size)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------- film


def _film(path: Path, tell: Callable[[str], None]) -> tuple[list[Look], Write]:
    check_file(path, "a film or a folder of photos")
    looks = []
    for grey in _decoded(path, _fit(LOOK_SIDE), "gray", "pgm"):
        looks.append(look(grey[:, :, 0]))
        if len(looks) % 500 == 0:
            tell(f"looking for sharp frames: {len(looks)} seen")
        if len(looks) > MAX_LOOKED_AT:
            raise InputError(f"{path}: more than {MAX_LOOKED_AT} frames; cut it")

    def write(best: list[int], into: Path, chosen: Chosen) -> None:
        wanted = "+".join(f"eq(n,{i})" for i in best)
        frames = _decoded(path, f"select='{wanted}',{_fit(MAX_SIDE)}", "rgb24", "ppm")
        for i, rgb in zip(best, frames, strict=False):
            _add(chosen, into, rgb, i)
        frames.close()
        if len(chosen.files) < len(best):
            raise InputError(
                f"{path}: only {len(chosen.files)} of {len(best)} chosen frames were decoded again; try again"
            )

    return looks, write


def _fit(side: int) -> str:
    return f"scale=w='min({side},iw)':h='min({side},ih)':force_original_aspect_ratio=decrease:flags=area"


def _decoded(path: Path, filters: str, pixels: str, codec: str) -> Iterator[np.ndarray]:
    """The frames of a film, through ffmpeg's `filters`: [H, W, 1 or 3] uint8, upright. InputError where there are none.

    A film that breaks off ends there.
    """
    output = ["-map", "0:V:0", "-fps_mode", "passthrough", "-vf", filters, "-pix_fmt", pixels]
    output += ["-c:v", codec, "-f", "image2pipe", "pipe:1"]
    limits = ["-fflags", "+discardcorrupt", "-max_pixels", str(MAX_PIXELS)]
    found = False
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        arguments = command(*limits, *source(path), *output)
        process = start(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        try:
            for frame in read_pictures(process.stdout):
                found = True
                yield frame
            if how := killed(process.wait()):
                raise InputError(f"{path}: decoding stopped early, as ffmpeg did not end by itself ({how}); try again")
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        errors.seek(0)
        problem = complaint(errors.read(2**20))
    if not found:
        raise InputError(f"{path}: no frame can be decoded ({problem or 'it holds no pictures'}); expected a film")
