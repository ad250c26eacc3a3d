"""Noise of assets that is no draw of a step, but a function of the camera (FSD) or of what it sees (CFD).

Assets that collaborate have the same noise, so that their kernel compares what they show; others have noise of their
own, because by the same noise they would become the same asset.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csd3d.distillation.noise import draw_noise_map, noise_map_size, world_noise
from csd3d.distillation.surface_noise import surface_noise, texel_count, working_bytes
from csd3d.guidance.methods import MethodRun
from csd3d.guidance.views import Views
from csd3d.representations.batch import AssetViews


@dataclass
class CameraNoise:
    """FSD's spheres of noise, one for each asset, which stay the same for a whole run."""

    maps: list[Tensor]

    def renew(self, generator: torch.Generator) -> None:
        """Nothing: it stays."""

    def __call__(self, views: Views, shown: AssetViews, size: tuple[int, int]) -> Tensor:
        """ε [N·V, C, h, w] of the step's views."""
        return torch.cat([world_noise(one, *views.view[:, :2].T, size) for one in self.maps])


class SurfaceNoise(nn.Module):
    """CFD's noise on the surface of each of N assets, of which a share is drawn anew in each step."""

    def __init__(
        self, count: int, shape: tuple[int, int, int], extent: float, fresh: float, generator: torch.Generator
    ):
        super().__init__()
        self.extent, self.fresh = extent, fresh
        self.register_buffer("maps", torch.randn(count, texel_count(shape[1:]), shape[0], generator=generator))
        self.register_buffer("behind", torch.randn(count, *shape, generator=generator))

    def renew(self, generator: torch.Generator) -> None:
        """W ← √(1−γ) W + √γ ε for all noise, before a step."""
        for noise in (self.maps, self.behind) if self.fresh else ():
            drawn = torch.randn(noise.shape, generator=generator).to(noise)
            noise.mul_((1 - self.fresh) ** 0.5).add_(drawn, alpha=self.fresh**0.5)

    def forward(self, views: Views, shown: AssetViews, size: tuple[int, int]) -> Tensor:
        """ε [N·V, C, h, w] of the step's views."""
        start, along = shown.cameras.to(self.maps.device).all_rays()
        found = []
        for number, asset in enumerate(shown.rendered):
            points = (start + along * asset.depth.detach()[..., None]) / self.extent
            own = number % len(self.maps)
            found.append(surface_noise(self.maps[own], self.behind[own], points, asset.opacity > 0.5))
        return torch.cat(found)


def _own(run: MethodRun, count: int) -> int:
    """How many of `count` assets have noise of their own."""
    return count if run.distill.svgd is None else 1


def noise_bytes(run: MethodRun, count: int, views: int, shape: tuple[int, int, int], fov_deg: float) -> int:
    """The memory that `asset_noise` takes, with a step's `views` of each asset; 0 where each step draws its own."""
    a_map = 4 * shape[0] * _own(run, count)  # bytes of a place in the maps
    if run.distill.noise == "camera":
        rows, columns = noise_map_size(shape[1:], fov_deg)
        return a_map * rows * columns
    if run.distill.noise == "surface":
        drawn_anew = 1 if getattr(run.method, "fresh", 0.0) else 0
        return a_map * texel_count(shape[1:]) * (1 + drawn_anew) + working_bytes(views, shape[1:])
    return 0


def asset_noise(
    run: MethodRun, count: int, shape: tuple[int, int, int], fov_deg: float, extent: float, generator: torch.Generator
) -> CameraNoise | SurfaceNoise | None:
    """The noise of `count` assets of `extent` whose latents have `shape`; None where each step draws its own."""
    own = _own(run, count)
    if run.distill.noise == "camera":
        maps = [draw_noise_map(shape[0], shape[1:], fov_deg, generator) for _ in range(own)]
        return CameraNoise(maps * (count // own))
    if run.distill.noise == "surface":
        return SurfaceNoise(own, shape, extent, getattr(run.method, "fresh", 0.0), generator)
    return None
