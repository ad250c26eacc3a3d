"""Score distillation on tensors alone: directions, how particles share them, noise, schedules, the CSD-Edit loop."""

from csd3d.distillation.correspondence import Correspondence, flow_correspondence, window_correspondence
from csd3d.distillation.ddim import ddim_edit
from csd3d.distillation.directions import csd_edit, sds
from csd3d.distillation.distill import DistillConfig, distill_step, feature_gradient
from csd3d.distillation.edit import CollaborativeEditConfig, collaborative_edit
from csd3d.distillation.guidance import cfg, ip2p_guidance
from csd3d.distillation.kernel import SVGDConfig
from csd3d.distillation.svgd import svgd_combine, svgd_diagnostics

__all__ = [
    "CollaborativeEditConfig",
    "Correspondence",
    "DistillConfig",
    "SVGDConfig",
    "cfg",
    "collaborative_edit",
    "csd_edit",
    "ddim_edit",
    "distill_step",
    "feature_gradient",
    "flow_correspondence",
    "ip2p_guidance",
    "sds",
    "svgd_combine",
    "svgd_diagnostics",
    "window_correspondence",
]
