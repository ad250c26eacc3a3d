"""Polycam's raw export: keyframes/cameras/*.json beside keyframes/images/*.jpg."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from csd3d.datasets.listing import Frame, Listing, sorted_by_name
from csd3d.datasets.reading import listed_file, number, pixel_count, positive, rigid
from csd3d.errors import InputError
from csd3d.files import read_json
from csd3d.registry import register

MAX_FRAMES = 30_000


@register("reader", "polycam", title="Polycam (raw data)")
@dataclass(frozen=True)
class Polycam:
    """A folder of Polycam's "raw data" export, unpacked; the poses that it has optimised go before those of the phone.

    scene: {path: captures/my-room-poly}
    """

    corrected: bool = True  # use corrected_cameras and corrected_images where they are there

    wants: ClassVar[str] = "keyframes/cameras"

    @staticmethod
    def matches(path: Path) -> bool:
        return any((path / "keyframes" / name).is_dir() for name in ("cameras", "corrected_cameras"))

    def read(self, path: Path) -> Listing:
        folder = path / "keyframes"
        prefix = "corrected_" if self.corrected and (folder / "corrected_cameras").is_dir() else ""
        cameras = folder / f"{prefix}cameras"
        files = sorted(cameras.glob("*.json"))
        if not 1 <= len(files) <= MAX_FRAMES:
            raise InputError(f"{cameras}: {len(files)} JSON files; expected one for each picture, up to {MAX_FRAMES}")
        frames = [self._frame(path, file, f"keyframes/{prefix}images/{file.stem}.jpg") for file in files]
        return Listing(sorted_by_name(frames), folder=path, file=cameras)

    def _frame(self, path: Path, file: Path, picture: str) -> Frame:
        said = read_json(file, "a camera of Polycam")

        def value(key: str, check):
            if key not in said:
                raise InputError(f"{file}: has no {key}; expected a camera of Polycam's raw export")
            return check(said[key], f"{file}: {key}")

        rows = [[value(f"t_{i}{j}", number) for j in range(4)] for i in range(3)]
        return Frame(
            where=str(file),
            name=picture,
            file=listed_file(path, picture, str(file)),
            pose=rigid(rows, f"{file}: t_00 .. t_23"),
            focal=(value("fx", positive), value("fy", positive)),
            centre=(value("cx", number), value("cy", number)),
            size=(value("width", pixel_count), value("height", pixel_count)),
        )
