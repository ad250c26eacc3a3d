"""A folder of photos without poses: `csd3d process` finds them, once, and the dataset is kept in the user's cache."""

import hashlib
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from csd3d.datasets.listing import Listing
from csd3d.datasets.process import process
from csd3d.datasets.process.photos import photos_of
from csd3d.datasets.process.poses import MATCHINGS
from csd3d.datasets.readers.nerfstudio import listing_of
from csd3d.errors import InputError
from csd3d.files import cache_folder
from csd3d.media.videos import SUFFIXES
from csd3d.registry import register
from csd3d.schema import Within

log = logging.getLogger("csd3d")
VERSION = "2"  # of what process writes: another one is another cache


@register("reader", "photos", title="Photos without poses")
@dataclass(frozen=True)
class Photos:
    """A folder that holds photos and nothing else; their poses are found by COLMAP (Schönberger and Frahm 2016).

    That takes minutes the first time, and nothing as long as the photos stay as they are: the result is kept in
    $XDG_CACHE_HOME/csd3d/photos (~/.cache), by the content of the photos.

        scene: {path: holiday/church}
    """

    frames: Annotated[int, Within(8, 1000)] | None = None  # use at most so many; null: all
    matching: str = "auto"  # auto | sequential (the order of the names is that of the walk) | exhaustive
    seed: Annotated[int, Within(0, 2**31 - 1)] = 0  # seed of everything random

    wants: ClassVar[str] = "photos and nothing else"

    def __post_init__(self) -> None:
        if self.matching not in MATCHINGS:
            raise ValueError(f"matching: {self.matching!r}; expected one of {', '.join(MATCHINGS)}")

    @staticmethod
    def matches(path: Path) -> bool:
        if not path.is_dir():
            return False
        with os.scandir(path) as entries:
            found = [entry.name for entry in entries if not entry.name.startswith(".")]
        return bool(found) and all(name.lower().endswith(SUFFIXES) for name in found)

    def read(self, path: Path) -> Listing:
        if not path.is_dir():
            raise InputError(f"scene.path: {path} is no folder; expected one of photos")
        folder = cache_folder("photos") / self._key(path)
        if (folder / "transforms.json").exists():
            log.info("%s: poses found before are read from %s", path, folder)
        else:
            log.info("%s: photos without poses; finding them takes minutes, once; kept in %s", path, folder)
            tell = partial(log.info, "%s")
            process(path, folder, self.frames, self.matching, self.seed, tell, named_by="XDG_CACHE_HOME")
        return listing_of({folder / "transforms.json": None})

    def _key(self, path: Path) -> str:
        """A name for the content of the photos and what is done with them."""
        found = hashlib.sha256(f"{VERSION} {self.frames} {self.matching} {self.seed}".encode())
        for file in photos_of(path):
            found.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as opened:
                found.update(hashlib.file_digest(opened, "sha256").digest())
        return found.hexdigest()[:32]
