"""A folder of photos as frames for frames.py, and the focal length that their EXIF tells."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from csd3d.datasets.images import MAX_PIXELS, area_resize, decode
from csd3d.errors import InputError
from csd3d.files import natural_key
from csd3d.media.pictures import opened, upright_size
from csd3d.media.videos import SUFFIXES

MAX_SIDE = 1920  # of a photo or frame as it is written; larger ones are averaged down
LEAST_SIDE = 32  # pixels
LEAST_FOCAL, MOST_FOCAL = 0.2, 20  # focal lengths over the longer side that are believed
EXIF_IFD, FOCAL_MM, FOCAL_35MM, PLANE_X, PLANE_UNIT = 0x8769, 0x920A, 0xA405, 0xA20E, 0xA210
DIAGONAL_35MM = math.hypot(36, 24)  # to which focal lengths "in 35 mm film" refer (CIPA DCG-001)
UNIT_MM = {2: 25.4, 3: 10.0, 4: 1.0}  # of the resolution of the sensor


class Photos:
    """The photos of a folder, upright, white behind transparency, no side over `MAX_SIDE`."""

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self.files, self.notes = photos_of(folder), []
        if not self.files:
            raise InputError(f"{folder}: no photos in this folder; expected pictures ({', '.join(SUFFIXES)})")
        tell(f"looking at {len(self.files)} photos")

    def in_small(self, side: int) -> Iterator[np.ndarray]:
        """Every photo, no side over `side`: [H, W] uint8, grey. Looks at all before one is refused."""
        refused = []
        for file in self.files:
            try:
                yield shrunk(cv2.cvtColor(_read(file), cv2.COLOR_RGB2GRAY), side)
            except InputError as error:
                refused.append(error)
        if len(refused) > 1:
            raise InputError(f"{refused[0]}; and {len(refused) - 1} more of {len(self.files)} photos are of no use")
        if refused:
            raise refused[0]

    def chosen(self, numbers: list[int]) -> Iterator[np.ndarray]:
        """The photos `numbers`: [H, W, 3] uint8."""
        return (_read(self.files[i]) for i in numbers)

    def origin(self, number: int) -> str:
        return self.files[number].name

    def focal(self, number: int, size: tuple[int, int]) -> float | None:
        """The focal length in pixels of a photo of `size` (width, height) as written, from its EXIF; None without."""
        with opened(self.files[number]) as image:
            width, height = upright_size(image)
            found = exif_focal(image.getexif().get_ifd(EXIF_IFD), width, height)
        return found and found * max(size) / max(width, height)


def photos_of(folder: Path) -> list[Path]:
    """The pictures of a folder, 2 after 1 and before 10."""
    files = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    return sorted((file for file in files if file.is_file()), key=lambda file: natural_key(file.name))


def exif_focal(tags: dict[int, Any], width: int, height: int) -> float | None:
    """The focal length in pixels of a photo of `width` x `height` with the EXIF `tags`; None where they do not tell it.

    From the length in 35 mm film, whose diagonal is 43.3 mm, as COLMAP has it; or from the length in mm and the pixels
    of the sensor to the mm, which count if they make the sensor 2 to 100 mm wide.
    """
    film, focal, pixels = (_number(tags.get(key)) for key in (FOCAL_35MM, FOCAL_MM, PLANE_X))
    found = film / DIAGONAL_35MM * math.hypot(width, height)
    if not film and focal and pixels:
        per_mm = pixels / UNIT_MM.get(tags.get(PLANE_UNIT, 2), 25.4)
        found = focal * per_mm if 2 <= max(width, height) / per_mm <= 100 else 0.0
    return found if LEAST_FOCAL <= found / max(width, height) <= MOST_FOCAL else None


def _number(value: Any) -> float:
    """A value of EXIF as a number; 0 for what is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return 0.0
    return number if math.isfinite(number) else 0.0


def shrunk(grey: np.ndarray, side: int) -> np.ndarray:
    """A picture [H, W] uint8 averaged down until no side is over `side`."""
    height, width = grey.shape
    size = _fitting(width, height, side)
    return grey if size == (width, height) else cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


def _fitting(width: int, height: int, side: int) -> tuple[int, int]:
    """The size (width, height), shrunk until no side is over `side`."""
    scale = min(1.0, side / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _read(file: Path) -> np.ndarray:
    """A photo as displayed, no side over `MAX_SIDE`, white behind transparency: [H, W, 3] uint8."""
    with opened(file) as image:
        width, height = upright_size(image)
    if width * height > MAX_PIXELS or file.stat().st_size > 8 * MAX_PIXELS + 2**20:  # before it is decoded
        raise InputError(
            f"{file}: {width}x{height} pixels, {file.stat().st_size} bytes; at most {MAX_PIXELS} pixels "
            "are read: make it smaller"
        )
    if min(height, width) < LEAST_SIDE:
        raise InputError(f"{file}: {width}x{height} pixels; expected at least {LEAST_SIDE} a side")
    values, _ = decode(file, "white", turned=True)
    return np.round(255 * area_resize(values, *_fitting(width, height, MAX_SIDE))).astype(np.uint8)
