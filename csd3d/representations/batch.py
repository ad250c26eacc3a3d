"""What text to 3D makes: N scenes of one representation, rendered at the same cameras.

Symbols: N assets, V views a step of S² pixels; the N·V particles are ordered asset by asset. Assets are used through
the protocol in `base` only.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csd3d.cameras import Cameras
from csd3d.fields import FieldConfig
from csd3d.memory import check_fits
from csd3d.rendering import RenderConfig, Rendered, Shading
from csd3d.rendering.bend import bend
from csd3d.representations.base import ignored_keys, open_scene
from csd3d.representations.fit import opacity_entropy
from csd3d.schema import MOST_STEPS, Amount, Chosen, OneOf, Share, Within, choose, show
from csd3d.waits import to_host

StepNumber = Annotated[int, Within(0, MOST_STEPS)]
Schedule = float | tuple[float, float, float, float]  # a value, or (first step, its value, last step, its value)


@dataclass
class ShadingConfig:
    """How often a step's renders are lit, and how: DreamFusion's albedo, Lambertian and white (textureless) shading."""

    start: StepNumber = 100  # steps before the first that may be lit
    lambertian: float = 0.0  # share of the later steps that show the colours lit
    textureless: float = 0.0  # share of the later steps that show a white surface lit
    ambient: Share = 0.3  # share of the light that comes from everywhere
    lamp: Amount = 0.3  # standard deviation of the lamp's place about the camera, as a share of the camera's distance
    # normals are finite differences over this length in world units; null: analytic
    normal_step: Annotated[float, Within(1e-6, 10)] | None = 0.01

    def __post_init__(self) -> None:
        if min(self.lambertian, self.textureless) < 0 or self.lambertian + self.textureless > 1:
            raise ValueError(f"lambertian is {self.lambertian}, textureless {self.textureless}: shares of at most 1")


@dataclass
class LossConfig:
    """Weights of the regularisers: a number each, or a ramp [first step, value, last step, value]."""

    orientation: Schedule = 0.0  # weight of Ref-NeRF's penalty on visible surfaces that face away from the camera
    sparsity: Schedule = 0.0  # weight of DreamFusion's √(opacity² + 0.01), which empties pixels
    opacity: Schedule = 0.0  # weight of the opacity's entropy: half-transparent pixels become empty or full
    distortion: Schedule = 0.0  # weight of mip-NeRF 360's distortion loss: haze becomes a surface
    smoothness: Schedule = 0.0  # weight of the bend of visible surfaces: creases and dents become smooth
    transmittance: Schedule = 0.0  # weight of DreamFields' -min(share of a view that is empty, `empty`)
    empty: Schedule = 0.88  # share of a view up to which losses.transmittance empties it

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if isinstance(value, tuple) and value[2] <= value[0]:
                raise ValueError(f"{key} is {list(value)}: its last step must come after its first")
            weights = value[1::2] if isinstance(value, tuple) else (value,)
            if min(weights) < 0:
                raise ValueError(f"{key} is {show(value)}: give weights of at least 0")
            if key == "empty" and max(weights) > 1:
                raise ValueError(f"empty is {show(value)}: give a share of a view, from 0 to 1")


def _small_hashgrid() -> Chosen:
    field = FieldConfig(hidden=32, colour_layers=1, sh_degree=1, blob_scale=5.0, blob_radius=0.6)
    render = RenderConfig(steps=128, max_samples=256, finer=4, warmup=64)
    return choose("representation", "hashgrid", field=field, render=render)


@dataclass
class AssetConfig:
    """What each asset is, and how large its renders are."""

    extent: Annotated[float, Within(1e-3, 1_000_000)] = 1.1  # the asset's box is [−extent, extent]³ in world units
    representation: Annotated[Chosen, OneOf("representation")] = dataclasses.field(  # what each asset is made of
        default_factory=_small_hashgrid
    )
    # learned, white or black; prompts.backdrops takes its place
    background: Literal["learned", "white", "black"] = "learned"
    random_background: float = 0.0  # share of the steps whose background is one random colour
    textured_background: float = 0.0  # share of the steps whose views have noise, chequerboards or waves behind them
    resolution: list[tuple[StepNumber, Annotated[int, Within(1, 2048)]]] = (
        dataclasses.field(  # [step, pixels] pairs: side of the renders from that step
            default_factory=lambda: [(0, 64)]
        )
    )
    levels: list[tuple[StepNumber, Annotated[int, Within(1, 64)]]] = (
        dataclasses.field(  # [step, count] pairs: levels of detail in use from that step
            default_factory=lambda: [(0, 12)]
        )
    )

    def __post_init__(self) -> None:
        for key in ("random_background", "textured_background"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a share of the steps in [0, 1]")
        for key in ("resolution", "levels"):
            steps = [step for step, _ in getattr(self, key)]
            if not steps or steps[0] != 0 or steps != sorted(set(steps)):
                raise ValueError(
                    f"{key} is {getattr(self, key)}: give [step, value] pairs, the first at step 0, rising"
                )
        if self.max_levels and max(value for _, value in self.levels) > self.max_levels:
            raise ValueError(f"levels asks for more than the {self.max_levels} of the {self.representation.name}")

    @property
    def box(self) -> Tensor:
        """The asset's box [6] (min, max)."""
        return torch.tensor([-self.extent] * 3 + [self.extent] * 3)

    @property
    def max_levels(self) -> int:
        """Levels of detail that the representation has; 0: none, and `levels` is ignored."""
        return getattr(self.representation.thing, "levels", 0)


class Assets(nn.Module):
    """N scenes, each from its own random start, in front of the colour `backdrop` if one is given."""

    def __init__(
        self, config: AssetConfig, count: int, generator: torch.Generator, backdrop: tuple[float, ...] | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("aabb", config.box)
        parts, background = (self.aabb.cpu(), generator), backdrop or config.background
        made_of = config.representation.thing
        self.models = nn.ModuleList(open_scene(made_of, *parts, background=background) for _ in range(count))

    def render(
        self, cameras: Cameras, jitter: Tensor, shading: Shading, colour: Tensor | None, distortion: bool = False
    ) -> "AssetViews":
        """All assets at the same V cameras; jitter [N, V·S²]; colour [3], if given, replaces the backgrounds."""
        plain = None if colour is None else lambda d: colour.to(d).expand_as(d)
        jitter = jitter.unflatten(1, (len(cameras), cameras.height, cameras.width))
        found = [m.render(cameras, j, shading, plain, distortion) for m, j in zip(self.models, jitter, strict=True)]
        return AssetViews(torch.cat([view.rgb for view in found]).permute(0, 3, 1, 2), found, cameras)

    def prepare(self, step: int, levels: int, generator: torch.Generator) -> None:
        """Set the levels of detail in use and do each scene's upkeep before step `step`."""
        for model in self.models:
            model.set_levels(levels)
            model.keep_up(step, generator)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let each scene load its own part: its parameters may have another shape by now (see `base`)."""
        for i, model in enumerate(self.models):
            own = f"models.{i}."
            model.load_state_dict({k.removeprefix(own): value for k, value in state.items() if k.startswith(own)})


@dataclass
class AssetViews:
    """Pictures [N·V, 3, S, S], asset by asset, and what each asset's views [V, S, S] reported, from the V cameras."""

    images: Tensor
    rendered: list[Rendered]
    cameras: Cameras

    def before(self, backgrounds: Tensor) -> "AssetViews":
        """Views that were rendered before black, before `backgrounds` [N·V, 3, S, S]."""
        opacity = torch.cat([r.opacity for r in self.rendered])[:, None]
        return dataclasses.replace(self, images=self.images + (1 - opacity) * backgrounds.to(opacity))

    def at_side(self, side: int) -> Tensor:
        """The pictures resized to `side` pixels; each of their pixels counts, so each gets a gradient."""
        reduces = self.images.shape[-1] > side
        return F.interpolate(self.images, (side, side), mode="bilinear", align_corners=False, antialias=reduces)


def regularisers(views: AssetViews, config: LossConfig, step: int) -> tuple[Tensor, dict[str, float]]:
    """Weighted sum of the losses whose weight at `step` is not 0, and each of them unweighted: means over rays.

    Losses that the representation does not report (orientation, distortion, smoothness) are left out.
    """
    opacity = torch.cat([r.opacity for r in views.rendered])
    total, report = opacity.new_zeros(()), {}
    for key in ("orientation", "sparsity", "transmittance", "opacity", "distortion", "smoothness"):
        weight = scheduled(getattr(config, key), step)
        if not weight:
            continue
        if key == "sparsity":
            value = (opacity.square() + 0.01).sqrt().mean()
        elif key == "transmittance":
            value = -(1 - opacity.flatten(1).mean(1)).clamp(max=scheduled(config.empty, step)).mean()
        elif key == "opacity":
            value = opacity_entropy(opacity)
        elif key == "smoothness":
            if not all(r.depth.requires_grad for r in views.rendered):
                continue
            depth = torch.stack([r.depth for r in views.rendered])
            value = bend(depth, opacity.view_as(depth), views.cameras).mean()
        else:
            parts = [r.penalty if key == "orientation" else r.distortion for r in views.rendered]
            if any(part is None for part in parts):
                continue
            value = torch.cat(parts).mean()
        total, report[key] = total + weight * value, value
    return total, to_host(report)


def scheduled(value: Schedule, step: int) -> float:
    """The weight at `step`: a ramp is linear between its two steps and constant outside."""
    if not isinstance(value, tuple):
        return value
    first, start, last, end = value
    return start + (end - start) * min(max((step - first) / (last - first), 0.0), 1.0)


def milestone(pairs: list[tuple[int, int]], step: int) -> int:
    """The value of the last [step, value] pair whose step has been reached."""
    return [value for at, value in pairs if at <= step][-1]


def draw_shading(config: ShadingConfig, losses: LossConfig, step: int, generator: torch.Generator) -> Shading:
    """The step's random shading. Always draws the same amount from the generator."""
    u, lamp = torch.rand((), generator=generator).item(), torch.randn(3, generator=generator) * config.lamp
    lit = u < config.lambertian + config.textureless and step >= config.start
    mode = "albedo" if not lit else "textureless" if u < config.textureless else "lambertian"
    orientation = bool(scheduled(losses.orientation, step))
    if not lit and not orientation:
        return Shading()
    return Shading(mode, tuple(lamp.tolist()), config.ambient, config.normal_step, orientation)


def ignored(asset: AssetConfig, losses: LossConfig, shading: ShadingConfig) -> list[str]:
    """Return a warning for each key that is set and that the representation does not support."""
    given = {f"losses.{key}": key for key in ("orientation", "distortion", "smoothness") if getattr(losses, key)}
    given |= {f"shading.{key}": "shading" for key in ("lambertian", "textureless") if getattr(shading, key)}
    if not asset.max_levels and asset.levels != AssetConfig().levels:
        given["asset.levels"] = "levels of detail"
    return ignored_keys(asset.representation, given)


def check_memory(config: AssetConfig, particles: int, views: int, device: torch.device | None = None) -> None:
    """Raise InputError where the assets or a step's renders would not fit on the device, before they are made."""
    side, made_of = max(side for _, side in config.resolution), config.representation.thing
    needed = particles * views * side**2 * getattr(made_of, "bytes_per_ray", 0)
    given = f"particles {particles} × views_per_step {views} at asset.resolution {side}"
    check_fits(needed, f"{given}: a step", "lower views_per_step, particles or asset.resolution", device)
    needed = particles * getattr(made_of, "training_bytes", 0)
    check_fits(needed, f"particles {particles}: training them", "lower particles", device)
