"""Flow score distillation: SDS with noise that depends on the camera."""

from dataclasses import dataclass
from typing import ClassVar

from csd3d.distillation.methods.sds import SDS
from csd3d.registry import register


@register("method", "fsd", title="FSD")
@dataclass(frozen=True)
class FSD(SDS):
    """Flow score distillation (Yan et al. 2024, arXiv 2405.10988): SDS with ε a function of the camera only.

        Δ = ε^ω(z_t; y) − ε(camera),   t falling

    ε is cut from a noise map around the object, fixed for a run (`noise.world_noise`), and passed to the step as
    `camera_noise`. With falling t, every view follows one trajectory of the prior's flow.

        noise = world_noise(noise_map, azimuth_deg, elevation_deg, (16, 16))
        G, report = distill_step(
            predict, FSD(), z, number, config, alphas_cumprod, generator, prompts=texts, camera_noise=noise)
    """

    fixed: ClassVar[dict[str, object]] = {"noise": "camera", "schedule": "annealed"}
