"""The fit of a scene to pictures: settings, losses and optimiser steps, shared by all representations.

Symbols: R rays or pixels, rgb and target [R, 3] in [0, 1]; a patch is S × S neighbouring pixels of one view.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from csd3d.cameras import Cameras
from csd3d.errors import InputError
from csd3d.memory import check_fits
from csd3d.priors import perceptual_distance
from csd3d.rendering import Rendered
from csd3d.schema import Amount, Steps, Within
from csd3d.waits import to_host

SAMPLES_PER_RAY = 40  # of a scene that has taken shape; at the start there are more
Features = Callable[[Tensor], list[Tensor]]  # images [B, 3, h, w] in [0, 1] -> feature maps


@dataclass
class FitConfig:
    """How a scene is fitted to pictures: Adam with a cosine learning rate, L1 on random rays, features on patches.

    A representation that renders whole views uses a view instead of `rays` and ignores `samples`.
    """

    steps: Steps = 500  # steps of the fit
    rays: Annotated[int, Within(0, 2**22)] = 4096  # most random rays a step, besides those of the patches
    # samples a step; the number of random rays is adapted to reach it, as in instant-ngp
    samples: Annotated[int, Within(1, 2**26)] = 65536
    learning_rate: float = 1e-2  # highest learning rate, after the warm-up
    final_learning_rate: float = 5e-4  # learning rate at the last step
    warmup: Steps = 20  # steps in which the learning rate rises from 0
    patches: Annotated[int, Within(0, 4096)] = 0  # patches a step, for the perceptual loss
    patch_size: Annotated[int, Within(1, 1024)] = 32  # side of a patch, pixels
    perceptual_weight: Amount = 0.0  # weight of the perceptual distance between patches
    opacity_weight: Amount = 1e-3  # weight of the opacity's entropy: half-transparent rays become empty or full
    distortion_weight: Amount = 0.0  # weight of mip-NeRF 360's distortion loss: haze becomes a surface

    def __post_init__(self) -> None:
        for key in ("steps", "patch_size", "warmup"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a whole number of at least 1")
        if self.rays < 0 or self.patches < 0 or self.rays + self.patches == 0:
            raise ValueError(f"rays is {self.rays} and patches {self.patches}: neither may be negative, nor both 0")
        if not 0 < self.final_learning_rate <= self.learning_rate:
            raise ValueError(f"learning_rate is {self.learning_rate}: give at least final_learning_rate, above 0")


@dataclass
class Pictures:
    """The pictures that a scene is fitted to."""

    images: Tensor  # [B, H, W, 3]
    cameras: Cameras  # B cameras
    masks: Tensor | None  # usable pixels [B, H, W]; None: all are
    views: Tensor  # [V] long: indices of the pictures to fit to


def check_patches(config: FitConfig, size: tuple[int, int], key: str) -> None:
    """Raise InputError if pictures of `size` = (H, W) are smaller than a patch; `key` is the config's place."""
    if config.patches and config.patch_size > min(size):
        raise InputError(f"{key}.patch_size: {config.patch_size} is more than the pictures' {min(size)}")


def check_rays(config: FitConfig, representation: Any, key: str, device: torch.device | None = None) -> None:
    """Raise InputError if a step's renders do not fit in the device's memory; `key` is the config's place."""
    per_ray = getattr(representation, "bytes_per_ray", 0)
    random = min(config.rays, max(config.samples / SAMPLES_PER_RAY, 64))
    given = f"samples {config.samples}, rays {config.rays}, patches {config.patches} of {config.patch_size}²"
    check_fits(per_ray * (random + config.patches * config.patch_size**2), f"{key}: {given}: a step", device=device)


def make_optimiser(parameters: Iterable[nn.Parameter], config: FitConfig) -> torch.optim.Adam:
    """Adam as instant-ngp sets it (arXiv 2201.05989, section 4): β₂ = 0.99, ε = 1e-15."""
    return torch.optim.Adam(parameters, config.learning_rate, betas=(0.9, 0.99), eps=1e-15, fused=True)


def learning_rate(config: FitConfig, step: int) -> float:
    """Linear warm-up times half a cosine from learning_rate to final_learning_rate."""
    warm = min(1.0, (step + 1) / config.warmup)
    low, high = config.final_learning_rate, config.learning_rate
    return warm * (low + (high - low) * 0.5 * (1 + math.cos(math.pi * step / config.steps)))


def descend(
    model: nn.Module, optimiser: torch.optim.Optimizer, loss: Tensor, rate: float, max_norm: float = 0.0
) -> bool:
    """Do one step of Adam; if loss or gradients are not finite, change nothing and return False.

    The learning rate is `rate`, times the "rate" of a parameter group that has one. Gradients are clipped to the norm
    `max_norm` if that is not 0. Adam's moments of a parameter whose shape has changed start anew,
    even then, as a checkpoint whose moments do not fit is refused.
    """
    for group in optimiser.param_groups:
        group["lr"] = group.get("rate", 1.0) * rate
    for parameter, state in optimiser.state.items():
        if "exp_avg" in state and state["exp_avg"].shape != parameter.shape:
            state.clear()
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if not gradients_finite(model, loss):
        return False
    if max_norm:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimiser.step()
    return True


def gradients_finite(model: nn.Module, loss: Tensor) -> bool:
    """Whether the loss and every gradient of the model are finite: read together, because the host waits for it."""
    norms = torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])
    return bool(torch.isfinite(torch.stack([loss.detach().to(norms[0]), *norms])).all())


# -------------------------------------------------------------------------------------------------------------- losses


def fit_loss(
    rendered: Rendered, target: Tensor, usable: Tensor | None, config: FitConfig, features: Features | None
) -> tuple[Tensor, dict[str, float]]:
    """Smooth L1 (β = 0.05) over usable rays + entropy of the opacity + distortion + perceptual distance of patches.

    The patches' rays come first, row by row. Returns the loss, and its parts unweighted with "psnr".
    """
    weight = torch.ones_like(target[:, 0]) if usable is None else usable.float()
    error = nn.functional.smooth_l1_loss(rendered.rgb, target, reduction="none", beta=0.05).mean(1)
    colour = (error * weight).sum() / weight.sum().clamp_min(1)
    entropy = opacity_entropy(rendered.opacity)
    loss = colour + config.opacity_weight * entropy
    mse = (((rendered.rgb.detach() - target) ** 2).mean(1) * weight).sum() / weight.sum().clamp_min(1)
    report = {"colour": colour, "entropy": entropy, "psnr": mse}
    if rendered.distortion is not None:
        distortion = rendered.distortion.mean()
        loss = loss + config.distortion_weight * distortion
        report["distortion"] = distortion
    if config.patches and config.perceptual_weight and features is not None:
        perceptual = patch_loss(rendered.rgb, target, config, features)
        loss = loss + config.perceptual_weight * perceptual
        report["perceptual"] = perceptual
    report = to_host(report | {"loss": loss})
    return loss, report | {"psnr": -10 * math.log10(report["psnr"] + 1e-10)}


def opacity_entropy(opacity: Tensor) -> Tensor:
    """Mean entropy of opacities [R] in nats: 0 if every ray is empty or full, log 2 if all are half-transparent."""
    p = opacity.clamp(1e-3, 1 - 1e-3)
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean()


def patch_loss(rgb: Tensor, target: Tensor, config: FitConfig, features: Features) -> Tensor:
    """Perceptual distance of the step's patches, which are the first rays."""
    side = config.patch_size
    shape = (config.patches, side, side, 3)
    patches = [x[: config.patches * side * side].reshape(shape).permute(0, 3, 1, 2) for x in (rgb, target)]
    with torch.no_grad():
        wanted = features(patches[1])
    return perceptual_distance(features(patches[0]), wanted)
