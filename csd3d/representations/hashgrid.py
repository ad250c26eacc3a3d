"""A NeRF on a hash grid (instant-ngp, arXiv 2201.05989): radiance field, background and occupancy grid.

Symbols as in `base`; rays_o, rays_d [R, 3], the rays' origins and unit directions.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from csd3d.cameras import Cameras
from csd3d.fields import Background, FieldConfig, RadianceField
from csd3d.registry import register
from csd3d.rendering import OccupancyGrid, RenderConfig, Rendered, ShadedField, Shading, render_image, render_rays
from csd3d.rendering.occupancy import BYTES_PER_CELL
from csd3d.representations.base import ALBEDO, BackgroundKind
from csd3d.representations.fit import (
    SAMPLES_PER_RAY,
    Features,
    FitConfig,
    Pictures,
    descend,
    fit_loss,
    learning_rate,
    make_optimiser,
)
from csd3d.waits import sent

FIRST_GUESS = 512.0  # samples a ray, for the first step of a fit


@register("representation", "hashgrid", title="Hash-grid NeRF")
@dataclass(frozen=True)
class HashGrid:
    """A hash-grid NeRF.

    scene = HashGrid(FieldConfig(levels=8)).open(capture.aabb, generator, capture.unbounded)
    views = scene.render_views(capture.cameras, capture.test)
    """

    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)  # sizes of hash grid and networks
    render: RenderConfig = dataclasses.field(default_factory=RenderConfig)  # samples along rays, occupancy grid

    # of the samples of a ray, whose activations in encoding and networks are kept for the backward pass
    bytes_per_ray: ClassVar[int] = SAMPLES_PER_RAY * 1700
    supports: ClassVar[tuple[str, ...]] = ("shading", "orientation", "distortion", "smoothness")

    @property
    def levels(self) -> int:
        """Levels of the hash grid."""
        return self.field.levels

    @property
    def training_bytes(self) -> int:
        """Memory for training one scene."""
        return self.field.training_bytes + self.render.resolution**3 * BYTES_PER_CELL

    def open(
        self, aabb: Tensor, generator: torch.Generator, unbounded: bool = False, background: BackgroundKind = "learned"
    ) -> "HashGridScene":
        return HashGridScene(self, aabb, generator, unbounded, background)


class HashGridScene(nn.Module):
    """A radiance field, its background and its occupancy grid. `base.SceneModel` explains the methods."""

    def __init__(
        self,
        config: HashGrid,
        aabb: Tensor,
        generator: torch.Generator,
        unbounded: bool = False,
        background: BackgroundKind = "learned",
    ) -> None:
        super().__init__()
        self.field = RadianceField(config.field, aabb, unbounded, generator)
        self.background = Background(background, generator=generator)
        self.grid = OccupancyGrid(config.render, aabb, unbounded)
        self.render_config = config.render
        self.samples_per_ray = FIRST_GUESS  # of the last step of the fit

    # ------------------------------------------------------------------------------------------------------ rendering

    def render_rays(
        self,
        rays_o: Tensor,
        rays_d: Tensor,
        jitter: Tensor | None = None,
        shading: Shading = ALBEDO,
        background: Callable[[Tensor], Tensor] | None = None,
        distortion: bool = False,
    ) -> Rendered:
        """Render rays with a graph: fields of Rendered are [R, ...]; jitter [R], None: the middles of the steps."""
        parts = (self._shaded(shading), background or self.background, self.grid)
        device = self.field.aabb.device
        rays_o, rays_d, jitter = (None if x is None else sent(x, device) for x in (rays_o, rays_d, jitter))
        return render_rays(*parts, rays_o, rays_d, self.render_config, jitter=jitter, distortion=distortion)

    def render(
        self,
        cameras: Cameras,
        jitter: Tensor | None = None,
        shading: Shading = ALBEDO,
        background: Callable[[Tensor], Tensor] | None = None,
        distortion: bool = False,
    ) -> Rendered:
        cameras = cameras.to(self.field.aabb.device)
        rays = [part.view(-1, 3) for part in cameras.all_rays()]
        flat = self.render_rays(*rays, None if jitter is None else jitter.flatten(), shading, background, distortion)

        def views(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.unflatten(0, (len(cameras), cameras.height, cameras.width))

        found = (views(x) for x in (flat.rgb, flat.depth, flat.opacity))
        return Rendered(*found, flat.samples, views(flat.distortion), views(flat.penalty))

    def render_views(self, cameras: Cameras, indices: Tensor, shading: Shading = ALBEDO) -> Rendered:
        parts = (self._shaded(shading), self.background, self.grid)
        cameras = cameras.to(self.field.aabb.device)
        views = [render_image(*parts, cameras, int(i), self.render_config) for i in indices]
        found = (torch.stack([getattr(view, key) for view in views]) for key in ("rgb", "depth", "opacity"))
        return Rendered(*found, sum(view.samples for view in views))

    def _shaded(self, shading: Shading) -> RadianceField | ShadedField:
        return self.field if shading == ALBEDO else ShadedField(self.field, shading)

    # --------------------------------------------------------------------------------------------------- optimisation

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"scene": list(self.field.parameters()), "background": list(self.background.parameters())}

    def set_levels(self, levels: int) -> None:
        self.field.active_levels = levels

    def keep_up(self, step: int, generator: torch.Generator) -> None:
        self.grid.update(step, self.field, generator)

    def start_fit(self, config: FitConfig) -> torch.optim.Adam:
        self.samples_per_ray = FIRST_GUESS
        return make_optimiser(self.parameters(), config)

    def fit_step(
        self,
        optimiser: torch.optim.Adam,
        pictures: Pictures,
        config: FitConfig,
        step: int,
        generator: torch.Generator,
        features: Features | None = None,
    ) -> dict[str, float]:
        """Fit to random rays, enough for about config.samples samples, and to the rays of config.patches patches."""
        self.keep_up(step, generator)
        views, pixels = draw_rays(pictures, config, ray_count(config, self.samples_per_ray), generator)
        rays_o, rays_d = pictures.cameras.rays(views, pixels + 0.5)
        jitter = torch.rand(len(views), generator=generator)
        rendered = self.render_rays(rays_o, rays_d, jitter, distortion=config.distortion_weight > 0)
        target = pictures.images[views, pixels[:, 1], pixels[:, 0]]
        usable = None if pictures.masks is None else pictures.masks[views, pixels[:, 1], pixels[:, 0]]
        target = sent(target, rendered.rgb.device)
        usable = None if usable is None else sent(usable, target.device)
        loss, report = fit_loss(rendered, target, usable, config, features)
        finite = descend(self, optimiser, loss, learning_rate(config, step))
        self.samples_per_ray = rendered.samples / len(views)
        return report | {"skipped": float(not finite), "samples_per_ray": self.samples_per_ray}

    def get_extra_state(self) -> dict[str, float]:
        """State of a checkpoint besides parameters and buffers (torch's hook)."""
        return {"samples_per_ray": self.samples_per_ray, "active_levels": self.field.active_levels}

    def set_extra_state(self, state: dict[str, float]) -> None:
        """Restore what `get_extra_state` returned; ValueError for levels that the grid does not have."""
        most = self.field.config.levels
        levels = state.get("active_levels", self.field.active_levels)  # older checkpoints have none
        if type(levels) is not int or not 1 <= levels <= most:  # the kernels would read outside of the grid
            raise ValueError(f"active_levels: is {levels!r:.40}, expected a whole number from 1 to {most}")
        self.samples_per_ray = state["samples_per_ray"]
        self.set_levels(levels)

    # ---------------------------------------------------------------------------------------------------------- shape

    def density(self, positions: Tensor) -> Tensor:
        return self.field.density(positions)[0]

    def radiance(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        return self.field(positions, directions)


def ray_count(config: FitConfig, samples_per_ray: float) -> int:
    """Number of random rays for about config.samples samples, by the last step's samples a ray; at least 64."""
    wanted = config.samples / max(samples_per_ray, 1.0) - config.patches * config.patch_size**2
    return int(min(config.rays, max(wanted, 64)))


def draw_rays(pictures: Pictures, config: FitConfig, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw views [R] and pixels (column, row) [R, 2]: those of the patches, row by row, then `count` random ones."""
    _, height, width, _ = pictures.images.shape
    size = min(config.patch_size, height, width)

    def draw(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    columns, rows = draw(width - size + 1, config.patches), draw(height - size + 1, config.patches)
    inside = torch.cartesian_prod(torch.arange(size), torch.arange(size)).flip(1)  # (column, row), row by row
    patches = (torch.stack((columns, rows), 1)[:, None] + inside).reshape(-1, 2)
    patch_views = pictures.views[draw(len(pictures.views), config.patches)].repeat_interleave(size * size)
    views = pictures.views[draw(len(pictures.views), count)]
    pixels = torch.stack((draw(width, count), draw(height, count)), 1)
    return torch.cat((patch_views, views)), torch.cat((patches, pixels))
