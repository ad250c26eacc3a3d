"""Delta denoising score: the difference of the predictions for two prompts."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from csd3d.distillation.guidance import guided, guided_queries
from csd3d.distillation.method import Query, Step
from csd3d.registry import register


@register("method", "dds", title="DDS")
@dataclass(frozen=True)
class DDS:
    """Delta denoising score (Hertz et al. 2023, arXiv 2304.07090), Eq. 3, with the authors' w = 1.

        Δ = ε^ω(z_t; y_target) − ε^ω(z̃_t; y_source),   the same ε and t for both

    Exactly 0 at z = z̃ with equal prompts: the prior's bias, which blurs in SDS, is the same in both terms and cancels.

        config = DistillConfig(steps=200, t_min=0.05, t_max=0.95)      # the authors' t and ω = 7.5
        about = {"prompts": "a tiger", "source": z_source, "source_prompts": "a cat"}
        G, report = distill_step(predict, DDS(), z, number, config, alphas_cumprod, generator, **about)
    """

    needs: ClassVar[tuple[str, ...]] = ("source",)
    fixed: ClassVar[dict[str, object]] = {"weight": "one"}

    def queries(self, step: Step) -> dict[str, Query]:
        return guided_queries(step) | guided_queries(step, "source")

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        return guided(eps, step) - guided(eps, step, "source")
