"""What a reader makes of a capture, before any picture is decoded: frames, and what holds for all of them.

A reader is a dataclass, whose fields are keys of `scene.reader`, and which is registered:

    @register("reader", "colmap", title="COLMAP")
    @dataclass(frozen=True)
    class Colmap:
        images: str = "images"  # the folder of the pictures, inside the capture

        wants: ClassVar[str] = "sparse/0/cameras.bin"

        @staticmethod
        def matches(path: Path) -> bool:
            return (path / "sparse/0/cameras.bin").is_file()

        def read(self, path: Path) -> Listing: ...

`csd3d.datasets.capture` does the rest for all formats alike: split, normalisation, one raster, decoding.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from csd3d import registry
from csd3d.datasets.reading import shown
from csd3d.errors import InputError

Pair = tuple[float | None, float | None]  # along x and y


@dataclass(frozen=True)
class Frame:
    """One picture as listed: where it is, its pose and its intrinsics (None: not given, to be had from the picture)."""

    where: str  # file and key, for messages
    name: str
    file: Path | None  # None: listed, but missing
    pose: np.ndarray  # [4, 4] camera to world, OpenGL axes: x right, y up, z backwards
    mask: Path | None = None  # where it is 0, pixels are not to be learned from
    focal: Pair = (None, None)  # in pixels; where only one is given it serves for both
    angle: Pair = (None, None)  # field of view in radians, where no focal length is given
    centre: Pair = (None, None)  # principal point in pixels; the middle where not given
    size: tuple[int | None, int | None] = (None, None)  # width, height that the intrinsics are about
    lens: tuple[float, ...] = (0.0,) * 6  # k1 k2 k3 k4 p1 p2, of FULL_OPENCV also q1 q2 q3 (see csd3d.cameras)
    fisheye: bool = False
    split: str | None = None  # "train" | "test"; where no frame says, every n-th is held out
    cut: int | None = None  # the file is a panorama, and this the face to cut out of it (csd3d.datasets.panoramas)


@dataclass(frozen=True)
class Points:
    """Sparse points of a capture, such as structure from motion finds, for representations that start from them."""

    xyz: np.ndarray  # [P, 3] float64, in the frame of the poses
    rgb: np.ndarray  # [P, 3] float32 in 0..1


@dataclass(frozen=True)
class Listing:
    """What a capture says of itself, checked. The frame of the poses is the capture's own unless `applied_*` say so."""

    frames: list[Frame]  # in the order that the capture will have; `sorted_by_name` is the usual one
    folder: Path
    file: Path  # for messages
    bounded: bool = False  # all that matters is inside `box`, and the frame of the poses is to be kept
    box: np.ndarray | None = None  # [2, 3] smallest and largest corner, in the frame of the poses
    points: Points | None = None
    applied_transform: np.ndarray = field(default_factory=lambda: np.eye(4))  # [4, 4]: own frame -> that of the poses
    applied_scale: float = 1.0  # applied after it


class Reader(Protocol):
    """What is registered as a "reader"."""

    wants: ClassVar[str]  # the file it looks for, for messages

    @staticmethod
    def matches(path: Path) -> bool:
        """Whether it reads this folder or file, found out quickly: by names, not by contents."""

    def read(self, path: Path) -> Listing:
        """Reads and checks what the capture says. Raises InputError, one line that names file and key."""


def read_listing(path: Path, reader: Reader | None = None) -> Listing:
    """What `reader` makes of `path`, a folder or a file; None: the one registered reader that knows it.

    Raises InputError where none or several do, and where two frames list the same picture.
    """
    try:
        exists = path.exists()
    except OSError as error:
        raise InputError(f"scene.path: {shown(str(path))} cannot be read ({error.strerror})") from error
    if not exists:
        raise InputError(f"scene.path: {path} does not exist; expected a capture's folder or its JSON file")
    reader = reader or find_reader(path)
    try:
        listing = reader.read(path)
    except InputError:
        raise
    except (OSError, ValueError, LookupError) as error:  # of a reader that leaves its files' faults to us
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"scene.path: {path}: {type(reader).__name__} cannot read it ({reason})") from error
    _refuse_duplicates(listing.frames)
    return listing


def find_reader(path: Path) -> Reader:
    """The one reader that knows what `path` holds, with its default settings; InputError where none or several do."""
    known = registry.entries("reader")
    found = [entry for entry in known if entry.thing.matches(path)]
    if len(found) == 1:
        return found[0].thing()
    if found:
        names = ", ".join(entry.name for entry in found)
        raise InputError(f"scene.path: {path} is known to several readers ({names}); choose one with scene.reader=NAME")
    wanted = ", ".join(f"{getattr(entry.thing, 'wants', '?')} ({entry.title})" for entry in known)
    raise InputError(f"scene.path: {path} holds nothing that a reader knows; expected {wanted}")


def sorted_by_name(frames: list[Frame]) -> list[Frame]:
    """By name, numbers in it by value: r_2 before r_10."""

    def key(frame: Frame) -> list[tuple[bool, int, str]]:
        parts = re.split(r"([0-9]{1,18})", frame.name)
        return [(i % 2 == 1, int(part) if i % 2 else 0, part) for i, part in enumerate(parts)]

    return sorted(frames, key=key)


def _refuse_duplicates(frames: list[Frame]) -> None:
    seen: dict[tuple[Path | str, int | None], Frame] = {}
    for frame in frames:
        first = seen.setdefault((frame.file or frame.name, frame.cut), frame)
        if first is not frame:
            raise InputError(f"{frame.where}.file_path: {shown(frame.name)} is listed already, by {first.where}")
