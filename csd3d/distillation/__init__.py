"""Score distillation on tensors alone: one step for every method, how particles share, noise, schedules.

G, report = distill_step(predict, method, z, number, config, alphas_cumprod, generator, prompts="a red chair")
G = svgd_combine(directions, particles, sigma=sigma)     # the combiner alone, for directions of your own
"""

from csd3d.distillation.ddim import ddim_edit
from csd3d.distillation.edit_loop import CollaborativeEditConfig, collaborative_edit
from csd3d.distillation.guidance import cfg, ip2p_guidance
from csd3d.distillation.kernel import SVGDConfig
from csd3d.distillation.method import Method, Query, Step
from csd3d.distillation.step import DistillConfig, distill_step, feature_gradient
from csd3d.distillation.svgd import svgd_combine, svgd_diagnostics

__all__ = [
    "CollaborativeEditConfig",
    "DistillConfig",
    "Method",
    "Query",
    "SVGDConfig",
    "Step",
    "cfg",
    "collaborative_edit",
    "ddim_edit",
    "distill_step",
    "feature_gradient",
    "ip2p_guidance",
    "svgd_combine",
    "svgd_diagnostics",
]
