"""Posterior distillation sampling: DDS plus a term that keeps the source's identity."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from csd3d.distillation.guidance import guided, guided_queries
from csd3d.distillation.method import Query, Step
from csd3d.registry import register


@register("method", "pds", title="PDS")
@dataclass(frozen=True)
class PDS:
    """Posterior distillation sampling (Koo et al. 2023, arXiv 2311.13831), Eq. 12, with the authors' w = 1.

        Δ = ψ (z − z̃) + χ (ε^ω(z_t; y_target) − ε^ω(z̃_t; y_source))

    It is the difference of the stochastic latents s = (x_t' − μ(x_t, x̂_0))/σ of target and source with the same noise.
    With a consistent posterior ψ is 0 and PDS is χ times DDS. The authors' code has ψ > 0 because it combines
    t' = t − 2 with β and α of a single step; we do the same by default. For t < 2 we use the coefficients of t = 2.

        about = {"prompts": "a tiger", "source": z_source, "source_prompts": "a cat"}
        G, report = distill_step(predict, PDS(), z, number, config, alphas_cumprod, generator, **about)
        z = z - learning_rate * G
    """

    psi: float | None = None  # ψ, strength of the pull to the source; null: the authors', which grows as t falls

    needs: ClassVar[tuple[str, ...]] = ("source",)
    fixed: ClassVar[dict[str, object]] = {"weight": "one"}

    def __post_init__(self) -> None:
        if self.psi is not None and not 0 <= self.psi < math.inf:
            raise ValueError(f"psi is {self.psi}: give a number of at least 0, or null for the authors'")

    def queries(self, step: Step) -> dict[str, Query]:
        return guided_queries(step) | guided_queries(step, "source")

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        t = max(step.t, 2)
        before, previous, now = step.alphas_cumprod[t - 2 : t + 1].tolist()
        psi, chi = posterior_coefficients(now, before, now / previous)
        psi = psi if self.psi is None else self.psi
        return psi * (step.z - step.source) + chi * (guided(eps, step) - guided(eps, step, "source"))


def posterior_coefficients(
    alpha_bar: float, alpha_bar_previous: float, alpha_step: float | None = None
) -> tuple[float, float]:
    """(ψ, χ) for a level t and the cleaner level t'.

        μ = A x̂_0 + B x_t,  A = √ᾱ' β/(1−ᾱ),  B = √α (1−ᾱ')/(1−ᾱ),  σ² = (1−ᾱ')/(1−ᾱ) β,  β = 1 − α
        ψ = (√ᾱ' − A − B √ᾱ)/σ,  χ = A √((1−ᾱ)/ᾱ)/σ

    With α = ᾱ/ᾱ' (`alpha_step` None), the true DDPM posterior of t and t', ψ is 0 up to rounding.
    """
    alpha = alpha_bar / alpha_bar_previous if alpha_step is None else alpha_step
    beta = 1 - alpha
    a = math.sqrt(alpha_bar_previous) * beta / (1 - alpha_bar)
    b = math.sqrt(alpha) * (1 - alpha_bar_previous) / (1 - alpha_bar)
    sigma = math.sqrt((1 - alpha_bar_previous) / (1 - alpha_bar) * beta)
    psi = (math.sqrt(alpha_bar_previous) - a - b * math.sqrt(alpha_bar)) / sigma
    return psi, a * math.sqrt((1 - alpha_bar) / alpha_bar) / sigma
