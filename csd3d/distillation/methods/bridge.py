"""SDS-Bridge: from a description of the picture's flaws to one of the picture it should be."""

from dataclasses import dataclass

from torch import Tensor

from csd3d.distillation.guidance import guided, guided_queries
from csd3d.distillation.method import Query, Step
from csd3d.registry import register


@register("method", "bridge", title="SDS-Bridge")
@dataclass(frozen=True)
class Bridge:
    """SDS-Bridge (McAllister et al. 2024, arXiv 2406.09417), Eq. 10 with the factor ω that the authors' code has.

        stage 1   Δ = ε^ω(z_t; y) − ε
        stage 2   Δ = ω (ε(z_t; y + good) − ε(z_t; y + bad)),   both at the same z_t

    `bad` describes the pictures that SDS makes, `good` what they should be. Stage 2 begins after the share `switch` of
    the steps.

        config = DistillConfig(guidance_scale=40)     # the authors' in 2D; 100 and switch 0.8 in 3D
        G, report = distill_step(predict, Bridge(), z, number, config, alphas_cumprod, generator, prompts="a red chair")
        z = z - learning_rate * G
    """

    switch: float = 0.5  # fraction of the steps after which stage 2 begins
    good: str = ", detailed high resolution, high quality, sharp"  # appended to the prompt: the wanted qualities
    bad: str = (  # appended to the prompt: the flaws of SDS's pictures
        ", oversaturated, smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, noisy, malformed"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.switch <= 1:
            raise ValueError(f"switch is {self.switch}: give a share of the steps in [0, 1]")

    def queries(self, step: Step) -> dict[str, Query]:
        if step.number < self.switch * step.steps:
            return guided_queries(step)
        suffixes = {"good": self.good, "bad": self.bad}
        return {name: step.query(tuple(text + suffix for text in step.prompts)) for name, suffix in suffixes.items()}

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        if "good" in eps:
            return step.guidance_scale * (eps["good"] - eps["bad"])
        return guided(eps, step) - step.eps
