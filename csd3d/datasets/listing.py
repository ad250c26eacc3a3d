"""What a reader returns: the frames of a capture and what holds for all of them, before any picture is decoded.

A reader is a registered dataclass, whose fields are keys of `scene.reader`:

    @register("reader", "colmap", title="COLMAP")
    @dataclass(frozen=True)
    class Colmap:
        images: str = "images"  # the folder of the pictures, inside the capture

        wants: ClassVar[str] = "sparse/0/cameras.bin"

        @staticmethod
        def matches(path: Path) -> bool:
            return (path / "sparse/0/cameras.bin").is_file()

        def read(self, path: Path) -> Listing: ...

`csd3d.datasets.capture` does the rest for all formats: split, normalisation, picture sizes, decoding.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from csd3d import registry
from csd3d.datasets.reading import nearest_rigid, outside_allowed, shown
from csd3d.errors import InputError
from csd3d.files import natural_key

log = logging.getLogger("csd3d")
Pair = tuple[float | None, float | None]  # along x and y


@dataclass(frozen=True)
class Frame:
    """One listed picture: its file, pose and intrinsics (None: not given)."""

    where: str  # file and key, for messages
    name: str
    file: Path | None  # None: listed, but missing
    pose: np.ndarray  # [4, 4] camera to world, OpenGL axes: x right, y up, z backwards
    mask: Path | None = None  # a picture that is 0 at pixels to ignore
    focal: Pair = (None, None)  # in pixels; if only one is given it is used for both axes
    angle: Pair = (None, None)  # field of view in radians, if no focal length is given
    centre: Pair = (None, None)  # principal point in pixels; default: the middle
    size: tuple[int | None, int | None] = (None, None)  # width, height that the intrinsics refer to
    lens: tuple[float, ...] = (0.0,) * 6  # k1 k2 k3 k4 p1 p2, for FULL_OPENCV also q1 q2 q3 (see csd3d.cameras)
    fisheye: bool = False
    split: str | None = None  # "train" | "test"; if no frame has one, every n-th is held out
    pose_scale: float = 1.0  # by which the listed camera matrix was divided to be a rigid motion
    cut: int | None = None  # face to cut out, if the file is a panorama (csd3d.datasets.panoramas)


@dataclass(frozen=True)
class Points:
    """Sparse points of a capture, as from structure from motion, for representations that start from them."""

    xyz: np.ndarray  # [P, 3] float64, in the frame of the poses
    rgb: np.ndarray  # [P, 3] float32 in 0..1


@dataclass(frozen=True)
class Listing:
    """The checked contents of a capture. Poses are in the capture's own frame unless `applied_*` are given."""

    frames: list[Frame]  # in the order of the capture, most often `sorted_by_name`
    folder: Path
    file: Path  # for messages
    bounded: bool = False  # the scene is inside `box`, and the poses keep their frame
    box: np.ndarray | None = None  # [2, 3] smallest and largest corner, in the frame of the poses
    points: Points | None = None
    applied_transform: np.ndarray = field(default_factory=lambda: np.eye(4))  # [4, 4]: own frame -> frame of the poses
    applied_scale: float = 1.0  # applied after applied_transform
    reader: str = ""  # title of the reader, set by `read_listing`
    splats: Path | None = None  # a `.ply` of the splats that the scene already is, in the capture's own frame


class Reader(Protocol):
    """The interface of a registered "reader"."""

    wants: ClassVar[str]  # the file that it looks for, for messages

    @staticmethod
    def matches(path: Path) -> bool:
        """Return whether it can read this folder or file, judged by names only, which is quick."""

    def read(self, path: Path) -> Listing:
        """Read and check a capture. Raises InputError, one line that names file and key."""


def read_listing(path: Path, reader: Reader | None = None, allow_outside: bool = False) -> Listing:
    """Read `path`, a folder or a file, with `reader`; None: the one registered reader that recognises it.

    allow_outside: listed files may lie outside the folder, or be links that lead out of it.
    Raises InputError if no reader does or several do, and if two frames list the same picture.
    """
    try:
        exists = path.exists()
    except OSError as error:
        raise InputError(f"scene.path: {shown(str(path))} cannot be read ({error.strerror})") from error
    if not exists:
        raise InputError(f"scene.path: {path} does not exist; expected a capture's folder or its JSON file")
    reader = reader or find_reader(path)
    try:
        with outside_allowed(allow_outside):
            listing = reader.read(path)
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # readers need not catch these
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"scene.path: {path}: {type(reader).__name__} cannot read it ({reason})") from error
    _check_types(listing, f"scene.path: {path}: {type(reader).__name__}")
    _refuse_duplicates(listing.frames)
    scaled = [frame for frame in listing.frames if frame.pose_scale != 1]
    if scaled:
        told = f"{scaled[0].where}: camera matrix scaled by {scaled[0].pose_scale:.6g}"
        log.warning("%s: its 3x3 part is divided by that, as are those of %d frames in all", told, len(scaled))
    entry = registry.entry_of("reader", reader)
    return replace(listing, frames=[_rigid(frame) for frame in listing.frames], reader=entry.title if entry else "")


def find_reader(path: Path) -> Reader:
    """The one reader that recognises `path`, with its default settings; InputError if none or several do."""
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
    """Sort by name, with numbers by value: r_2 before r_10."""
    return sorted(frames, key=lambda frame: natural_key(frame.name))


def _check_types(listing: Any, at: str) -> None:
    """Raise InputError, one line that begins with `at`, unless a reader returned what it should."""
    if not isinstance(listing, Listing):
        raise InputError(f"{at}: read returned {_kind(listing)}; expected a Listing")
    for frame in listing.frames:
        if not isinstance(frame, Frame):
            raise InputError(f"{at}: frames holds {_kind(frame)}; expected Frame")
        if _shape(frame.pose) != (4, 4):
            raise InputError(f"{frame.where}: pose is {_kind(frame.pose)}; expected an array [4, 4]")
    if listing.box is not None and _shape(listing.box) != (2, 3):
        raise InputError(f"{at}: box is {_kind(listing.box)}; expected an array [2, 3]")
    points = listing.points
    if points is not None:
        if not isinstance(points, Points):
            raise InputError(f"{at}: points is {_kind(points)}; expected Points(xyz [P, 3], rgb [P, 3])")
        shapes = _shape(points.xyz), _shape(points.rgb)
        if shapes[0] != shapes[1] or shapes[0][1:] != (3,):
            kinds = f"{_kind(points.xyz)} and {_kind(points.rgb)}"
            raise InputError(f"{at}: points has {kinds}; expected arrays xyz [P, 3] and rgb [P, 3]")


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of an array of numbers; () of anything else."""
    return value.shape if isinstance(value, np.ndarray) and value.dtype.kind in "fiu" else ()


def _kind(value: Any) -> str:
    kind = type(value).__name__
    return f"a {kind} {list(value.shape)} of {value.dtype}" if isinstance(value, np.ndarray) else f"a {kind}"


def _rigid(frame: Frame) -> Frame:
    """The frame with its pose made exactly rigid; InputError if that is no rigid motion, whoever read it."""
    pose = nearest_rigid(frame.pose.astype(np.float64), f"{frame.where}: pose")
    return frame if np.allclose(frame.pose, pose, rtol=0, atol=1e-9) else replace(frame, pose=pose)


def _refuse_duplicates(frames: list[Frame]) -> None:
    seen: dict[tuple[Path | str, int | None], Frame] = {}
    for frame in frames:
        first = seen.setdefault((frame.file or frame.name, frame.cut), frame)
        if first is not frame:
            raise InputError(f"{frame.where}.file_path: {shown(frame.name)} is listed already, by {first.where}")
