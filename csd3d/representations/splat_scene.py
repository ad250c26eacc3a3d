"""A scene of Gaussian splats: rendering, fitting, its surface and its files.

Symbols as in `base`; N splats. `custom_kernels/splats.py` has the equations and `splat_growth` what moves splats.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csd3d.cameras import Cameras
from csd3d.datasets.splat_files import moved, view_of, write_splats
from csd3d.datasets.spz import write_spz
from csd3d.errors import InputError
from csd3d.fields import Background
from csd3d.rendering import RenderConfig, Rendered, Shading
from csd3d.representations.base import ALBEDO
from csd3d.representations.fit import Features, FitConfig, Pictures, descend, fit_loss, learning_rate, make_optimiser
from csd3d.representations.hashgrid import HashGrid
from csd3d.representations.splat_growth import move_dead, new_splats, surface_points
from csd3d.representations.splat_surface import Surface, depth_shaded
from csd3d.waits import sent
from custom_kernels import splats as kernels

if TYPE_CHECKING:
    from csd3d.export.placement import Placement
    from csd3d.representations.splats import GaussianSplats

SETTLED = 0.8  # share of a fit after which no splat is moved any more
LAST_MEANS = 0.2  # factor on the positions' learning rate at the end of a fit, besides the schedule's
# learning rates as shares of the optimiser's; positions also times half the box's longest side
RATES = {"means": 2.4, "log_scales": 3.0, "quats": 1.0, "opacities": 10.0, "dc": 2.0, "rest": 1.0}
UNBOUNDED = RenderConfig(steps=160, cone_angle=0.03)  # of the NeRF that splats of an unbounded scene start from
COARSE = 4  # pixels along a side for one evaluation of the learned background, which is smooth


class SplatScene(nn.Module):
    """Splats before a background. `base.SceneModel` explains the methods."""

    def __init__(
        self, config: "GaussianSplats", aabb: Tensor, unbounded: bool, background: Background, cameras: Cameras | None
    ) -> None:
        super().__init__()
        self.config, self.unbounded, self.cameras = config, unbounded, cameras
        self.register_buffer("aabb", aabb.clone().float())
        self.background = background
        self.size = (aabb[3:] - aabb[:3]).max().item()
        for name in kernels.Splats._fields:
            setattr(self, name, nn.Parameter(torch.empty(0)))
        self.degree = 0  # of the harmonics in use
        self.given = False  # the scene is one that was there already: its reconstruction is finished
        self.fits = 0  # fits that were begun; the first is the reconstruction, the next edits
        self.fresh: Tensor | None = None  # splats that `keep_up` has moved
        self.order: list[int] = []  # views that the fit will see next
        self._surface: tuple[Any, Surface] | None = None  # with what it was made from

    @torch.no_grad()
    def take(self, splats: kernels.Splats) -> None:
        """Take other splats, with all their harmonics."""
        self._replace(splats, torch.arange(len(splats.means)))
        self.degree = math.isqrt(splats.rest.shape[1] + 1) - 1

    @property
    def splats(self) -> kernels.Splats:
        return kernels.Splats(*(getattr(self, name) for name in kernels.Splats._fields))

    # ------------------------------------------------------------------------------------------------------ rendering

    def render(
        self,
        cameras: Cameras,
        jitter: Tensor | None = None,
        shading: Shading = ALBEDO,
        background: Callable[[Tensor], Tensor] | None = None,
        distortion: bool = False,
    ) -> Rendered:
        return self._render(cameras, range(len(cameras)), background, depth=True)

    @torch.no_grad()
    def render_views(self, cameras: Cameras, indices: Tensor, shading: Shading = ALBEDO) -> Rendered:
        cameras, order = cameras.to(self.means.device), indices.tolist()
        views = self._render(cameras, order, None, depth=True)
        if shading.mode == "albedo":
            return views
        each = [Rendered(*(x[k] for x in (views.rgb, views.depth, views.opacity)), 0) for k in range(len(order))]
        behind = [self._behind(cameras, i, None) for i in order]
        lit = [depth_shaded(*parts, shading, b) for *parts, b in zip(each, repeat(cameras), order, behind)]
        return replace(views, rgb=torch.stack(lit))

    def _render(
        self, cameras: Cameras, indices: Any, background: Callable[[Tensor], Tensor] | None, depth: bool
    ) -> Rendered:
        self.check_device()
        options = {"degree": self.degree, "antialiased": self.config.antialiased, "depth": depth}
        found = [
            kernels.render(self.splats, view_of(cameras, i), backend=self.config.backend, **options) for i in indices
        ]
        behind = torch.stack([self._behind(cameras, i, background) for i in indices])
        rgb, light = torch.stack([image.rgb for image in found]), torch.stack([image.light for image in found])
        opacity = 1 - light
        deep = torch.stack([image.depth for image in found]) if depth else torch.zeros_like(opacity)
        deep = torch.where(opacity > 1e-6, deep / opacity.detach().clamp_min(1e-6), 0)
        return Rendered(rgb + light[..., None] * behind, deep, opacity, len(self.means) * len(found))

    def _behind(self, cameras: Cameras, index: int, background: Callable[[Tensor], Tensor] | None) -> Tensor:
        """The background [H, W, 3]; a learned one is evaluated coarsely and interpolated."""
        size = (cameras.height, cameras.width)
        camera = cameras[index].to(self.means.device)
        if background is None and self.background.net is None:
            return self.means.new_tensor(self.background.colour).expand(*size, 3)
        coarse = 1 if background is not None else COARSE
        small = camera.resized(math.ceil(size[1] / coarse), math.ceil(size[0] / coarse))
        rgb = (background or self.background)(small.image_rays(0)[1]).view(small.height, small.width, 3)
        if coarse == 1:
            return rgb
        return F.interpolate(rgb.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)

    def check_device(self) -> None:
        """Raise InputError on a GPU without gsplat, where the reference would take minutes for a picture."""
        self.config.check_backend(self.means.device)

    # --------------------------------------------------------------------------------------------------- optimisation

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"scene": list(self.splats), "background": list(self.background.parameters())}

    def rate_of(self, parameter: nn.Parameter) -> float:
        """The parameter's learning rate as a share of the optimiser's."""
        name = next((name for name, own in self.splats._asdict().items() if own is parameter), None)
        return RATES.get(name, 0.5) * (self.size / 2 if name == "means" else 1.0)

    def set_levels(self, levels: int) -> None:
        """Splats have no levels."""

    @torch.no_grad()
    def keep_up(self, step: int, generator: torch.Generator) -> None:
        """Move dead splats now and then."""
        if step and step % self.config.relocate_every == 0:
            splats, self.fresh = move_dead(self.splats, self.config.least_opacity, 0, generator)
            self._replace(splats, self.fresh)

    def renewed(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The rows that `keep_up` has moved since this was last asked; their average would lie between places."""
        rows, self.fresh = self.fresh, None
        return [] if rows is None else [(parameter, rows) for parameter in self.splats]

    def start_fit(self, config: FitConfig) -> torch.optim.Adam:
        self.check_device()
        self.fits, self.order = self.fits + 1, []
        parameters = [p for group in self.parameter_groups().values() for p in group]
        optimiser = make_optimiser(({"params": [p], "rate": self.rate_of(p)} for p in parameters), config)
        return optimiser

    def fit_step(
        self,
        optimiser: torch.optim.Adam,
        pictures: Pictures,
        config: FitConfig,
        step: int,
        generator: torch.Generator,
        features: Features | None = None,
    ) -> dict[str, float]:
        """Fit to one view, whole; each is seen once before any is seen again."""
        if self.given and self.fits == 1:
            return self._seen(pictures, generator)
        if step == 0 and self.fits == 1 and self.config.start == "nerf":
            self._start_from_nerf(optimiser, pictures, generator)
        done = step / config.steps
        self.degree = self._degree(done)
        if step and step % self.config.relocate_every == 0 and done < SETTLED:
            self._replace(*self._moved(generator), optimiser)
        if not self.order:
            self.order = pictures.views[torch.randperm(len(pictures.views), generator=generator)].tolist()
        index = self.order.pop()
        if index not in pictures.views:  # a checkpoint's
            raise InputError(f"the checkpoint's fit waits for view {index}, which is none of the scene's; start afresh")
        loss, report = self._loss(pictures, index, config, features, generator)
        for group in optimiser.param_groups:
            if group["params"][0] is self.means:
                group["rate"] = self.rate_of(self.means) * LAST_MEANS**done
        finite = descend(self, optimiser, loss, learning_rate(config, step))
        return report | {"skipped": float(not finite), "splats": float(len(self.means))}

    @torch.no_grad()
    def _seen(self, pictures: Pictures, generator: torch.Generator) -> dict[str, float]:
        """What a step reports of a scene that is not to be changed."""
        index = pictures.views[torch.randint(len(pictures.views), (1,), generator=generator)]
        error = (self.render_views(pictures.cameras, index).rgb - pictures.images[index].to(self.means.device)).square()
        return {"psnr": -10 * math.log10(error.mean().item() + 1e-10), "skipped": 0.0}

    def _degree(self, done: float) -> int:
        """The degree in use: it rises during the reconstruction, and stays low in an edit."""
        if self.fits > 1:
            return min(self.config.edit_degree, math.isqrt(self.rest.shape[1] + 1) - 1)
        return min(int(4 * done), self.config.sh_degree)

    def _loss(
        self, pictures: Pictures, index: int, config: FitConfig, features: Features | None, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """`fit_loss` of a whole view, whose patches' pixels count twice, and the penalties of MCMC (equation 13)."""
        seen = self._render(pictures.cameras, [index], None, depth=False)
        device, target = seen.rgb.device, pictures.images[index]
        side = min(config.patch_size, *target.shape[:2])
        corners = [
            [torch.randint(n - side + 1, (), generator=generator) for n in target.shape[:2]]
            for _ in range(config.patches)
        ]

        def rays(x: Tensor) -> Tensor:
            patches = [x[row : row + side, column : column + side].flatten(0, 1) for row, column in corners]
            return torch.cat([*patches, x.flatten(0, 1)])

        usable = None if pictures.masks is None else rays(sent(pictures.masks[index], device))
        flat = Rendered(rays(seen.rgb[0]), rays(seen.depth[0]), rays(seen.opacity[0]), seen.samples)
        loss, report = fit_loss(flat, rays(sent(target, device)), usable, config, features)
        sizes = self.log_scales.exp().mean() / self.size
        penalty = self.config.opacity_penalty * self.opacities.sigmoid().mean() + self.config.size_penalty * sizes
        return loss + penalty, report

    def _moved(self, generator: torch.Generator) -> tuple[kernels.Splats, Tensor]:
        count = len(self.means)
        most = max(self.config.max_count, self.config.count)
        extra = min(max(count // 20, 1), most - count) if count < most and self.config.max_count else 0
        return move_dead(self.splats, self.config.least_opacity, extra, generator)

    @torch.no_grad()
    def _replace(self, splats: kernels.Splats, changed: Tensor, optimiser: torch.optim.Adam | None = None) -> None:
        """Take other splats; Adam's moments of those that are new or have `changed` are 0."""
        for parameter, value in zip(self.splats, splats, strict=True):
            parameter.data = value.detach().clone()
            state = {} if optimiser is None else optimiser.state.get(parameter, {})
            for key in {"exp_avg", "exp_avg_sq"} & state.keys():
                state[key] = torch.cat((state[key], value.new_zeros(len(value) - len(state[key]), *value.shape[1:])))
                state[key][changed] = 0

    def _start_from_nerf(self, optimiser: torch.optim.Adam, pictures: Pictures, generator: torch.Generator) -> None:
        """Take the surfaces of a hash-grid NeRF that is fitted for a few steps."""
        render, distortion = (UNBOUNDED, 0.05) if self.unbounded else (RenderConfig(), 0.0)
        model = HashGrid(render=render).open(self.aabb.cpu(), generator, self.unbounded).to(self.means.device)
        config = FitConfig(steps=self.config.nerf_steps, distortion_weight=distortion)
        adam = model.start_fit(config)
        for step in range(config.steps):
            model.fit_step(adam, pictures, config, step, generator)
        found = surface_points(model, pictures.cameras[pictures.views], self.config.count, generator)
        if len(found[0]):
            splats = new_splats(*found, self.config.sh_degree, self.size)
            splats = kernels.Splats(*(x.to(self.means.device) for x in splats))
            self._replace(splats, torch.arange(len(found[0])), optimiser)

    # ---------------------------------------------------------------------------------------------------------- shape

    def density(self, positions: Tensor) -> Tensor:
        """σ of the surface that the cameras of the fit see, which is found when first asked for."""
        return self.surface().density(positions)

    def radiance(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """The surface's colour, the same from all sides, and σ."""
        return self.surface().colours(positions), self.density(positions)

    def surface(self) -> Surface:
        """The fused surface of the splats as they are."""
        made_from = [(x.data_ptr(), x._version) for x in self.splats]
        if self._surface is None or self._surface[0] != made_from:
            self._surface = made_from, Surface(self, self.aabb, self.cameras)
        return self._surface[1]

    def write_files(self, folder: Path, placement: "Placement") -> None:
        """Write `splats.ply` in the placement's own frame and `splats.spz`, y up as in GLB; without the background."""
        rotation, axes = (torch.from_numpy(x) for x in (placement.rotation, placement.axes))
        shift = torch.from_numpy(placement.shift)
        splats = kernels.Splats(*(x.detach().cpu() for x in self.splats))
        write_splats(folder / "splats.ply", moved(splats, rotation, 1 / placement.scale, shift), placement.frame)
        upright = moved(
            splats, axes @ rotation, 1 / placement.scale, axes @ (shift - torch.from_numpy(placement.offset))
        )
        write_spz(folder / "splats.spz", upright, self.config.antialiased)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def get_extra_state(self) -> dict[str, Any]:
        """State of a checkpoint besides parameters and buffers (torch's hook)."""
        return {"degree": self.degree, "fits": self.fits, "order": list(self.order), "given": self.given}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned; ValueError where that cannot be."""
        if any(type(i) is not int or i < 0 for i in state["order"]):
            raise ValueError("order: expected a list of numbers of views")
        if type(state["degree"]) is not int or not 0 <= state["degree"] <= math.isqrt(self.rest.shape[1] + 1) - 1:
            raise ValueError(f"degree: is {state['degree']!r:.40}, which the splats' harmonics do not have")
        self.degree, self.fits, self.order = state["degree"], state["fits"], list(state["order"])
        self.given = state["given"]

    def load_state_dict(self, state: dict[str, Any], *options: Any, **more: Any) -> Any:
        """Take the state's number of splats, then load it; ValueError names the first tensor that does not fit."""
        if not torch.allclose(state["aabb"].to(self.aabb), self.aabb, atol=1e-3 * self.size):
            raise ValueError(f"aabb: is {state['aabb'].tolist()}, the scene's box is {self.aabb.tolist()}")
        for name in kernels.Splats._fields:
            own, shape = getattr(self, name), state[name].shape
            fits = len(shape) == own.dim() and shape[0] == len(state["means"])
            if not fits or (name != "rest" and shape[1:] != own.shape[1:]):  # those given may have more harmonics
                raise ValueError(f"{name}: is of shape {tuple(shape)}, which does not fit the other splats")
        for name in kernels.Splats._fields:
            getattr(self, name).data = torch.empty_like(state[name], device=self.means.device)
        return super().load_state_dict(state, *options, **more)
