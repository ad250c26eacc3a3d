"""Noise-free score distillation: SDS without subtracting noise."""

from dataclasses import dataclass

from torch import Tensor

from csd3d.distillation.method import Query, Step
from csd3d.registry import register


@register("method", "nfsd", title="NFSD")
@dataclass(frozen=True)
class NFSD:
    """Noise-free score distillation (Katzir et al. 2023, arXiv 2310.17590), Eq. 9.

        Δ = δ_D + ω (ε(y) − ε(∅)),   δ_D = ε(∅) − ε(negative);   δ_D = ε(∅) where t < 0.2 T

    δ_D leads back to the domain of pictures. For small t there is little noise in ε(∅), which then serves as δ_D. With
    an empty negative prompt δ_D is 0 above 0.2 T, which is the method "classifier".

        config = DistillConfig(guidance_scale=7.5)    # the paper's nominal scale
        G, report = distill_step(predict, NFSD(), z, number, config, alphas_cumprod, generator, prompts="a red chair")
        z = z - learning_rate * G
    """

    negative_prompt: str = (  # description of bad pictures, by default the paper's
        "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy"
    )

    def queries(self, step: Step) -> dict[str, Query]:
        queries = {"null": step.query(step.null_prompt), "text": step.query()}
        if step.t >= 0.2 * len(step.alphas_cumprod):
            queries["negative"] = step.query(self.negative_prompt)
        return queries

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        domain = eps["null"] - eps["negative"] if "negative" in eps else eps["null"]
        return domain + step.guidance_scale * (eps["text"] - eps["null"])
