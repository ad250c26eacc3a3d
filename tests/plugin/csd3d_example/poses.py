"""A reader of captures."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from csd3d.datasets.listing import Frame, Listing, sorted_by_name
from csd3d.errors import InputError
from csd3d.registry import register

FILE = "poses.txt"


@register("reader", "poses", title="Poses in a text file")
@dataclass(frozen=True)
class Poses:
    """Pictures beside poses.txt, in which each line is of one picture, in the order of their names.

    A line has 13 numbers: the focal length in pixels, then camera to world, 3×4 row by row, OpenGL axes.

        scene: {path: my_capture, reader: {type: poses, images: photos}}
    """

    images: str = "images"  # the folder of the pictures, inside the capture

    wants: ClassVar[str] = FILE

    @staticmethod
    def matches(path: Path) -> bool:
        return (path / FILE).is_file()

    def read(self, path: Path) -> Listing:
        file, pictures = path / FILE, sorted((path / self.images).glob("*.png"))
        try:
            rows = np.loadtxt(file, ndmin=2)
        except ValueError as error:
            raise InputError(f"{file}: {error}") from None
        if rows.shape != (len(pictures), 13):
            raise InputError(f"{file}: {rows.shape} numbers; expected 13 for each of {len(pictures)} pictures")
        frames = []
        for number, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
            pose = np.vstack((row[1:].reshape(3, 4), (0.0, 0.0, 0.0, 1.0)))
            frames.append(Frame(f"{file}: line {number + 1}", picture.name, picture, pose, focal=(row[0], None)))
        return Listing(sorted_by_name(frames), path, file)
