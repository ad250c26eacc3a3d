"""One picture as the front view of assets: its camera, and the losses that hold renders to it.

Symbols: N assets; S pixels a side; colour [3, S, S], premultiplied by mask [S, S], both in [0, 1]. Angles in degrees.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.cameras import Cameras, orbit
from csd3d.guidance.views import ViewsConfig
from csd3d.metrics import psnr_weighted
from csd3d.rendering import Shading
from csd3d.representations.batch import Assets
from csd3d.schema import Share, Within
from csd3d.waits import sent, to_host


@dataclass
class FrontConfig:
    """The camera of the picture, how the object is cut out of it, and how strongly assets are held to it."""

    azimuth_deg: Annotated[float, Within(-360, 360)] = 0.0  # its camera's azimuth: 0 sees the object's front
    elevation_deg: Annotated[float, Within(-90, 90)] = 20.0  # its camera's elevation: a guess is enough
    # its camera's distance, world units; null: the middle of views.distance
    distance: Annotated[float, Within(0.1, 100)] | None = None
    # its camera's vertical field of view; null: the middle of views.fov_deg
    fov_deg: Annotated[float, Within(1, 170)] | None = None
    # share of the view that the longer side of the object's box takes; a larger object than extent would be cut off
    fill: Annotated[float, Within(0.1, 1)] = 0.8
    # without transparency: largest difference from the background's colour, of a channel in [0, 1]
    tolerance: Share = 0.1
    size: Annotated[int, Within(16, 1024)] = 128  # pixels along a side of the picture that is kept
    colour_weight: Annotated[float, Within(0, 1_000_000_000)] = 3000.0  # weight of the squared error of the colours
    mask_weight: Annotated[float, Within(0, 1_000_000_000)] = 1000.0  # weight of the squared error of the opacity

    def camera(self, views: ViewsConfig) -> Cameras:
        """The picture's camera, which looks at the origin as `sample_views`' do without jitter."""
        distance = sum(views.distance) / 2 if self.distance is None else self.distance
        fov = sum(views.fov_deg) / 2 if self.fov_deg is None else self.fov_deg
        return orbit(1, distance, self.elevation_deg, fov, self.size, self.size, self.azimuth_deg)


@dataclass(frozen=True)
class FrontView:
    """The picture with its camera, and the weights of its losses."""

    camera: Cameras  # one
    colour: Tensor
    mask: Tensor
    config: FrontConfig

    def target(self, backdrop: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """The picture [3, side, side] before a colour [3], and its mask [side, side], averaged or interpolated."""
        both = torch.cat((self.colour, self.mask[None]))[None]
        if side != both.shape[-1]:
            reduces = {"mode": "area"} if side < both.shape[-1] else {"mode": "bilinear", "align_corners": False}
            both = F.interpolate(both, (side, side), **reduces)
        colour, mask = both[0, :3], both[0, 3]
        return colour + (1 - mask) * sent(backdrop, colour.device)[:, None, None], mask

    def loss(
        self, model: Assets, side: int, backdrop: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Weighted errors of what the picture's camera sees, in `side`² pixels before a colour, and each alone.

        w_c mean (rgb − picture)² + w_m mean (opacity − mask)²
        """
        camera = self.camera.resized(side, side)
        jitter = torch.rand(len(model.models), side * side, generator=generator)
        seen = model.render(camera, jitter, Shading(), backdrop)
        picture, mask = self.target(backdrop, side)
        opacity = torch.cat([view.opacity for view in seen.rendered])
        errors = (seen.images - picture).square().mean(), (opacity - mask).square().mean()
        weights = (self.config.colour_weight, self.config.mask_weight)
        total = sum(weight * error for weight, error in zip(weights, errors, strict=True))
        return total, to_host(dict(zip(("front_colour", "front_mask"), errors, strict=True)))

    @torch.no_grad()
    def shown(self, model: Assets, backdrop: Tensor) -> tuple[Tensor, Tensor]:
        """The assets seen by the picture's camera, before a colour: [N, S, S, 3] in [0, 1], and opacities [N, S, S]."""
        views = [one.render(self.camera, background=lambda d: backdrop.to(d).expand_as(d)) for one in model.models]
        return torch.cat([v.rgb for v in views]).clamp(0, 1), torch.cat([v.opacity for v in views])

    def figures(self, model: Assets, backdrop: Tensor) -> dict[str, float]:
        """front_psnr, dB, over the pixels that either covers, and front_iou, of the silhouettes: means over assets."""
        rgb, opacity = self.shown(model, backdrop)
        picture, mask = self.target(backdrop, self.config.size)
        picture, mask = picture.permute(1, 2, 0).expand_as(rgb), mask.expand_as(opacity)
        either, both = torch.maximum(opacity, mask), torch.minimum(opacity, mask)
        return {
            "front_psnr": psnr_weighted(rgb[:, None], picture[:, None], either[:, None]).mean().item(),
            "front_iou": (both.sum((1, 2)) / either.sum((1, 2))).mean().item(),
        }

    def to(self, device: torch.device) -> "FrontView":
        """The same with its picture on a device; cameras are on the host, as those of a step's views are."""
        return FrontView(self.camera, self.colour.to(device), self.mask.to(device), self.config)
