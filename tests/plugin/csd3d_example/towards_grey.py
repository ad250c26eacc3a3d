"""A method of score distillation."""

from dataclasses import dataclass

from torch import Tensor

from csd3d.distillation.guidance import guided, guided_queries
from csd3d.distillation.method import Query, Step
from csd3d.registry import register


@register("method", "towards_grey", title="SDS, towards grey")
@dataclass(frozen=True)
class TowardsGrey:
    """SDS (arXiv 2209.14988) that is also drawn to latents of 0, which is about what autoencoders have for grey.

        Δ = ε^ω(z_t; y) − ε + λ z

    With λ = 0 it is SDS.

        method: {type: towards_grey, pull: 0.1}
    """

    pull: float = 0.5  # λ, how strongly

    def __post_init__(self) -> None:
        if not self.pull >= 0:
            raise ValueError(f"pull is {self.pull}: give a number of at least 0")

    def queries(self, step: Step) -> dict[str, Query]:
        return guided_queries(step)

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        return guided(eps, step) - step.eps + self.pull * step.z
