"""Edit a panorama by an instruction: the picture of `edit_image`, whose left border may continue at its right."""

from dataclasses import dataclass

import torch

from csd3d.registry import register
from csd3d.tasks.edit_image import EditImageConfig, open_picture_job
from csd3d.tasks.run_2d import CanvasJob


@register("task", "edit_panorama", title="Edit of a panorama")
@dataclass(kw_only=True)
class EditPanoramaConfig(EditImageConfig):
    """The job of `configs/csd-edit-panorama.yaml`; `wrap`: it is a 360° panorama."""

    wrap: bool = False

    def open(self, device: torch.device) -> CanvasJob:
        """Opens everything that can be wrong before any work is done."""
        return open_picture_job(self, device, self.wrap)
