"""A representation: what a scene is made of."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csd3d.cameras import Cameras
from csd3d.errors import InputError
from csd3d.registry import register
from csd3d.rendering import Rendered, Shading
from csd3d.representations.base import ALBEDO, BackgroundKind
from csd3d.representations.fit import Features, FitConfig, Pictures, descend, fit_loss, learning_rate, make_optimiser

FLAT = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}


@register("representation", "ball", title="A ball")
@dataclass(frozen=True)
class Ball:
    """One ball of one colour before another, seen through the pixel whose ray passes its centre at the distance d:

    opacity = 1/(1 + exp((d − r)/s))

    representation: {type: ball, softness: 0.02}
    """

    softness: float = 0.05  # s, the width of its edge as a share of the box's shortest side

    def __post_init__(self) -> None:
        if not self.softness > 0:
            raise ValueError(f"softness is {self.softness}: give a number above 0")

    def open(
        self, aabb: Tensor, generator: torch.Generator, unbounded: bool = False, background: BackgroundKind = "learned"
    ) -> "BallScene":
        if isinstance(background, str) and background not in ("learned", *FLAT):
            raise InputError(f"background {background!r}: a ball has learned, {', '.join(FLAT)} or a colour")
        return BallScene(aabb, self.softness, background)


class BallScene(nn.Module):
    """The scene, as `csd3d.representations.base.SceneModel` asks for it. It is never lit: shading is passed over."""

    def __init__(self, aabb: Tensor, softness: float, background: BackgroundKind) -> None:
        super().__init__()
        low, high = aabb[:3], aabb[3:]
        side = (high - low).min()
        self.centre = nn.Parameter((low + high) / 2)
        self.log_radius = nn.Parameter((side / 4).log())
        self.colour = nn.Parameter(torch.zeros(3))  # through a sigmoid, as is the background where it is learned
        self.register_buffer("softness", softness * side)
        self.learns_background = background == "learned"
        if self.learns_background:
            self.behind = nn.Parameter(torch.zeros(3))
        else:
            self.register_buffer("behind", torch.tensor(FLAT.get(background, background)))

    # ------------------------------------------------------------------------------------------------------ rendering

    def render(
        self,
        cameras: Cameras,
        jitter: Tensor | None = None,
        shading: Shading = ALBEDO,
        background: Callable[[Tensor], Tensor] | None = None,
        distortion: bool = False,
    ) -> Rendered:
        cameras = cameras.to(self.centre.device)
        size = (len(cameras), cameras.height, cameras.width, 3)
        rays = zip(*(cameras.image_rays(i) for i in range(len(cameras))), strict=True)
        rays_o, rays_d = (torch.cat(parts) for parts in rays)
        along = ((self.centre - rays_o) * rays_d).sum(1)  # to the point of the ray that is nearest to the centre
        aside = (rays_o + along[:, None] * rays_d - self.centre).norm(dim=1)
        radius = self.log_radius.exp()
        opacity = torch.sigmoid((radius - aside) / self.softness) * (along > 0)
        behind = background(rays_d) if background else self.behind.sigmoid() if self.learns_background else self.behind
        rgb = opacity[:, None] * self.colour.sigmoid() + (1 - opacity[:, None]) * behind
        depth = along - (radius.square() - aside.square()).clamp_min(1e-8).sqrt()
        return Rendered(rgb.view(size), depth.view(size[:3]), opacity.view(size[:3]), samples=len(rgb))

    @torch.no_grad()
    def render_views(self, cameras: Cameras, indices: Tensor, shading: Shading = ALBEDO) -> Rendered:
        return self.render(cameras[indices], shading=shading)

    # --------------------------------------------------------------------------------------------------- optimisation

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        behind = [self.behind] if self.learns_background else []
        return {"scene": [self.centre, self.log_radius, self.colour], "background": behind}

    def set_levels(self, levels: int) -> None:
        """A ball has no levels of detail."""

    def keep_up(self, step: int, generator: torch.Generator) -> None:
        """Nothing has to be looked at again."""

    def start_fit(self, config: FitConfig) -> torch.optim.Optimizer:
        return make_optimiser(self.parameters(), config)

    def fit_step(
        self,
        optimiser: torch.optim.Optimizer,
        pictures: Pictures,
        config: FitConfig,
        step: int,
        generator: torch.Generator,
        features: Features | None = None,
    ) -> dict[str, float]:
        """One random view, whole."""
        view = pictures.views[torch.randint(len(pictures.views), (1,), generator=generator)]
        seen, target = self.render(pictures.cameras[view]), pictures.images[view].to(self.centre.device)
        flat = Rendered(seen.rgb.flatten(0, 2), seen.depth.flatten(), seen.opacity.flatten(), seen.samples)
        usable = None if pictures.masks is None else pictures.masks[view].flatten().to(self.centre.device)
        loss, report = fit_loss(
            flat, target.flatten(0, 2), usable, dataclasses.replace(config, patches=0, rays=1), None
        )
        return report | {"skipped": float(not descend(self, optimiser, loss, learning_rate(config, step)))}

    # ---------------------------------------------------------------------------------------------------------- shape

    def density(self, positions: Tensor) -> Tensor:
        inside = self.log_radius.exp() - (positions - self.centre).norm(dim=-1)
        return torch.sigmoid(inside / self.softness) / self.softness

    def radiance(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        return self.colour.sigmoid().expand(len(positions), 3), self.density(positions)
