"""Record3D's raw folder: metadata (JSON) beside rgbd/0.jpg, rgbd/1.jpg, ..."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from csd3d.datasets.listing import Frame, Listing
from csd3d.datasets.readers.colmap import pose_of
from csd3d.datasets.reading import listed_file, matrix, number, pixel_count, positive
from csd3d.errors import InputError
from csd3d.files import read_json
from csd3d.registry import register
from csd3d.schema import Within

METADATA = ("metadata", "metadata.json")
FOLDERS = ("rgbd", "rgb")
MAX_FRAMES = 30_000


@register("reader", "record3d", title="Record3D")
@dataclass(frozen=True)
class Record3D:
    """A capture of the Record3D app, exported as "EXR + JPG sequence" or unzipped from its .r3d file.

    scene: {path: captures/my-room-r3d, reader: {type: record3d, every: 10}}
    """

    every: Annotated[int, Within(1, 100_000)] = 1  # keep every n-th frame of the film

    wants: ClassVar[str] = "metadata"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: {self.every}; expected at least 1")

    @staticmethod
    def matches(path: Path) -> bool:
        has_pictures = any((path / name).is_dir() for name in FOLDERS)
        return has_pictures and any((path / name).is_file() for name in METADATA)

    def read(self, path: Path) -> Listing:
        file = next((path / name for name in METADATA if (path / name).is_file()), path / METADATA[0])
        said = read_json(file, "the metadata of Record3D")
        poses, k = said.get("poses"), said.get("K")
        if not isinstance(poses, list) or not 1 <= len(poses) <= MAX_FRAMES:
            raise InputError(f"{file}: poses; expected a list of 1 to {MAX_FRAMES} poses")
        if not isinstance(k, list) or len(k) != 9:
            raise InputError(f"{file}: K; expected 9 numbers, a 3x3 matrix column by column")
        optics = {
            "focal": (positive(k[0], f"{file}: K[0]"), positive(k[4], f"{file}: K[4]")),
            "centre": (number(k[6], f"{file}: K[6]"), number(k[7], f"{file}: K[7]")),
            "size": tuple(None if said.get(key) is None else pixel_count(said[key], f"{file}: {key}") for key in "wh"),
        }
        folder = next((name for name in FOLDERS if (path / name).is_dir()), FOLDERS[0])
        frames = []
        for i in range(0, len(poses), self.every):
            where = f"{file}: poses[{i}]"
            values = matrix([poses[i]], ((1, 7),), where)[0]
            picture = listed_file(path, f"{folder}/{i}", where)
            frames.append(Frame(where, f"{folder}/{i}", picture, pose_of(values[:4], values[4:], where), **optics))
        return Listing(frames, folder=path, file=file)
