"""Entropic score distillation: VSD that also rewards differences between views."""

from dataclasses import dataclass, replace

from torch import Tensor

from csd3d.distillation.guidance import cfg, guided
from csd3d.distillation.method import Query, Step
from csd3d.distillation.methods.vsd import VSD
from csd3d.registry import register


@register("method", "esd", title="ESD")
@dataclass(frozen=True)
class ESD(VSD):
    """Entropic score distillation (Wang et al. 2023, arXiv 2401.00909): VSD with guidance by the camera in its network.

        Δ = ε^ω(z_t; y) − [λ ε_φ(z_t; y) + (1 − λ) ε_φ(z_t; y, camera)]

    The score without a camera models all views together, so its term maximises the entropy of the views: renders move
    away from other views, which counters repeated faces (the Janus problem). λ = 0 is VSD. `guidance_scale_lora` in the
    authors' code is 1 − λ = 0.5.

        networks = ESD().open(prior)
        G, report = distill_step(predict, ESD(), z, number, config, alphas_cumprod, generator, networks, prompts=texts,
                                 pose=camera_to_world)
    """

    entropy: float = 0.5  # λ, weight of the entropy of the views; 0 is VSD

    def queries(self, step: Step) -> dict[str, Query]:
        queries = super().queries(step)
        return {**queries, "lora_any": replace(queries["lora"], pose=None, view=None)}

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        return guided(eps, step) - cfg(eps["lora"], eps["lora_any"], self.entropy)
