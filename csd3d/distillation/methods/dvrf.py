"""Delta velocity rectified flow: editing by the difference of two velocities."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from csd3d.distillation.guidance import guided, guided_queries
from csd3d.distillation.method import Query, Step
from csd3d.registry import register


@register("method", "dvrf", title="DVRF")
@dataclass(frozen=True)
class DVRF:
    """Delta velocity rectified flow (Beaudouin et al. 2025, arXiv 2509.05342), Eqs. 6 and 8.

        x_s = (1 − s) z + s ε + η s (z − z̃),   x̃_s = (1 − s) z̃ + s ε
        Δ = v^ω(x_s; y_target) − v^ω̃(x̃_s; y_source) + (1 − η)(z − z̃)

    v = (ε − x_s)/(1 − s) also holds for predictions, so Δ = (1 + σ/√ᾱ)(ε^ω − ε^ω̃ − η (z − z̃)) with ε^ω predicted at
    z_t + η σ_t (z − z̃), and the method works with any prior. η changes linearly from `eta_start` to `eta`. η = 0 is DDS
    in velocity form; a constant η = 1, with falling s and steps of Δs, is FlowEdit (arXiv 2412.08629). The authors use
    schedule "annealed" and, on Stable Diffusion 3, ω 16.5 and ω̃ 6.

        config = DistillConfig(steps=50, guidance_scale=16.5, schedule="annealed", t_max=1.0, t_min=0.0)
        about = {"prompts": "a tiger", "source": z_source, "source_prompts": "a cat"}
        G, report = distill_step(predict, DVRF(), z, number, config, alphas_cumprod, generator, **about)
    """

    eta: float = 1.0  # η at the last step
    eta_start: float = 0.0  # η at the first step; 1 is FlowEdit
    source_scale: float | None = None  # ω̃, guidance scale of the source; null: that of the target

    needs: ClassVar[tuple[str, ...]] = ("source",)
    fixed: ClassVar[dict[str, object]] = {"weight": "one"}

    def shift(self, step: Step) -> Tensor:
        """η (z − z̃)."""
        return (self.eta_start + (self.eta - self.eta_start) * step.progress) * (step.z - step.source)

    def queries(self, step: Step) -> dict[str, Query]:
        shifted = step.z_t + (1 - step.alpha_bar) ** 0.5 * self.shift(step)
        return {
            **guided_queries(step, z_t=shifted),
            **guided_queries(step, "source", scale=self.source_scale),
        }

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        change = guided(eps, step) - guided(eps, step, "source", self.source_scale)
        return (1 + step.noise_ratio) * (change - self.shift(step))
