"""Edit a panorama by an instruction: the picture of `edit_image`, whose left border may continue at its right."""

from dataclasses import dataclass
from pathlib import Path

import torch

from csd3d.interrupt import StopRequest
from csd3d.tasks import edit_image
from csd3d.tasks.edit_image import EditImageConfig
from csd3d.tasks.run_2d import CanvasJob, run_job


@dataclass(kw_only=True)
class EditPanoramaConfig(EditImageConfig):
    """The job of `configs/csd-edit-panorama.yaml`; `wrap`: it is a 360° panorama."""

    wrap: bool = False


def run(config: EditPanoramaConfig, folder: Path, device: torch.device, stop: StopRequest) -> None:
    """Does the whole job in `folder`."""
    run_job(prepare(config, folder, device, stop))


def prepare(config: EditPanoramaConfig, folder: Path, device: torch.device, stop: StopRequest) -> CanvasJob:
    """Opens everything that can be wrong before any work is done."""
    return edit_image.prepare(config, folder, device, stop, config.wrap)
