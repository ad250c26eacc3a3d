"""Particle guidance: score distillation whose particles are pushed apart by a joint potential of the noisy latents."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from csd3d.distillation.kernel import as_rows
from csd3d.distillation.method import Step
from csd3d.distillation.methods.sds import SDS
from csd3d.registry import register
from csd3d.schema import Within


@register("method", "particle_guidance", title="Particle guidance")
@dataclass(frozen=True)
class ParticleGuidance(SDS):
    """Particle guidance (Corso et al. 2024, arXiv 2310.13102), for diverse results, in place of sampling: in SDS.

        Δ_i = ε^ω(z_{t,i}; y) − ε_i − σ_t ∇_{z_{t,i}} log Φ(z_t),   log Φ = −α/2 Σ_{j≠k} exp(−‖z_{t,j} − z_{t,k}‖²/h)

    h = m²/ln N with m the lower median distance of two particles, which counts as a constant (the authors' code has a
    median for each particle, and ln(N − 1), which is 0 for two). As in that code the potential is that of the noisy
    latents, and acts while there is more noise than picture, σ_t² > ᾱ_t. Particles are those of one group, such as the
    assets at one camera.

        config = DistillConfig(guidance_scale=7.5, noise="shared")
        G, report = distill_step(predict, ParticleGuidance(), z, number, config, alphas, generator, prompts=texts)
    """

    together: ClassVar[bool] = True

    strength: Annotated[float, Within(0, 1e6)] = 8.0  # α, strength of the potential

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        delta = super().direction(eps, step)
        if step.noise_ratio <= 1:
            return delta
        groups = torch.zeros(len(step.z)) if step.groups is None else step.groups
        for group in groups.unique():
            rows = (groups == group).nonzero()[:, 0].to(step.z.device)
            push = potential_gradient(as_rows(step.z_t[rows]), self.strength)
            delta[rows] -= math.sqrt(1 - step.alpha_bar) * push.view_as(delta[rows]).to(delta)
        return delta


def potential_gradient(x: Tensor, strength: float) -> Tensor:
    """∇_{x_i} log Φ of particles x [N, D]: α Σ_j (2/h)(x_i − x_j) exp(−‖x_i − x_j‖²/h); 0 for one particle."""
    if len(x) == 1:
        return torch.zeros_like(x)
    squared = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    i, j = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    h = squared[i, j].median().clamp_min(1e-6 * x.shape[1]) / math.log(len(x))  # equal particles: no division by 0
    weights = 2 * strength / h * torch.exp(-squared / h)
    return weights.sum(1, keepdim=True) * x - weights @ x
