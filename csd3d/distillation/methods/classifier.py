"""Classifier score distillation: only the guidance term of SDS."""

from dataclasses import dataclass

from torch import Tensor

from csd3d.distillation.method import Query, Step
from csd3d.registry import register


@register("method", "classifier", title="Classifier score distillation")
@dataclass(frozen=True)
class Classifier:
    """Classifier score distillation (Yu et al. 2023, arXiv 2310.19415): only the guidance term of SDS.

        Δ = ω (ε(y) − ε(∅)),   minus σ_t times ω ∇_{z_t} log p(y | z_t)

    In csd3d, CSD means collaborative score distillation. With `null_prompt` set it is the paper's form with a negative
    prompt, without their schedule of its weight.

        config = DistillConfig(guidance_scale=40)
        G, report = distill_step(predict, Classifier(), z, number, config, alphas_cumprod, generator, prompts="a chair")
        z = z - learning_rate * G
    """

    def queries(self, step: Step) -> dict[str, Query]:
        return {"null": step.query(step.null_prompt), "text": step.query()}

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        return step.guidance_scale * (eps["text"] - eps["null"])
