"""A sketch in three dimensions: a few shapes of one flat colour each, to which an asset is fitted before it is refined.

SDS-Bridge (arXiv 2406.09417) makes such sketches real. Axes as in text to 3D: +x is the object's front, +z is up.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
import torch
import trimesh
from torch import Tensor

from csd3d.cameras import Cameras, look_at, on_sphere, orbit
from csd3d.engine.logs import progress
from csd3d.representations.base import SceneModel
from csd3d.representations.fit import FitConfig, Pictures
from csd3d.schema import Within
from custom_kernels.meshes import Projected, draw

Triple = tuple[float, float, float]
ELEVATIONS = (-20.0, 15.0, 50.0)  # degrees, of the cameras that a sketch is seen from
SAMPLES = 2  # along a pixel's side
SECTIONS = 32  # of cylinders and cones
UNIT = {  # shapes in the cube [−½, ½]³
    "box": lambda: trimesh.creation.box((1, 1, 1)),
    "ball": lambda: trimesh.creation.icosphere(3, 0.5),
    "cylinder": lambda: trimesh.creation.cylinder(0.5, 1, SECTIONS),
    "cone": lambda: trimesh.creation.cone(0.5, 1, sections=SECTIONS).apply_translation((0, 0, -0.5)),
}


@dataclass
class Shape:
    """One shape of a sketch."""

    shape: str = "box"  # box, ball, cylinder or cone; the last two stand along z
    at: Triple = (0.0, 0.0, 0.0)  # its centre, world units
    size: Triple = (1.0, 1.0, 1.0)  # its extents along x, y and z, world units
    colour: Triple = (0.5, 0.5, 0.5)  # red, green and blue in [0, 1]

    def __post_init__(self) -> None:
        if self.shape not in UNIT:
            raise ValueError(f"shape is {self.shape!r}: choose one of {', '.join(UNIT)}")
        if not all(0 < side <= 10 for side in self.size) or not all(abs(place) <= 10 for place in self.at):
            raise ValueError(f"size is {list(self.size)}, at {list(self.at)}: give lengths in (0, 10], places in ±10")
        if not all(0 <= part <= 1 for part in self.colour):
            raise ValueError(f"colour is {list(self.colour)}: give red, green and blue in [0, 1]")


@dataclass
class SketchConfig:
    """What assets start as: fitted to pictures of flat shapes."""

    shapes: list[Shape] = field(default_factory=list)  # the shapes; []: assets start from noise
    views: Annotated[int, Within(3, 300)] = 24  # pictures of the sketch
    size: Annotated[int, Within(16, 1024)] = 64  # side of these pictures, pixels
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=150, rays=1024))

    def __post_init__(self) -> None:
        if len(self.shapes) > 100:
            raise ValueError(f"shapes has {len(self.shapes)}: give at most 100")


def draw_shapes(shapes: list[Shape], cameras: Cameras, backdrop: Tensor) -> Tensor:
    """Pictures [B, H, W, 3] of shapes by B cameras, unlit and flat, before the colour `backdrop` [3]."""
    parts = [UNIT[shape.shape]() for shape in shapes]
    places = np.concatenate([p.vertices * s.size + s.at for p, s in zip(parts, shapes, strict=True)])
    starts = np.cumsum([0, *(len(p.vertices) for p in parts)])
    faces = np.concatenate([p.faces + start for p, start in zip(parts, starts, strict=False)])
    texture = (np.array([[shape.colour for shape in shapes]]) * 255).round().astype(np.uint8)  # a texel each
    owner = np.repeat(np.arange(len(parts)), [len(p.vertices) for p in parts])
    uv = np.stack([(owner + 0.5) / len(parts), np.full(len(owner), 0.5)], 1)
    width, height, found = cameras.width, cameras.height, []
    for i in range(len(cameras)):
        points, depth = (x.double().cpu().numpy() for x in cameras.project(torch.as_tensor(places).float(), i))
        inverse = np.where(depth > 1e-3, 1 / np.maximum(depth, 1e-3), 0.0)
        mesh = Projected(points, inverse, faces.astype(np.int64), uv, texture)
        on_black, on_white = (
            torch.from_numpy(draw(mesh, width, height, SAMPLES, grey).astype(np.float32)) / 255 for grey in (0, 255)
        )
        found.append(on_black + (on_white - on_black) * backdrop.cpu())
    return torch.stack(found)


def sketch_cameras(config: SketchConfig, distance: float, fov_deg: float) -> Cameras:
    """Cameras around the origin, in turn at each of `ELEVATIONS`."""
    number = torch.arange(config.views)
    azimuth = 2 * math.pi * number / config.views
    elevation = torch.deg2rad(torch.tensor(ELEVATIONS)[number % len(ELEVATIONS)])
    places = distance * on_sphere(azimuth, elevation)
    ring = orbit(config.views, distance, 0.0, fov_deg, config.size, config.size)
    return replace(ring, camera_to_world=look_at(places, torch.zeros(3)))


def start_as_sketch(
    model: SceneModel, config: SketchConfig, cameras: Cameras, backdrop: Tensor, generator: torch.Generator
) -> None:
    """Fit a scene to the sketch's pictures; the scene's optimiser is let go."""
    pictures = Pictures(draw_shapes(config.shapes, cameras, backdrop), cameras, None, torch.arange(len(cameras)))
    optimiser = model.start_fit(config.fit)
    for step in progress(range(config.fit.steps), "sketch"):
        model.fit_step(optimiser, pictures, config.fit, step, generator)
