"""Repulsive score distillation: particles repel one another and share no scores."""

from dataclasses import dataclass
from typing import Literal

from csd3d.distillation.methods.sds import SDS
from csd3d.registry import register


@register("method", "rsd", title="RSD")
@dataclass(frozen=True)
class RSD(SDS):
    """Repulsive score distillation (Zilberstein et al. 2024, arXiv 2406.16683), for diverse results.

        G_i = w(t) [ε^ω(z_{t,i}; y) − ε_i − λ σ_t/N Σ_j ∇ k(φ_j, φ_i)],   k = exp(−γ ‖φ_j − φ_i‖²), γ by the median

    It is SVGD's repulsion without sharing of scores. φ are features of the pictures: DINO's in the paper, those of the
    prior's encoder here (`svgd.space` "features"). The authors sum over j where we take the mean, and use
    γ = ln(N−1)/median, and λ = 1000 in 3D.

        config = DistillConfig(guidance_scale=7.5)
        G, report = distill_step(predict, RSD(), z, number, config, alphas, generator, prompts=texts, features=phi)
        force = feature_gradient(phi, int(report["t"]), configured(RSD(), config), alphas)    # descended by phi
    """

    repulsion: float = 100.0  # λ, strength of the repulsion
    # what distances compare: features, or coarse, clean, scaled or noisy latents
    space: Literal["features", "coarse", "clean", "scaled", "noisy"] = "features"

    @property
    def fixed(self) -> dict[str, object]:
        return {"svgd": {"share": False, "repulsion": self.repulsion, "space": self.space}}
