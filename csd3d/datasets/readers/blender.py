"""NeRF's Blender set: transforms_train.json beside transforms_test.json or transforms_val.json."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from csd3d.datasets.listing import Listing
from csd3d.datasets.readers.nerfstudio import listing_of
from csd3d.registry import register

TRAIN = "transforms_train.json"
HALF_SIDE = 1.5  # half the side of the box that holds the objects, as in nerfstudio


@register("reader", "blender", title="Blender synthetic")
@dataclass(frozen=True)
class Blender:
    """The synthetic objects of NeRF (Mildenhall et al. 2020, arXiv 2003.08934).

    The frames of transforms_test.json, or else of transforms_val.json, are held out. The scene is bounded by the box
    in the file, by default [-1.5, 1.5]^3, and the poses keep their frame.

        scene: {path: nerf_synthetic/lego}
    """

    wants: ClassVar[str] = TRAIN

    @staticmethod
    def matches(path: Path) -> bool:
        return path.name == TRAIN or ((path / TRAIN).exists() and not (path / "transforms.json").exists())

    def read(self, path: Path) -> Listing:
        listing = listing_of(self._files(path))
        box = listing.box if listing.box is not None else np.array([[-HALF_SIDE] * 3, [HALF_SIDE] * 3])
        return replace(listing, bounded=True, box=box)

    def _files(self, path: Path) -> dict[Path, str | None]:
        if path.is_file():
            return {path: None}
        held_out = [path / f"transforms_{split}.json" for split in ("test", "val")]
        test = next((file for file in held_out if file.exists()), None)
        return {path / TRAIN: None} if test is None else {path / TRAIN: "train", test: "test"}
