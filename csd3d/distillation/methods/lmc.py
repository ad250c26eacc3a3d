"""LMC-SDS: SDS against the expected reconstruction of a picture as good as the render."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from csd3d.distillation.guidance import guided, guided_queries
from csd3d.distillation.method import FixedNetwork, Host, Network, Query, Step
from csd3d.distillation.noise import implied_noise
from csd3d.errors import InputError
from csd3d.registry import register
from csd3d.schema import path_key


@register("method", "lmc", title="LMC-SDS")
@dataclass(frozen=True)
class LMC:
    """Score distillation with learned manifold corrective (Alldieck et al. 2024, arXiv 2401.05293), in units of ε.

        Δ = ε^ω(z_t; y) − (z_t − √ᾱ_t b_ψ(z, t))/σ_t,   that is √(ᾱ_t)/σ_t (b_ψ(z, t) − ẑ_0(z_t))

    b_ψ(z, t) is the prior's expected one-step reconstruction of a picture as good as z. One-step reconstructions are
    blurred; in b_ψ − ẑ_0 the blur cancels, in SDS's z − ẑ_0 it does not. With b_ψ(z, t) = z it is SDS. The formula is
    from the abstract and secondary sources: no code is public.

        networks = LMC().open(prior)
        config = DistillConfig(guidance_scale=2)      # it is meant for low guidance
        G, report = distill_step(predict, LMC(), z, number, config, alphas_cumprod, generator, prompts="a red chair")
    """

    folder: str = path_key("csd3d/assets/lmc")  # folder of the trained network b_ψ

    perp_neg: ClassVar[bool] = True

    def open(self, prior: Host) -> dict[str, Network]:
        try:
            return {"expected": ExpectedNetwork(prior.expected(self.folder))}
        except InputError as error:
            raise InputError(f"method lmc: folder: {error}") from None

    def queries(self, step: Step) -> dict[str, Query]:
        return {**guided_queries(step), "expected": step.query(network="expected", z_t=step.z)}

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        return guided(eps, step) - implied_noise(step.z_t, eps["expected"], step.alpha_bar)


class ExpectedNetwork(FixedNetwork):
    """b_ψ(z, t) as a network; its queries have the clean z as z_t."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def answer(self, query: Query) -> Tensor:
        return self.model(query.z_t, query.t)
