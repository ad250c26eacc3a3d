"""Score distillation sampling, the baseline."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from csd3d.distillation.guidance import guided, guided_queries
from csd3d.distillation.method import Query, Step
from csd3d.registry import register


@register("method", "sds", title="SDS (DreamFusion)")
@dataclass(frozen=True)
class SDS:
    """Score distillation sampling (DreamFusion, arXiv 2209.14988), Eq. 3 without w(t), which is σ_t² by default.

        Δ = ε^ω(z_t; y) − ε

    With `svgd` it is CSD (arXiv 2307.04787), called "csd" in configs.

        config = DistillConfig(guidance_scale=100)    # the paper's scale in latent space
        G, report = distill_step(predict, SDS(), z, number, config, alphas_cumprod, generator, prompts="a red chair")
        z = z - learning_rate * G
    """

    perp_neg: ClassVar[bool] = True

    def queries(self, step: Step) -> dict[str, Query]:
        return guided_queries(step)

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        return guided(eps, step) - step.eps
