"""The surface of a scene that has no density: depths from many cameras, fused into a volume.

Symbols: t the fused signed distance as a share of the truncation τ, positive outside; v the side of a voxel.

    σ(x) = ln 2 / v · exp(−τ t(x) / v)

Along a ray that meets the surface squarely ∫σ reaches ln 2 at t = 0, where `csd3d.export.mesh` looks for a surface.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.cameras import OPENGL, Cameras, evenly, orbit
from csd3d.rendering import Rendered, Shading
from csd3d.rendering.shading import lambert
from csd3d.representations.base import SceneModel, render_each
from custom_kernels.fusion import DepthView, Volume

SIDE = 160  # voxels along the box's longest side
TRUNCATION = 4.0  # voxels
EMPTY = 0.999  # t from which nothing is there
MOST_VIEWS = 64
PIXELS = 256  # longest side of the depth pictures
RINGS = ((-20.0, 12), (15.0, 16), (45.0, 12), (75.0, 6))  # elevation and number of cameras, where none are known
DISTANCE, FIELD_OF_VIEW = 3.0, 50.0  # of these, in halves of the box's side; degrees


class Surface:
    """Density and colour of what the cameras see of a scene inside a box, nothing outside."""

    def __init__(self, scene: SceneModel, aabb: Tensor, cameras: Cameras | None) -> None:
        low, high = aabb[:3].cpu(), aabb[3:].cpu()
        self.voxel = (high - low).max().item() / (SIDE - 1)
        counts = [max(2, round(side / self.voxel) + 1) for side in (high - low).tolist()]
        volume = Volume(low, tuple(counts), self.voxel, TRUNCATION * self.voxel)
        for view in depth_views(scene, cameras or around(low, high)):
            volume.add(view)
        self.low, self.high = low, low + self.voxel * (torch.tensor(counts) - 1)
        self.distance = volume.signed_distance()
        self.colour = volume.colour
        seen = volume.colour.sum((0, 1, 2))
        self.usual = seen[:3] / seen[3].clamp_min(1e-6)  # where no view has seen the surface

    def density(self, positions: Tensor) -> Tensor:
        """σ [S], 0 away from surfaces and outside the box."""
        t = self._at(self.distance[..., None], positions)[:, 0]
        inside = ((positions.cpu() >= self.low) & (positions.cpu() <= self.high)).all(1)
        sigma = math.log(2) / self.voxel * torch.exp(-TRUNCATION * t)
        return torch.where(inside & (t < EMPTY), sigma, 0).to(positions)

    def colours(self, positions: Tensor) -> Tensor:
        """rgb [S, 3]."""
        found = self._at(self.colour, positions)
        weight = found[:, 3:]
        return torch.where(weight > 1e-4, found[:, :3] / weight.clamp_min(1e-4), self.usual).to(positions)

    def _at(self, volume: Tensor, positions: Tensor) -> Tensor:
        """Values [S, C] of a volume [X, Y, Z, C], interpolated."""
        places = 2 * (positions.cpu() - self.low) / (self.high - self.low) - 1
        found = F.grid_sample(
            volume.permute(3, 2, 1, 0)[None], places.view(1, -1, 1, 1, 3), padding_mode="border", align_corners=True
        )
        return found[0, :, :, 0, 0].T


def around(low: Tensor, high: Tensor) -> Cameras:
    """Cameras on rings round a box, which look at its middle."""
    radius = DISTANCE * (high - low).max().item() / 2
    rings = [
        orbit(count, radius, elevation, FIELD_OF_VIEW, PIXELS, PIXELS, 10.0 * k, ((low + high) / 2).tolist())
        for k, (elevation, count) in enumerate(RINGS)
    ]
    parts = {
        name: torch.cat([getattr(ring, name) for ring in rings]) for name in ("camera_to_world", "fx", "fy", "cx", "cy")
    }
    return Cameras(**parts, width=PIXELS, height=PIXELS)


def depth_views(scene: SceneModel, cameras: Cameras):
    """Yield the views of at most MOST_VIEWS of the cameras, without their lenses."""
    cameras = cameras.with_longer_side(PIXELS)
    plain = Cameras(
        cameras.camera_to_world, cameras.fx, cameras.fy, cameras.cx, cameras.cy, cameras.width, cameras.height
    )
    chosen = evenly(len(plain), MOST_VIEWS)
    for i, seen in zip(chosen.tolist(), render_each(scene, plain, "mesh, depth", chosen), strict=True):
        pose = plain.camera_to_world[i].cpu()
        rotation = (pose[:, :3] * pose.new_tensor(OPENGL)).T
        intrinsics = tuple(float(x[i]) for x in (plain.fx, plain.fy, plain.cx, plain.cy))
        rgb, depth, opacity = (x[0].cpu() for x in (seen.rgb, seen.depth, seen.opacity))
        yield DepthView(rotation, pose[:, 3], intrinsics, rgb, depth, opacity)


def depth_shaded(view: Rendered, cameras: Cameras, index: int, shading: Shading, behind: Tensor) -> Tensor:
    """The picture [H, W, 3] of a view [H, W, ...] under a shading, by the normals of its depth, before `behind`."""
    rays_o, rays_d = cameras.image_rays(index)
    size = view.depth.shape
    points = (rays_o + view.depth.reshape(-1, 1) * rays_d).view(*size, 3)
    across, down = (torch.gradient(points, dim=dim)[0] if size[dim] > 1 else torch.zeros_like(points) for dim in (1, 0))
    normals = F.normalize(torch.linalg.cross(down, across), dim=-1).flatten(0, 1)
    if shading.mode == "normal":
        lit = (normals + 1) / 2
    else:
        solid = view.opacity[..., None].clamp_min(1e-6)
        own = (view.rgb - (1 - view.opacity[..., None]) * behind) / solid
        albedo = torch.ones_like(own) if shading.mode == "textureless" else own
        lit = albedo.flatten(0, 1) * lambert(normals, rays_d, shading)
    opacity = view.opacity[..., None]
    return opacity * lit.view(*size, 3) + (1 - opacity) * behind
