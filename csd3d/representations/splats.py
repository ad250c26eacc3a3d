"""Gaussian splats (Kerbl et al. 2023, arXiv 2308.04079): their settings, and how they begin.

Symbols as in `base`. `splat_scene` has the scene, `custom_kernels/splats.py` the equations.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.datasets.listing import Points
from csd3d.datasets.splat_files import MAX_SPLATS
from csd3d.errors import InputError
from csd3d.fields import Background
from csd3d.registry import register
from csd3d.representations.base import BackgroundKind
from csd3d.representations.splat_growth import new_splats, random_points
from csd3d.representations.splat_scene import SplatScene
from csd3d.schema import Amount, Within
from custom_kernels import splats as kernels

STARTS = ("auto", "points", "random", "nerf")


@register("representation", "splats", title="Gaussian splats")
@dataclass(frozen=True)
class GaussianSplats:
    """Gaussian splats, moved to where they are needed as 3DGS-MCMC does (arXiv 2404.09591).

    representation: {type: splats, count: 20000}
    """

    count: Annotated[int, Within(1, MAX_SPLATS)] = 5000  # splats at the start
    # splats that they may grow to in a fit; 0: as many as at the start
    max_count: Annotated[int, Within(0, MAX_SPLATS)] = 0
    # degree of the spherical harmonics of a splat's colour
    sh_degree: Annotated[int, Within(0, kernels.MAX_DEGREE)] = 3
    # degree in use while an edit runs, so that views that disagree cannot each have their way
    edit_degree: Annotated[int, Within(0, kernels.MAX_DEGREE)] = 0
    start: str = (
        "auto"  # points (of the capture) | random | nerf (surfaces of a quick one); auto: points if there are any
    )
    nerf_steps: Annotated[int, Within(1, 100_000)] = 60  # steps of the NeRF of `start: nerf`
    antialiased: bool = True  # Mip-Splatting's filter: splats thinner than a pixel become fainter, not wider
    relocate_every: Annotated[int, Within(1, 1_000_000)] = 50  # steps between moves of splats that have died
    least_opacity: float = 0.02  # below, a splat is dead
    opacity_penalty: Amount = 2e-3  # weight of the splats' mean opacity: what is not needed dies
    size_penalty: Amount = 2e-3  # weight of the splats' mean size, as a share of the box
    backend: str = "auto"  # auto | reference | native | gsplat

    hints: ClassVar[tuple[str, ...]] = ("points", "cameras", "splats")
    supports: ClassVar[tuple[str, ...]] = ()
    bytes_per_ray: ClassVar[int] = 400

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise ValueError(f"start is {self.start!r}: choose one of {', '.join(STARTS)}")
        if self.backend not in kernels.BACKENDS:
            raise ValueError(f"backend is {self.backend!r}: choose one of {', '.join(kernels.BACKENDS)}")
        for key in ("sh_degree", "edit_degree"):
            if not 0 <= getattr(self, key) <= kernels.MAX_DEGREE:
                raise ValueError(f"{key} is {getattr(self, key)}: give 0 to {kernels.MAX_DEGREE}")
        if not 1 <= self.count <= MAX_SPLATS or not 0 <= self.max_count <= MAX_SPLATS:
            raise ValueError(
                f"count is {self.count}, max_count {self.max_count}: give 1 to {MAX_SPLATS:,} (max_count: or 0)"
            )
        if self.relocate_every < 1 or self.nerf_steps < 1:
            raise ValueError("relocate_every and nerf_steps: give whole numbers of at least 1")
        if not 0 < self.least_opacity < 0.1:
            raise ValueError(f"least_opacity is {self.least_opacity}: give a number above 0, below 0.1")

    def check_backend(self, device: torch.device) -> None:
        """Raise InputError on a GPU where `auto` is not gsplat, RuntimeError for a name that cannot run there."""
        if self.backend == "auto" and device.type == "cuda" and (problem := kernels.gsplat_obstacle()) is not None:
            raise InputError(f"representation.type=splats needs gsplat on a GPU, but {problem}")
        if self.backend != "auto":
            kernels.check_backend(self.backend, torch.empty(0, device=device))

    def open(
        self,
        aabb: Tensor,
        generator: torch.Generator,
        unbounded: bool = False,
        background: BackgroundKind = "learned",
        points: Points | None = None,
        cameras: Cameras | None = None,
        splats: kernels.Splats | None = None,
    ) -> "SplatScene":
        if self.start == "points" and points is None:
            raise InputError("representation.start is points, but the capture has none; choose random or nerf")
        kind = background if splats is None else "white"  # before which a finished scene is rendered
        scene = SplatScene(self, aabb, unbounded, Background(kind, generator=generator), cameras)
        if splats is not None:
            scene.take(splats)
            scene.given = True
        elif self.start in ("auto", "points") and points is not None and len(points.xyz):
            xyz, rgb = (torch.from_numpy(x).float() for x in (points.xyz, points.rgb))
            pick = torch.randperm(len(xyz), generator=generator)[: self.count]
            scene.take(new_splats(xyz[pick], rgb[pick], self.sh_degree, scene.size))
        else:
            xyz = random_points(aabb.float(), self.count, cameras, unbounded, generator)
            rgb = torch.rand(len(xyz), 3, generator=generator)
            scene.take(new_splats(xyz, rgb, self.sh_degree, scene.size))
        return scene
