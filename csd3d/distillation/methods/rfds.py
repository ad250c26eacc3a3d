"""Rectified-flow distillation: SDS on velocities."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from csd3d.distillation.guidance import guided, guided_queries
from csd3d.distillation.method import Query, Step
from csd3d.registry import register


@register("method", "rfds", title="RFDS")
@dataclass(frozen=True)
class RFDS:
    """Rectified flow distillation sampling (Yang et al. 2024, arXiv 2406.03293): SDS for flow models, on velocities.

        Δ = v^ω(x_s; y) − (ε − z),   x_s = (1 − s) z + s ε

    In our terms x_s = z_t/(√ᾱ + σ), s = σ/(√ᾱ + σ), and v = (ε − x_s)/(1 − s) for predictions as for noise, so that
    Δ = (ε^ω − ε)/(1 − s) = (1 + σ/√ᾱ)(ε^ω(z_t; y) − ε) with no further weight: it runs on any prior. The authors draw t
    uniformly; "logit_normal" is how the models were trained. Their random factor on the loss is left out: it only
    changes the step size.

        config = DistillConfig(guidance_scale=50, schedule="logit_normal")
        G, report = distill_step(predict, RFDS(), z, number, config, alphas_cumprod, generator, prompts="a red chair")
        z = z - learning_rate * G
    """

    perp_neg: ClassVar[bool] = True
    fixed: ClassVar[dict[str, object]] = {"weight": "one"}

    def queries(self, step: Step) -> dict[str, Query]:
        return guided_queries(step)

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        return (1 + step.noise_ratio) * (guided(eps, step) - step.eps)
