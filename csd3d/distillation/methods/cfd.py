"""Consistent flow distillation: SDS with noise that lies on the surface of the asset."""

from dataclasses import dataclass
from typing import ClassVar

from csd3d.distillation.methods.sds import SDS
from csd3d.registry import register
from csd3d.schema import Share


@register("method", "cfd", title="CFD")
@dataclass(frozen=True)
class CFD(SDS):
    """Consistent flow distillation (Yan et al. 2025, arXiv 2501.05445): SDS whose ε is seen alike from all sides.

        Δ = ε^ω(z_t; y) − ε̃(θ, camera),   t falling

    ε̃ is cut from a noise map on the surface of the asset (`surface_noise`), and passed to the step as `camera_noise`.
    With falling t, the clean picture of every view follows the prior's flow, and the flows of all views agree. The
    authors divide by the mean of |z − ẑ_0| and take γ from .01 down to .0001 of 25 000 steps.

        noise = surface_noise(noise_map, behind, points, seen)
        G, report = distill_step(
            predict, CFD(), z, number, config, alphas_cumprod, generator, prompts=texts, camera_noise=noise)
    """

    fixed: ClassVar[dict[str, object]] = {"noise": "surface", "schedule": "annealed"}

    # γ: share of the noise's variance that is drawn anew each step; 0: the flow's ODE, above: its SDE
    fresh: Share = 0.0
