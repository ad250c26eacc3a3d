"""What text to 3D makes: N scenes side by side, rendered at a step's cameras, lit as the step says.

Symbols: N assets, V views a step of S² pixels; particles are asset-major, N·V of them. Assets are reached through the
protocol in `base` alone.
"""

import copy
import dataclasses
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csd3d.cameras import Cameras
from csd3d.errors import InputError
from csd3d.fields import FieldConfig
from csd3d.rendering import RenderConfig, Rendered, Shading
from csd3d.representations.base import Representation
from csd3d.representations.fit import opacity_entropy
from csd3d.representations.hashgrid import HashGrid

Schedule = float | tuple[float, float, float, float]  # a value, or (first step, its value, last step, its value)
BYTES_A_SAMPLE = 1700  # of a training render: activations of encoding and networks, kept for the backward pass
SAMPLES_A_RAY = 40


@dataclass
class ShadingConfig:
    """How often a step's renders are lit, and how: DreamFusion's schedule of albedo, Lambertian and white surfaces.

    `lambertian` and `textureless` are shares of the steps from `start` on; the lamp strays from the camera by `lamp`
    (standard deviation, of the distance); normals are differences over `normal_step` world units, null: analytic.
    """

    start: int = 100
    lambertian: float = 0.0
    textureless: float = 0.0
    ambient: float = 0.3
    lamp: float = 0.3
    normal_step: float | None = 0.01

    def __post_init__(self) -> None:
        if min(self.lambertian, self.textureless) < 0 or self.lambertian + self.textureless > 1:
            raise ValueError(f"lambertian is {self.lambertian}, textureless {self.textureless}: shares of at most 1")


@dataclass
class LossConfig:
    """Weights of what holds a field to sense beside its guidance; a number, or a ramp [first, value, last, value].

    orientation: Ref-NeRF's, seen surfaces that face away; sparsity: DreamFusion's √(opacity² + 0.01); opacity: its
    entropy, half-transparent pixels; distortion: mip-NeRF 360's.
    """

    orientation: Schedule = 0.0
    sparsity: Schedule = 0.0
    opacity: Schedule = 0.0
    distortion: Schedule = 0.0

    def __post_init__(self) -> None:
        for key in ("orientation", "sparsity", "opacity", "distortion"):
            value = getattr(self, key)
            if isinstance(value, tuple) and value[2] <= value[0]:
                raise ValueError(f"{key} is {list(value)}: its last step must come after its first")


@dataclass
class AssetConfig:
    """One asset: its box [−extent, extent]³, field, renderer and background (learned | white | black).

    `random_background` is the share of steps whose background is one random colour; `resolution` and `levels` are
    milestones [step, value]: side of the renders, and levels of the hash grid in use.
    """

    extent: float = 1.1
    field: FieldConfig = dataclasses.field(
        default_factory=lambda: FieldConfig(hidden=32, colour_layers=1, sh_degree=1, blob_scale=5.0, blob_radius=0.6)
    )
    render: RenderConfig = dataclasses.field(
        default_factory=lambda: RenderConfig(steps=128, max_samples=256, finer=4, warmup=64)
    )
    background: str = "learned"
    random_background: float = 0.0
    resolution: list[tuple[int, int]] = dataclasses.field(default_factory=lambda: [(0, 64)])
    levels: list[tuple[int, int]] = dataclasses.field(default_factory=lambda: [(0, 12)])

    def __post_init__(self) -> None:
        if not self.extent > 0:
            raise ValueError(f"extent is {self.extent}: give a length above 0")
        for key in ("resolution", "levels"):
            steps = [step for step, _ in getattr(self, key)]
            if not steps or steps[0] != 0 or steps != sorted(set(steps)):
                raise ValueError(
                    f"{key} is {getattr(self, key)}: give [step, value] pairs, the first at step 0, rising"
                )
        if max(value for _, value in self.levels) > self.field.levels:
            raise ValueError(f"levels asks for more than field.levels, {self.field.levels}")

    @property
    def representation(self) -> Representation:
        """What each asset is made of."""
        return HashGrid(self.field, self.render)


class Assets(nn.Module):
    """N scenes, each with a start of its own; before `backdrop`, rgb, where one is given."""

    def __init__(
        self, config: AssetConfig, count: int, generator: torch.Generator, backdrop: tuple[float, ...] | None = None
    ) -> None:
        super().__init__()
        e = config.extent
        self.register_buffer("aabb", torch.tensor([-e, -e, -e, e, e, e]))
        parts, background = (self.aabb.cpu(), generator), backdrop or config.background
        self.models = nn.ModuleList(config.representation.open(*parts, background=background) for _ in range(count))

    def render(
        self, cameras: Cameras, jitter: Tensor, shading: Shading, colour: Tensor | None, distortion: bool = False
    ) -> "AssetViews":
        """All assets at the same cameras [V]; `jitter` [N, V·S²]; `colour` [3] stands in for the backgrounds."""
        plain = None if colour is None else lambda d: colour.to(d).expand_as(d)
        jitter = jitter.unflatten(1, (len(cameras), cameras.height, cameras.width))
        found = [m.render(cameras, j, shading, plain, distortion) for m, j in zip(self.models, jitter, strict=True)]
        return AssetViews(torch.cat([view.rgb for view in found]).permute(0, 3, 1, 2), found)

    def set_levels(self, levels: int) -> None:
        """How many levels of detail count."""
        for model in self.models:
            model.set_levels(levels)

    def update_grids(self, step: int, generator: torch.Generator) -> None:
        """What has to be done before a step."""
        for model in self.models:
            model.keep_up(step, generator)


@dataclass
class AssetViews:
    """Pictures [N·V, 3, S, S], asset-major, and what each asset's views [V, S, S] reported."""

    images: Tensor
    rendered: list[Rendered]


def regularisers(views: AssetViews, config: LossConfig, step: int) -> tuple[Tensor, dict[str, float]]:
    """Weighted sum of the losses that have a weight at `step`, and each of them unweighted: means over rays."""
    opacity = torch.cat([r.opacity for r in views.rendered])
    total, report = opacity.new_zeros(()), {}
    for key in ("orientation", "sparsity", "opacity", "distortion"):
        weight = scheduled(getattr(config, key), step)
        if not weight:
            continue
        if key == "sparsity":
            value = (opacity.square() + 0.01).sqrt().mean()
        elif key == "opacity":
            value = opacity_entropy(opacity)
        else:
            value = torch.cat([r.penalty if key == "orientation" else r.distortion for r in views.rendered]).mean()
        total, report[key] = total + weight * value, value.item()
    return total, report


def scheduled(value: Schedule, step: int) -> float:
    """The weight at `step`: constant, or linear between the ramp's ends and constant outside."""
    if not isinstance(value, tuple):
        return value
    first, start, last, end = value
    return start + (end - start) * min(max((step - first) / (last - first), 0.0), 1.0)


def milestone(pairs: list[tuple[int, int]], step: int) -> int:
    """The value of the last milestone reached."""
    return [value for at, value in pairs if at <= step][-1]


def draw_shading(config: ShadingConfig, losses: LossConfig, step: int, generator: torch.Generator) -> Shading:
    """The step's light; draws the same from the generator whatever comes out."""
    u, lamp = torch.rand((), generator=generator).item(), torch.randn(3, generator=generator) * config.lamp
    lit = u < config.lambertian + config.textureless and step >= config.start
    mode = "albedo" if not lit else "textureless" if u < config.textureless else "lambertian"
    orientation = bool(scheduled(losses.orientation, step))
    if not lit and not orientation:
        return Shading()
    return Shading(mode, tuple(lamp.tolist()), config.ambient, config.normal_step, orientation)


def averaged(model: Assets, average: nn.Module | None) -> Assets:
    """A copy of the assets with their averaged parameters, where there are any."""
    found = copy.deepcopy(model)
    if average is not None:
        with torch.no_grad():
            for own, mean in zip(found.parameters(), average.module.parameters(), strict=True):
                own.copy_(mean)
    return found


def check_memory(particles: int, views: int, side: int) -> None:
    """Raises InputError where a step's renders would not fit in memory, before anything is allocated."""
    needed = particles * views * side**2 * SAMPLES_A_RAY * BYTES_A_SAMPLE
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * present:
        raise InputError(
            f"particles {particles} × views {views} at resolution {side}: a step needs about {needed / 2**30:.0f} GiB, "
            f"this machine has {present / 2**30:.0f}; lower views_per_step, particles or asset.resolution"
        )
