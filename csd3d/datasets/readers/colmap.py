"""COLMAP's reconstructions: cameras, images and points3D as .bin or .txt, with their pictures in a folder beside them.

https://colmap.github.io/format.html. Poses there go from the world to the camera, in OpenCV's axes; the file formats
are read here, so that COLMAP need not be installed. Counts are checked against the size of the file first.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from csd3d.datasets.listing import Frame, Listing, Points, sorted_by_name
from csd3d.datasets.reading import listed_file, shown
from csd3d.errors import InputError
from csd3d.registry import register

FOLDERS = ("sparse/0", "sparse", "colmap/sparse/0", ".")
MAX_BYTES = 8 * 2**30  # of one file; it is mapped, not loaded
MAX_TEXT_BYTES = 512 * 2**20
MODELS = (  # in the order of COLMAP's numbers; what follows the focal length(s) and the principal point
    *(("SIMPLE_PINHOLE", 1, ()), ("PINHOLE", 2, ()), ("SIMPLE_RADIAL", 1, ("k1",)), ("RADIAL", 1, ("k1", "k2"))),
    *(("OPENCV", 2, ("k1", "k2", "p1", "p2")), ("OPENCV_FISHEYE", 2, ("k1", "k2", "k3", "k4"))),
    ("FULL_OPENCV", 2, ("k1", "k2", "p1", "p2", "k3", "q1", "q2", "q3")),
    *(("FOV", 2, ("?",)), ("SIMPLE_RADIAL_FISHEYE", 1, ("k1",)), ("RADIAL_FISHEYE", 1, ("k1", "k2"))),
    *(("THIN_PRISM_FISHEYE", 2, ("?",) * 8), ("RAD_TAN_THIN_PRISM_FISHEYE", 2, ("?",) * 12)),
    *(("SIMPLE_DIVISION", 1, ("?",)), ("DIVISION", 2, ("?",)), ("SIMPLE_FISHEYE", 1, ()), ("FISHEYE", 2, ())),
    *(("EUCM", 2, ("?",) * 2), ("EQUIRECTANGULAR", 0, ("?",))),  # the last has width and height as parameters
)
ORDER = ("k1", "k2", "k3", "k4", "p1", "p2", "q1", "q2", "q3")  # csd3d.cameras'


@dataclass(frozen=True)
class Lens:
    """A camera of cameras.bin or cameras.txt; `lens` as csd3d.cameras has it."""

    width: int
    height: int
    focal: tuple[float, float]
    centre: tuple[float, float]
    lens: tuple[float, ...]
    fisheye: bool


@register("reader", "colmap", title="COLMAP")
@dataclass(frozen=True)
class Colmap:
    """A COLMAP reconstruction, binary or text, with its sparse points (Schönberger and Frahm 2016).

    All camera models but FOV, the thin prism, division and EUCM ones, which `colmap image_undistorter` takes away.

        scene: {path: captures/garden, reader: {type: colmap, images: images_4}}
    """

    images: str = "images"  # the folder of the pictures, inside the capture

    wants: ClassVar[str] = "sparse/0/cameras.bin or .txt"

    @staticmethod
    def matches(path: Path) -> bool:
        has_json = (path / "transforms.json").exists() or (path / "transforms_train.json").exists()
        return not has_json and model_folder(path) is not None

    def read(self, path: Path) -> Listing:
        model = model_folder(path)
        if model is None:
            raise InputError(f"scene.path: {path} holds no COLMAP model; expected {self.wants}")
        suffix = ".bin" if (model / "cameras.bin").exists() else ".txt"
        read = _BINARY if suffix == ".bin" else _TEXT
        files = [model / f"{name}{suffix}" for name in ("cameras", "images", "points3D")]
        lenses = _whole(files[0], read[0])
        found = _whole(files[1], read[1])
        if not found:
            raise InputError(f"{files[1]}: holds no image; expected at least one")
        frames = [self._frame(path, files[1], i, row, lenses) for i, row in enumerate(found)]
        points = _whole(files[2], read[2]) if files[2].exists() else None
        return Listing(sorted_by_name(frames), folder=path, file=files[1], points=points)

    def _frame(self, path: Path, file: Path, i: int, row: tuple, lenses: dict[int, Lens]) -> Frame:
        name, quaternion, translation, camera = row
        where = f"{file}: image {i + 1}"
        if camera not in lenses:
            raise InputError(f"{where}: {shown(name)} has camera {camera}, which {file.with_stem('cameras')} lacks")
        lens = lenses[camera]
        return Frame(
            where=where,
            name=name,
            file=listed_file(path, f"{self.images}/{name}", where),
            pose=camera_to_world(quaternion, translation, where),
            focal=lens.focal,
            centre=lens.centre,
            size=(lens.width, lens.height),
            lens=lens.lens,
            fisheye=lens.fisheye,
        )


def model_folder(path: Path) -> Path | None:
    """Where below `path` the model is: the first of `FOLDERS` with cameras and images."""
    for folder in FOLDERS:
        for suffix in (".bin", ".txt"):
            if all((path / folder / f"{name}{suffix}").is_file() for name in ("cameras", "images")):
                return path / folder
    return None


def camera_to_world(quaternion: np.ndarray, translation: np.ndarray, where: str) -> np.ndarray:
    """[4, 4] in OpenGL axes of COLMAP's x_camera = R(w, x, y, z) x_world + t; InputError for what is no pose."""
    pose = pose_of(quaternion[[1, 2, 3, 0]], np.zeros(3), where)
    if not np.isfinite(translation).all() or np.abs(translation).max() > 1e8:
        raise InputError(f"{where}: its position is {shown(translation.tolist())}; expected coordinates within 1e8")
    rotation = pose[:3, :3].T.copy()  # camera to world
    pose[:3, :3] = rotation * (1.0, -1.0, -1.0)
    pose[:3, 3] = -rotation @ translation
    return pose


def pose_of(quaternion: np.ndarray, position: np.ndarray, where: str) -> np.ndarray:
    """[4, 4] of a quaternion x, y, z, w and a position; InputError unless both are finite and the first not zero."""
    length = np.linalg.norm(quaternion)
    if not 1e-6 < length < 1e6 or not np.isfinite(position).all() or np.abs(position).max() > 1e8:
        raise InputError(
            f"{where}: {shown([*quaternion.tolist(), *position.tolist()])}; expected a rotation and a place"
        )
    x, y, z, w = quaternion / length
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = position
    return pose


def make_lens(model: str, width: int, height: int, values: list[float], where: str) -> Lens:
    """A camera of COLMAP's as csd3d has it; InputError for a model that it does not have, or values out of range."""
    known = {name: (count, keys) for name, count, keys in MODELS}
    if model not in known:
        raise InputError(f"{where}: camera model {shown(model)} is not COLMAP's; expected {', '.join(known)}")
    count, keys = known[model]
    if "?" in keys:
        hint = "undistort the pictures first: colmap image_undistorter, or csd3d process on the photos"
        raise InputError(f"{where}: camera model {model} cannot be read as it is; {hint}")
    if not (1 <= width <= 10**6 and 1 <= height <= 10**6):
        raise InputError(f"{where}: {width}x{height} pixels; expected 1 to 1000000")
    if len(values) != count + 2 + len(keys) or not all(math.isfinite(value) for value in values):
        raise InputError(f"{where}: {shown(values)}; expected {count + 2 + len(keys)} numbers for {model}")
    focal, centre, rest = values[:count], values[count : count + 2], values[count + 2 :]
    if not all(1e-6 < f < 1e9 for f in focal) or any(abs(k) > 1e4 for k in rest):
        raise InputError(f"{where}: {shown(values)}; expected a focal length in pixels and a lens's coefficients")
    found = dict(zip(keys, rest, strict=True))
    lens = tuple(found.get(key, 0.0) for key in (ORDER if "q1" in found else ORDER[:6]))
    return Lens(width, height, (focal[0], focal[-1]), tuple(centre), lens, "FISHEYE" in model)


def _whole(file: Path, read: Callable[[Path], object]):
    """What `read` makes of a file; InputError in one line for one that is missing, too short or malformed."""
    try:
        return read(file)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise InputError(f"{file}: is cut short or malformed ({' '.join(str(error).split())[:120]})") from error


# ------------------------------------------------------------------------------------------------------------- binary


class _Bytes:
    """Little-endian numbers from a mapped file, one behind the other. struct.error past its end."""

    def __init__(self, file: Path) -> None:
        size = file.stat().st_size
        if not 8 <= size <= MAX_BYTES:
            raise InputError(f"{file}: {size} bytes; expected 8 to {MAX_BYTES}")
        with file.open("rb") as opened:
            self.data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self.at, self.file = 0, file

    def take(self, layout: str) -> tuple:
        values = struct.unpack_from(f"<{layout}", self.data, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return values

    def skip(self, count: int, size: int) -> None:
        if count * size > len(self.data) - self.at:
            raise InputError(f"{self.file}: ends before its {count} entries do")
        self.at += count * size

    def count(self, least: int) -> int:
        """The number of records that follow, of at least `least` bytes each."""
        (count,) = self.take("Q")
        if count * least > len(self.data) - self.at:
            raise InputError(f"{self.file}: {count} records do not fit in its {len(self.data)} bytes")
        return count

    def name(self) -> str:
        end = self.data.find(b"\0", self.at, self.at + 4096)
        if end < 0:
            raise InputError(f"{self.file}: a name has no end; expected a zero byte behind it")
        name = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return name


def _binary_cameras(file: Path) -> dict[int, Lens]:
    data, lenses = _Bytes(file), {}
    for _ in range(data.count(24)):
        number, model, width, height = data.take("iiQQ")
        where = f"{file}: camera {number}"
        if not 0 <= model < len(MODELS):
            raise InputError(f"{where}: camera model number {model}; COLMAP's go to {len(MODELS) - 1}")
        name, count, keys = MODELS[model]
        lenses[number] = make_lens(name, width, height, list(data.take(f"{count + 2 + len(keys)}d")), where)
    return lenses


def _binary_images(file: Path) -> list[tuple]:
    data, rows = _Bytes(file), []
    for _ in range(data.count(73)):
        _, *pose, camera = data.take("I7dI")
        name = data.name()
        data.skip(data.take("Q")[0], 24)  # the features: x, y, point
        rows.append((name, np.array(pose[:4]), np.array(pose[4:]), camera))
    return rows


def _binary_points(file: Path) -> Points:
    data = _Bytes(file)
    count = data.count(51)
    xyz, rgb = np.empty((count, 3)), np.empty((count, 3), np.float32)
    for i in range(count):
        _, *values, _, track = data.take("Q3d3BdQ")
        xyz[i], rgb[i] = values[:3], values[3:]
        data.skip(track, 8)  # the images that show it
    return _checked(xyz, rgb, file)


def _checked(xyz: np.ndarray, rgb: np.ndarray, file: Path) -> Points:
    if not np.isfinite(xyz).all() or not ((rgb >= 0) & (rgb <= 255)).all():
        raise InputError(f"{file}: holds points that are not finite, or colours outside 0 to 255")
    return Points(xyz, rgb / 255)


# --------------------------------------------------------------------------------------------------------------- text


def _lines(file: Path) -> list[str]:
    if file.stat().st_size > MAX_TEXT_BYTES:
        raise InputError(f"{file}: more than {MAX_TEXT_BYTES} bytes; expected COLMAP's binary format for so much")
    return [line for line in file.read_text("utf-8").splitlines() if not line.startswith("#")]


def _text_cameras(file: Path) -> dict[int, Lens]:
    lenses = {}
    for line in filter(str.strip, _lines(file)):
        number, model, width, height, *values = line.split()
        where = f"{file}: camera {number[:20]}"
        lenses[int(number)] = make_lens(model, int(width), int(height), [float(value) for value in values], where)
    return lenses


def _text_images(file: Path) -> list[tuple]:
    """Two lines an image: the image, then its features, which may be an empty line."""
    lines, rows = _lines(file), []
    while lines and not lines[0].strip():
        del lines[0]
    for features in lines[1::2]:
        if not _is_features(features):
            what = "expected the features of the image above it, x y point for each, or an empty line"
            raise InputError(f"{file}: {shown(features)}; {what}")
    while lines and not lines[-1].strip():
        del lines[-1]  # of the last image's features, or at the end of the file
    for line in lines[::2]:
        _, *pose, camera, name = line.split(maxsplit=9)
        pose = np.array([float(value) for value in pose])
        rows.append((name.strip(), pose[:4], pose[4:], int(camera)))
    return rows


def _is_features(line: str) -> bool:
    """Whether a line can be an image's features: threes of numbers, of which the first ones are looked at."""
    first = line.split(maxsplit=12)[:12]
    if len(first) % 3:
        return False
    try:
        return all(math.isfinite(float(value)) for value in first)
    except ValueError:
        return False


def _text_points(file: Path) -> Points:
    rows = [[float(value) for value in line.split(maxsplit=7)[1:7]] for line in filter(str.strip, _lines(file))]
    values = np.array(rows, np.float64).reshape(-1, 6)
    return _checked(values[:, :3], values[:, 3:].astype(np.float32), file)


_BINARY = (_binary_cameras, _binary_images, _binary_points)
_TEXT = (_text_cameras, _text_images, _text_points)
