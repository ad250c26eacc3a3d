"""Files of a scene or an asset: renders along a camera path, and the mesh."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from csd3d.cameras import Cameras, evenly
from csd3d.engine.logs import logger, progress
from csd3d.engine.phase import Job
from csd3d.errors import InputError
from csd3d.evaluation.assets import stray_faces
from csd3d.export import MeshConfig, Placement, export_mesh, render_mesh
from csd3d.files import make_folder
from csd3d.representations.base import SceneModel, surface_depth
from csd3d.schema import Within

TURNTABLE_FRAMES = 36  # most pictures of the mesh in the report
SEEN_VIEWS, SEEN_SIDE = 24, 48  # views, and their longer side in pixels, from which `seen_box` is found
SEEN_REACH = 10.0  # world units; the cameras are within 1
# words for what an object can stand on, after which it is left there
STANDS = r"(plate|platter|platform|tray|saucer|disc|disk|pedestal|base|stand|floor)s?|dish(es)?|ground"
SMALL_SIDE = 200  # pixels; below, turntables are rendered three times as large


@dataclass
class ExportConfig:
    """The mesh and the orbit video that a run ends with."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    video_frames: Annotated[int, Within(1, 10_000)] = 72  # frames of the orbit video
    video_fps: Annotated[int, Within(1, 240)] = 24  # frames a second of the orbit video


def save_mesh(
    job: Job,
    model: SceneModel,
    cameras: Cameras,
    aabb: Tensor,
    name: str,
    folder: str = "mesh",
    placement: Placement | None = None,
    eyes: Tensor | None = None,
    lit: bool = True,
    distance: Callable[[Tensor], Tensor] | None = None,
) -> tuple[str, list[np.ndarray], dict[str, float | int | bool | str | None]]:
    """Write the mesh of the object called `name`; return a note, turntable frames and figures.

    placement: that of a captured scene; None: an object made from the words `name` (see `asset_mesh`).  eyes [N, 3]:
    where the photos of a scene were taken.  lit: see `export_mesh`.  distance(points [P, 3]): the signed distance [P]
    to the object that it should be, where that is known: for the figure `stray_faces`. If the scene has no surface, no
    mesh is written and the note says so. A scene that has `write_files(folder, placement)` writes its own files beside
    the mesh, whatever comes of that.
    """
    config, files = job.config.export.mesh, job.folder / folder
    if placement is None:
        config, placement = asset_mesh(config, name), Placement()
    if hasattr(model, "write_files"):
        make_folder(files)
        model.write_files(files, placement)
    try:
        mesh, figures = export_mesh(
            model.density, model.radiance, aabb, files, config, str(job.device), object_name(name), placement, eyes, lit
        )
    except InputError as error:
        logger.error("%s", error)
        return f"No mesh: {error}", [], {}
    if distance is not None:
        figures["stray_faces"] = stray_faces(mesh.triangles_center, distance)
    steps = evenly(len(cameras), TURNTABLE_FRAMES)
    small = min(cameras.width, cameras.height) < SMALL_SIDE
    larger = cameras.resized(cameras.width * 3, cameras.height * 3) if small else cameras
    frames = [render_mesh(mesh, larger, int(i)) for i in progress(steps, "turntable")]
    width, height = mesh.visual.material.baseColorTexture.size
    note = f"{figures['faces']:,} faces, {width} × {height} texture."
    if left_out := figures["left_out"]:
        note += f" Without the {left_out} below the object: export.mesh.crop=box keeps it."
        logger.info("the mesh is without the %s below the object; export.mesh.crop=box keeps it", left_out)
    return note, frames, figures


def asset_mesh(config: MeshConfig, prompt: str) -> MeshConfig:
    """Return how the mesh of an object made from words is extracted.

    With crop "auto" the largest object, without a plate below it, unless the prompt names something of the kind.
    """
    if config.crop == "auto":
        named = re.search(rf"\b({STANDS})\b", prompt, flags=re.IGNORECASE)
        return replace(config, crop="box" if named else "plate")
    return replace(config, crop="box") if config.crop == "none" else config


def seen_box(model: SceneModel, cameras: Cameras, box: Tensor) -> Tensor:
    """Return the box [6] of nearly all that the cameras see within `SEEN_REACH`; `box` if that is next to nothing.

    For captures whose cameras do not look at one point: a room, a street, a wall that was filmed along.
    """
    small = cameras[evenly(len(cameras), SEEN_VIEWS)].with_longer_side(SEEN_SIDE)
    depth = surface_depth(model.render_views(small, torch.arange(len(small)))).cpu()
    rays_o, rays_d = small.all_rays()
    points = (rays_o + rays_d * depth[..., None])[depth < SEEN_REACH]
    if len(points) < 0.01 * depth.numel():
        return box
    low, high = points.quantile(torch.tensor([0.01, 0.99]), dim=0)
    margin = 0.05 * (high - low).max()
    return torch.cat((low - margin, high + margin))


def object_name(text: str) -> str:
    """Return a mesh's name for a prompt or a folder: "a blue duck" is blue_duck."""
    bare = re.sub(r"^(an?|the)\s+", "", text.strip(), flags=re.IGNORECASE)
    return re.sub(r"\W+", "_", bare).strip("_")[:60] or "mesh"
