"""Interval score matching: the difference of two predictions along one deterministic trajectory."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from csd3d.distillation.ddim import ddim_step
from csd3d.distillation.guidance import guided, guided_queries
from csd3d.distillation.method import Predict, Query, Step
from csd3d.distillation.noise import add_noise, draw_noise, implied_noise
from csd3d.registry import register


@register("method", "ism", title="ISM (LucidDreamer)")
@dataclass(frozen=True)
class ISM:
    """Interval score matching (LucidDreamer, arXiv 2311.11284), Eq. 16.

        Δ = ε^ω(x_t; y) − ε(x_s; ∅),   s = t − δ,   x_s and x_t from z by DDIM inversion under ∅

    SDS compares the prediction with fresh random noise, which blurs; here both terms lie on one trajectory. As in the
    authors' code, the inversion starts at the least noise of the schedule in steps of `stride`, and its last step, from
    x_s to x_t, uses the subtracted ε(x_s; ∅). The authors weigh by σ_t/√ᾱ_t (weight x0) and begin with a wider t and δ
    (warm-up), which we omit.

        config = DistillConfig(guidance_scale=7.5, t_min=0.02, t_max=0.5, weight="x0")
        G, report = distill_step(predict, ISM(), z, number, config, alphas_cumprod, generator, prompts="a red chair")
        z = z - 0.1 * G
    """

    interval: float = 0.08  # δ = t − s, a fraction of the schedule
    stride: float = 0.2  # step of the inversion to x_s, a fraction of the schedule

    perp_neg: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("interval", "stride"):
            if not 0 < getattr(self, key) <= 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a share of the schedule in (0, 1]")

    def noise(self, step: Step, predict: Predict) -> Step:
        total, alphas = len(step.alphas_cumprod), step.alphas_cumprod
        s = max(step.t - max(round(self.interval * total), 1), 0)
        levels = [*range(0, s, max(round(self.stride * total), 1)), s, step.t]
        x = add_noise(step.z, draw_noise(step.z, "independent", step.generator), alphas[0].item())
        for at, then in pairwise(levels):
            eps = predict({"null": step.query(step.null_prompt, z_t=x, t=at)})["null"]
            x = ddim_step(x, eps, alphas[at].item(), alphas[then].item())
        return replace(step, eps=implied_noise(x, step.z, step.alpha_bar), kept={"eps_s": eps})

    def queries(self, step: Step) -> dict[str, Query]:
        return guided_queries(step)

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        return guided(eps, step) - step.kept["eps_s"]
