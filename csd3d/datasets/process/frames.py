"""Sharp frames of a film, or the photos of a folder, evenly chosen: blurred ones and repetitions are left out.

Two passes, so that a film of any length needs little memory and disk: one looks at every frame in small, the other
writes the chosen ones.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from skimage.measure import blur_effect

from csd3d.datasets.process.film import Film
from csd3d.datasets.process.photos import Photos, shrunk
from csd3d.errors import InputError
from csd3d.files import write_bytes

LOOK_SIDE = 640  # of a frame as it is judged
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
    focals: list[float | None] = field(default_factory=list)  # in pixels, where the source tells
    notes: list[str] = field(default_factory=list)  # what is out of the ordinary
    looked_at: int = 0
    blurred: int = 0
    repeated: int = 0


@dataclass(frozen=True)
class Look:
    """A frame in small: variance of its Laplacian, and a thumbnail [32, 32] uint8."""

    sharpness: float
    thumbnail: np.ndarray


def choose_frames(path: Path, count: int, folder: Path, tell: Callable[[str], None]) -> Chosen:
    """Writes up to `count` frames of `path`, a film or a folder of photos, as PNG to `folder`.

    Raises InputError where nothing can be read, where fewer than `LEAST_FRAMES` differ, or where they are blurred.
    """
    if not path.exists():
        raise InputError(f"{path}: no such film or folder of photos")
    source = Photos(path, tell) if path.is_dir() else Film(path, tell)
    looks = [look(grey) for grey in source.in_small(LOOK_SIDE)]
    best, chosen = pick(looks, count)
    chosen.looked_at = len(looks)
    if len(best) < LEAST_FRAMES:
        left_out = f"{len(looks)} frames, {chosen.blurred} blurred, {chosen.repeated} the same as the one before"
        raise InputError(
            f"{path}: {len(best)} usable frames ({left_out}); expected at least {LEAST_FRAMES}: "
            "film for longer, and walk around what you film"
        )
    for i, rgb in zip(best, source.chosen(best), strict=True):
        _write(chosen, folder, rgb, source.origin(i))
    chosen.focals = [source.focal(i, size) for i, size in zip(best, chosen.sizes, strict=True)]
    chosen.notes = source.notes
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
        elif kept and _apart(looks[i], looks[kept[-1]]) < ALIKE:
            chosen.repeated += 1
        else:
            kept.append(i)
    return kept, chosen


def look(grey: np.ndarray) -> Look:
    """What is kept of a frame [H, W] uint8."""
    thumbnail = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA)
    return Look(float(cv2.Laplacian(grey, cv2.CV_32F).var()), thumbnail)


def _apart(one: Look, other: Look) -> float:
    """The mean difference of two thumbnails, in grey levels of 255."""
    return float(np.abs(np.subtract(one.thumbnail, other.thumbnail, dtype=np.float32)).mean())


def _blur(file: Path) -> float:
    grey = shrunk(cv2.imread(str(file), cv2.IMREAD_GRAYSCALE), LOOK_SIDE)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 in a picture of one colour
        blur = float(blur_effect(grey))
    return blur if np.isfinite(blur) else 1.0


def _write(chosen: Chosen, folder: Path, rgb: np.ndarray, origin: str | int) -> None:
    """Writes one frame [H, W, 3] uint8 under the next number."""
    name = f"{len(chosen.files):05}.png"
    _, encoded = cv2.imencode(".png", rgb[:, :, ::-1])
    write_bytes(folder / name, encoded.tobytes())
    chosen.files.append(name)
    chosen.origins.append(origin)
    chosen.sizes.append((rgb.shape[1], rgb.shape[0]))
