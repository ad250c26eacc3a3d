"""DreamCatalyst: PDS with weights and falling noise levels that follow a diffusion sampler's."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from csd3d.distillation.guidance import guided, guided_queries
from csd3d.distillation.method import Query, Step
from csd3d.registry import register


@register("method", "dreamcatalyst", title="DreamCatalyst")
@dataclass(frozen=True)
class DreamCatalyst:
    """DreamCatalyst (Kim et al. 2024, arXiv 2407.11394), the weights as in the authors' code for nerfstudio.

        Δ = χ e^τ (z − z̃) + (δ + γ τ^{1/e}) (ε^ω(z_t; y_target) − ε^ω(z̃_t; y_source)),   τ = t/T falls from .9 to .2

    It is PDS with other weights: its pull to the source is strong at high noise and weak at low noise, PDS's the other
    way round, because a sampler changes most at high noise. The authors' prior is InstructPix2Pix, its source without
    an instruction, as `guided_queries` asks an editing model. We leave out their change of the UNet (FreeU). Their code
    for threestudio has δ 0.05 and γ 0.2, and predicts the source's ε at the noised target.

        config = DistillConfig(steps=3000, t_max=0.9, t_min=0.2)
        about = {"prompts": "a tiger", "source": z_source, "source_prompts": "a cat"}
        G, report = distill_step(predict, DreamCatalyst(), z, number, config, alphas_cumprod, generator, **about)
    """

    chi: float = 0.075  # χ, strength of the pull to the source
    delta: float = 0.2  # δ, weight of the edit at every noise level
    gamma: float = 0.8  # γ, weight of the edit that grows with the noise level

    needs: ClassVar[tuple[str, ...]] = ("source",)
    fixed: ClassVar[dict[str, object]] = {"weight": "one", "schedule": "annealed"}

    def __post_init__(self) -> None:
        for key in ("chi", "delta", "gamma"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} is {getattr(self, key)}: give a number of at least 0")

    def queries(self, step: Step) -> dict[str, Query]:
        return guided_queries(step) | guided_queries(step, "source")

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        pull, push = self.weights(step.fraction)
        return pull * (step.z - step.source) + push * (guided(eps, step) - guided(eps, step, "source"))

    def weights(self, fraction: float) -> tuple[float, float]:
        """(χ e^τ, δ + γ τ^{1/e}) at τ = `fraction`."""
        return self.chi * math.exp(fraction), self.delta + self.gamma * fraction ** (1 / math.e)
