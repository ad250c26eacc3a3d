"""A finished scene of Gaussian splats, with cameras beside it."""

import atexit
import math
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from csd3d.datasets.framing import Layout, Place, Raster, frame_cameras
from csd3d.datasets.images import MAX_PIXELS
from csd3d.datasets.listing import Frame, Listing
from csd3d.datasets.readers.nerfstudio import listing_of
from csd3d.datasets.splat_files import poses_frame, read_splats, view_of
from csd3d.errors import InputError
from csd3d.media.image_writing import write_image
from csd3d.registry import register
from custom_kernels.splats import Splats, render


@register("reader", "splats", title="Gaussian splats")
@dataclass(frozen=True)
class FinishedSplats:
    """A `.ply` of 3D Gaussian splatting, and a transforms.json in its folder whose frame is that of the splats.

    Photos that transforms.json lists and that are not there are rendered from the splats, before white; their frames
    need w and h. With `representation.type=splats` the scene is not fitted again before it is edited.

        scene: {path: garden/point_cloud.ply}
    """

    cameras: str = "transforms.json"  # the cameras' file, in the folder of the .ply

    wants: ClassVar[str] = "a .ply of splats"

    @staticmethod
    def matches(path: Path) -> bool:
        return path.suffix.lower() == ".ply"

    def read(self, path: Path) -> Listing:
        file = path.parent / self.cameras
        if not file.is_file():
            raise InputError(
                f"scene.path: {path} has no {self.cameras} beside it; expected the cameras to edit it from"
            )
        listing = listing_of({file: None})
        splats = read_splats(path, "scene.path")
        frames = listing.frames
        if any(frame.file is None for frame in frames):
            frames = _with_renders(listing, poses_frame(splats, listing.applied_transform, listing.applied_scale))
        return replace(listing, frames=frames, splats=path)


def _with_renders(listing: Listing, splats: Splats) -> list[Frame]:
    """The frames, each without a picture now with a render in a folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="csd3d-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    degree = math.isqrt(splats.rest.shape[1] + 1) - 1
    frames = []
    for i, frame in enumerate(listing.frames):
        if frame.file is None:
            width, height = frame.size
            if width is None or height is None or width * height > MAX_PIXELS:
                raise InputError(f"{frame.where}: has no picture; to render it from the splats, w and h are needed")
            pose = torch.from_numpy(frame.pose[:3]).float()[None]
            layout = Layout(width, height, [Raster(width, height, turned=False)], [Place(0, 0, width, height)])
            with torch.no_grad():
                image = render(splats, view_of(frame_cameras([frame], layout, pose), 0), degree=degree)
            rgb = (image.rgb + image.light[..., None]).clamp(0, 1)
            frame = replace(frame, file=folder / f"{i:06d}.png")
            write_image(frame.file, rgb.numpy())
        frames.append(frame)
    return frames
