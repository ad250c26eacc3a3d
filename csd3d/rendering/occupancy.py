"""The occupancy grid, which says where rays need samples: nerfacc's estimator, deterministic and on any device.

Level l of L nested grids covers the scene's box scaled by 2^l about its centre; a bounded scene has one level. A cell
stores an optical thickness sigma dt that decays from visit to visit; it is occupied where that exceeds a threshold.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from nerfacc import OccGridEstimator
from torch import Tensor, nn

from csd3d.errors import InputError
from csd3d.memory import check_fits
from csd3d.schema import Amount, Share, Steps, Within
from custom_kernels import rendering as kernels
from custom_kernels.field import Field
from custom_kernels.trace import Traced, trace

BYTES_PER_CELL = 16  # thickness, whether occupied, and copies while these are updated
CHUNK = 2**18  # cells whose density is computed at once
MARGIN = 0.999  # share of the mean: "above the mean" itself would empty a uniform field


@dataclass
class RenderConfig:
    """How rays are sampled and the occupancy grid is kept; lengths in world units."""

    steps: Annotated[int, Within(1, 100_000)] = 384  # number of shortest steps along the diagonal of the scene's box
    max_samples: Annotated[int, Within(1, 100_000)] = 1024  # most samples of one ray
    finer: Annotated[int, Within(1, 64)] = 1  # steps are this many times shorter in pictures rendered without gradients
    near: Amount = 0.05  # rays start at this distance from the camera
    cone_angle: Share = 0.015  # a step is at least this share of its distance; unbounded scenes only
    # nested grids, unbounded scenes only: they reach 2^(levels - 1) times the box
    levels: Annotated[int, Within(1, 16)] = 5
    resolution: Annotated[int, Within(16, 512)] = 64  # cells along an edge of the grid
    threshold: float = 0.01  # a cell whose step has less optical thickness than this is empty
    decay: float = 0.95  # factor on the stored thickness of a cell at each visit
    update_every: Steps = 16  # training steps between updates of the grid
    warmup: Steps = 256  # until this training step an update visits every cell, afterwards at most a quarter
    early_stop: Share = 1e-4  # samples that less than this share of the light reaches are skipped
    backend: str = "auto"  # auto | reference | native | triton | nerfacc

    def __post_init__(self) -> None:
        positive = ("steps", "max_samples", "finer", "levels", "resolution", "threshold", "update_every", "warmup")
        for name in positive:
            if not getattr(self, name) > 0:
                raise InputError(f"render.{name}: must be above 0, got {getattr(self, name)}")
        for name in ("near", "cone_angle", "early_stop"):
            if not getattr(self, name) >= 0:
                raise InputError(f"render.{name}: must not be negative, got {getattr(self, name)}")
        if not 0 <= self.decay < 1:
            raise InputError(f"render.decay: must be in [0, 1), got {self.decay}")
        if self.resolution % 16:
            raise InputError(f"render.resolution: must be a multiple of 16, got {self.resolution}")
        needed = self.levels * self.resolution**3 * BYTES_PER_CELL
        check_fits(needed, f"render.resolution: {self.resolution} with levels {self.levels}: the grid")
        if self.backend not in kernels.BACKENDS:
            raise InputError(f"render.backend: must be one of {', '.join(kernels.BACKENDS)}, got {self.backend!r}")

    def check_backend(self, device: torch.device) -> None:
        """Raise RuntimeError if the backend is one by name that cannot run on the device."""
        if self.backend != "auto":
            kernels.choose_backend(self.backend, torch.empty(0, device=device))


class _Estimator(OccGridEstimator):
    """nerfacc's estimator, but it visits fewer cells, and none twice in one update: either of two writes could win."""

    def _sample_uniform_and_occupied_cells(self, n: int) -> list[Tensor]:
        found = super()._sample_uniform_and_occupied_cells(n // 2)
        return [cells.unique() for cells in found]


class OccupancyGrid(nn.Module):
    """Occupancy of a scene; all of its state is in buffers.

    aabb [6] (min, max) world units. Everything counts as occupied until the first update.
    """

    def __init__(self, config: RenderConfig, aabb: Tensor, unbounded: bool = False) -> None:
        super().__init__()
        self.config, self.unbounded = config, unbounded
        self.estimator = _Estimator(aabb.detach().float().cpu(), config.resolution, config.levels if unbounded else 1)
        self.estimator.binaries.fill_(True)
        self.estimator.occs.view_as(self.estimator.binaries)[1:, *[_inner(config.resolution)] * 3] = -1  # never visited
        size = float((aabb[3:] - aabb[:3]).norm()) / config.steps
        self.steps = kernels.Steps(size, config.cone_angle if unbounded else 0.0, config.max_samples)
        self._grid: tuple[kernels.Grid, int] | None = None

    @property
    def grid(self) -> kernels.Grid:
        """The grid in the kernels' form, rebuilt when its cells have changed."""
        cells = self.estimator.binaries
        if self._grid is None or self._grid[0].occupancy is not cells or self._grid[1] != cells._version:
            self._grid = kernels.Grid(cells, self.estimator.aabbs[0]), cells._version
        return self._grid[0]

    def march(self, rays_o: Tensor, rays_d: Tensor, jitter: Tensor | None = None, finer: int = 1) -> kernels.Samples:
        """Samples of rays [R, 3] in occupied cells beyond the near plane.

        jitter [R] in [0, 1) of a step, or None; `finer` divides every step into that many.
        """
        ends = self._ends(rays_o, rays_d)
        return kernels.march(rays_o, rays_d, *ends, self.grid, self._steps(finer), jitter, self.config.backend)

    def trace(
        self,
        field: Field,
        rays_o: Tensor,
        rays_d: Tensor,
        jitter: Tensor | None,
        finer: int,
        early_stop: float,
        with_features: bool,
    ) -> Traced:
        """`march`, but every ray ends where less than `early_stop` of its light is left; see custom_kernels.trace."""
        t_min, t_max = self._ends(rays_o, rays_d)
        rays = rays_o, rays_d, t_min, t_max, torch.zeros_like(t_min) if jitter is None else jitter
        return trace(field, rays, self.grid, self._steps(finer), early_stop, with_features)

    def _steps(self, finer: int) -> kernels.Steps:
        return replace(
            self.steps,
            size=self.steps.size / finer,
            cone_angle=self.steps.cone_angle / finer,
            max_samples=self.steps.max_samples * finer,
        )

    def _ends(self, rays_o: Tensor, rays_d: Tensor) -> tuple[Tensor, Tensor]:
        t_min, t_max = ray_box(rays_o, rays_d, self.estimator.aabbs[-1])
        return t_min.clamp(min=self.config.near), t_max

    @torch.no_grad()
    def update(self, step: int, field: nn.Module, generator: torch.Generator) -> None:
        """Every `update_every` steps, visit cells at random points: thickness = max(decay thickness, sigma dt).

        Instant-ngp's rule (Mueller et al. 2022, app. E.2) as in nerfacc: a cell is occupied above min(threshold, mean).
        Draws one number from the generator; torch's global random state is restored.
        """
        config, estimator = self.config, self.estimator
        if step % config.update_every:
            return
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        devices = [estimator.occs.device] if estimator.occs.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            thickness = self._thickness(field)
            estimator._update(step, thickness, config.threshold, config.decay, config.warmup)
        cut = estimator.occs[estimator.occs >= 0].mean().clamp(max=config.threshold) * MARGIN
        estimator.binaries = (estimator.occs > cut).view_as(estimator.binaries)

    def _thickness(self, field: nn.Module):
        steps, centre = self.steps, self.estimator.aabbs[0].view(2, 3).mean(0)

        def thickness(points: Tensor) -> Tensor:
            """sigma dt [N, 1], where dt is the step of a ray from the middle of the scene."""
            sigma = torch.cat([field.density(part)[0] for part in points.split(CHUNK)])
            dt = torch.clamp((points - centre).norm(dim=1) * steps.cone_angle, min=steps.size)
            return (sigma * dt)[:, None]

        return thickness


def _inner(resolution: int) -> slice:
    """The cells of a level that the next finer level covers."""
    return slice(resolution // 4, resolution - resolution // 4)


def ray_box(rays_o: Tensor, rays_d: Tensor, aabb: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays [R, 3] enter and leave a box [6]: t_near, t_far [R]; t_near > t_far where they miss it."""
    d = torch.where(rays_d.abs() < 1e-12, 1e-12, rays_d)
    a, b = (aabb[:3] - rays_o) / d, (aabb[3:] - rays_o) / d
    return torch.minimum(a, b).amax(1), torch.maximum(a, b).amin(1)
