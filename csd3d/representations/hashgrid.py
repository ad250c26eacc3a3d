"""A reconstructed scene (field, background, occupancy) and its fit to pictures.

Symbols: rgb [R,3] in [0,1], rays_o, rays_d [R,3]; a patch is S×S neighbouring pixels of one view.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csd3d.cameras import Cameras
from csd3d.datasets import Capture
from csd3d.errors import InputError
from csd3d.fields import Background, FieldConfig, RadianceField
from csd3d.priors import perceptual_distance
from csd3d.rendering import (
    OccupancyGrid,
    RenderConfig,
    Rendered,
    ShadedField,
    Shading,
    render_image,
    render_rays,
)

ALBEDO = Shading()
OPAQUE = 0.5  # opacity from which a NeRF's depth is taken for a surface


@dataclass
class FitConfig:
    """How a scene is fitted to pictures: Adam with a cosine learning rate, L1 on random rays, features on patches."""

    steps: int = 500
    rays: int = 4096  # most random rays a step, beside those of the patches
    samples: int = 65536  # samples a step that the number of random rays is chosen for, as instant-ngp does
    learning_rate: float = 1e-2
    final_learning_rate: float = 5e-4
    warmup: int = 20  # steps
    patches: int = 0  # patches a step that the perceptual loss compares
    patch_size: int = 32  # pixels a side
    perceptual_weight: float = 0.0
    opacity_weight: float = 1e-3  # pulls half-transparent rays to empty or full, by the entropy of the opacity
    distortion_weight: float = 0.0  # draws what a ray meets together, by mip-NeRF 360's loss: haze becomes surface

    def __post_init__(self) -> None:
        for key in ("steps", "patch_size", "warmup"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a whole number of at least 1")
        if self.rays < 0 or self.patches < 0 or self.rays + self.patches == 0:
            raise ValueError(f"rays is {self.rays} and patches {self.patches}: neither may be negative, nor both 0")
        if not 0 < self.final_learning_rate <= self.learning_rate:
            raise ValueError(f"learning_rate is {self.learning_rate}: give at least final_learning_rate, above 0")


class SceneModel(nn.Module):
    """What a checkpoint holds of a scene: its radiance field, its background and its occupancy grid."""

    def __init__(
        self,
        field: FieldConfig,
        render: RenderConfig,
        aabb: Tensor,
        generator: torch.Generator,
        unbounded: bool = False,
        background: str | tuple[float, float, float] = "learned",
    ) -> None:
        super().__init__()
        self.field = RadianceField(field, aabb, unbounded, generator)
        self.background = Background(background, generator=generator)
        self.grid = OccupancyGrid(render, aabb, unbounded)
        self.render_config = render

    def render_rays(
        self,
        rays_o: Tensor,
        rays_d: Tensor,
        jitter: Tensor | None = None,
        shading: Shading = ALBEDO,
        background: Callable[[Tensor], Tensor] | None = None,
        distortion: bool = False,
    ) -> Rendered:
        """Differentiable render of rays; `jitter` [R] in [0,1) shifts their samples, None takes the middles;
        `background(directions)` stands in for the scene's own; `distortion` asks for that loss."""
        parts = (self._shaded(shading), background or self.background, self.grid)
        device = self.field.aabb.device
        rays_o, rays_d, jitter = (None if x is None else x.to(device) for x in (rays_o, rays_d, jitter))
        return render_rays(*parts, rays_o, rays_d, self.render_config, jitter=jitter, distortion=distortion)

    def _shaded(self, shading: Shading) -> RadianceField | ShadedField:
        return self.field if shading == ALBEDO else ShadedField(self.field, shading)

    def render_views(self, cameras: Cameras, indices: Tensor, shading: Shading = ALBEDO) -> Rendered:
        """Whole views without a graph: rgb [B,H,W,3], depth and opacity [B,H,W]."""
        parts = (self._shaded(shading), self.background, self.grid)
        cameras = cameras.to(self.field.aabb.device)
        views = [render_image(*parts, cameras, int(i), self.render_config) for i in indices]
        return Rendered(
            rgb=torch.stack([v.rgb for v in views]),
            depth=torch.stack([v.depth for v in views]),
            opacity=torch.stack([v.opacity for v in views]),
            samples=sum(v.samples for v in views),
        )


def surface_depth(views: Rendered) -> Tensor:
    """Depth [B,H,W] of whole views, infinite where there is no surface."""
    return torch.where(views.opacity > OPAQUE, views.depth, torch.inf)


@dataclass
class Pictures:
    """What a scene is fitted to: `images` [B,H,W,3], their cameras, usable pixels [B,H,W] or None, and which views."""

    images: Tensor
    cameras: Cameras
    masks: Tensor | None
    views: Tensor


def make_optimiser(model: SceneModel, config: FitConfig) -> torch.optim.Adam:
    """Adam as instant-ngp sets it (arXiv 2201.05989, section 4): β₂ = 0.99, ε = 1e-15."""
    return torch.optim.Adam(model.parameters(), config.learning_rate, betas=(0.9, 0.99), eps=1e-15, fused=True)


def learning_rate(config: FitConfig, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine from learning_rate to final_learning_rate."""
    warm = min(1.0, (step + 1) / config.warmup)
    low, high = config.final_learning_rate, config.learning_rate
    return warm * (low + (high - low) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1))))


def ray_count(config: FitConfig, samples_per_ray: float) -> int:
    """Random rays that make about config.samples samples, from the last step's samples a ray; at least 64."""
    wanted = config.samples / max(samples_per_ray, 1.0) - config.patches * config.patch_size**2
    return int(min(config.rays, max(wanted, 64)))


def draw_rays(pictures: Pictures, config: FitConfig, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Views [R] and pixel corners (column, row) [R,2]: the patches' first, row-major, then `count` random ones."""
    _, height, width, _ = pictures.images.shape
    size = min(config.patch_size, height, width)

    def draw(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    columns, rows = draw(width - size + 1, config.patches), draw(height - size + 1, config.patches)
    inside = torch.cartesian_prod(torch.arange(size), torch.arange(size)).flip(1)  # (column, row), row-major
    patches = (torch.stack((columns, rows), 1)[:, None] + inside).reshape(-1, 2)
    patch_views = pictures.views[draw(len(pictures.views), config.patches)].repeat_interleave(size * size)
    views = pictures.views[draw(len(pictures.views), count)]
    pixels = torch.stack((draw(width, count), draw(height, count)), 1)
    return torch.cat((patch_views, views)), torch.cat((patches, pixels))


def fit_step(
    model: SceneModel,
    optimiser: torch.optim.Adam,
    pictures: Pictures,
    config: FitConfig,
    generator: torch.Generator,
    samples_per_ray: float,
    features=None,
) -> dict[str, float]:
    """One step of Adam at the optimiser's learning rate; a step whose loss or gradient is not finite changes nothing.

    `samples_per_ray` is what the step before reported; `features` maps images [B,3,h,w] to feature maps for the
    perceptual term. Returns the losses, the PSNR of the step's rays and "skipped" (1.0 for such a step).
    """
    views, pixels = draw_rays(pictures, config, ray_count(config, samples_per_ray), generator)
    rays_o, rays_d = pictures.cameras.rays(views, pixels + 0.5)
    jitter = torch.rand(len(views), generator=generator)
    rendered = model.render_rays(rays_o, rays_d, jitter, distortion=config.distortion_weight > 0)
    target = pictures.images[views, pixels[:, 1], pixels[:, 0]]
    usable = None if pictures.masks is None else pictures.masks[views, pixels[:, 1], pixels[:, 0]]
    target = target.to(rendered.rgb.device)
    usable = None if usable is None else usable.to(target.device)
    loss, report = fit_loss(rendered, target, usable, config, features)
    optimiser.zero_grad(set_to_none=True)
    if torch.isfinite(loss):
        loss.backward()
    finite = bool(torch.isfinite(loss)) and gradients_finite(model)
    if finite:
        optimiser.step()
    return report | {"skipped": float(not finite), "samples_per_ray": rendered.samples / len(views)}


def fit_loss(
    rendered: Rendered, target: Tensor, usable: Tensor | None, config: FitConfig, features
) -> tuple[Tensor, dict[str, float]]:
    """Smooth L1 (β = 0.05) over usable rays + entropy of the opacity + distortion + perceptual distance of patches."""
    weight = torch.ones_like(target[:, 0]) if usable is None else usable.float()
    error = nn.functional.smooth_l1_loss(rendered.rgb, target, reduction="none", beta=0.05).mean(1)
    colour = (error * weight).sum() / weight.sum().clamp_min(1)
    entropy = opacity_entropy(rendered.opacity)
    loss = colour + config.opacity_weight * entropy
    mse = (((rendered.rgb.detach() - target) ** 2).mean(1) * weight).sum() / weight.sum().clamp_min(1)
    report = {"colour": colour.item(), "entropy": entropy.item(), "psnr": -10 * math.log10(mse.item() + 1e-10)}
    if rendered.distortion is not None:
        distortion = rendered.distortion.mean()
        loss = loss + config.distortion_weight * distortion
        report["distortion"] = distortion.item()
    if config.patches and config.perceptual_weight and features is not None:
        perceptual = patch_loss(rendered.rgb, target, config, features)
        loss = loss + config.perceptual_weight * perceptual
        report["perceptual"] = perceptual.item()
    return loss, report | {"loss": loss.item()}


def opacity_entropy(opacity: Tensor) -> Tensor:
    """Mean entropy, in nats, of opacities [R]: 0 where every ray is empty or full, log 2 where all are half."""
    p = opacity.clamp(1e-3, 1 - 1e-3)
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean()


def patch_loss(rgb: Tensor, target: Tensor, config: FitConfig, features) -> Tensor:
    """Perceptual distance of the step's patches, which are its first rays."""
    side = config.patch_size
    shape = (config.patches, side, side, 3)
    patches = [x[: config.patches * side * side].reshape(shape).permute(0, 3, 1, 2) for x in (rgb, target)]
    with torch.no_grad():
        wanted = features(patches[1])
    return perceptual_distance(features(patches[0]), wanted)


def gradients_finite(model: nn.Module) -> bool:
    """Whether every gradient of the model is finite."""
    norms = torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])
    return bool(torch.isfinite(torch.stack(norms)).all())


def check_patches(config: FitConfig, capture: Capture) -> None:
    """Raises InputError where the pictures are smaller than a patch."""
    _, height, width, _ = capture.images.shape
    if config.patches and config.patch_size > min(height, width):
        raise InputError(f"update.fit.patch_size: {config.patch_size} is more than the pictures' {min(height, width)}")
