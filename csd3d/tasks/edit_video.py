"""Edit a video by an instruction: its frames, or patches of them, are the particles of random mini-batches."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from csd3d.canvas.clip import open_clip, world_orbit
from csd3d.editors.edit_canvas import Edit2dConfig
from csd3d.interrupt import StopRequest
from csd3d.tasks.run_2d import CanvasJob, open_job, run_job

logger = logging.getLogger("csd3d")


@dataclass(kw_only=True)
class EditVideoConfig(Edit2dConfig):
    """The job of `configs/csd-edit-video.yaml`; `video`: a file or a folder of frames, "": an orbit of the world's."""

    video: str = ""


def run(config: EditVideoConfig, folder: Path, device: torch.device, stop: StopRequest) -> None:
    """Does the whole job in `folder`."""
    job = prepare(config, folder, device, stop)
    for warning in job.footage.warnings:
        logger.warning("%s", warning)
    run_job(job)


def prepare(config: EditVideoConfig, folder: Path, device: torch.device, stop: StopRequest) -> CanvasJob:
    """Opens everything that can be wrong before any work is done: the video and the prior."""
    footage = open_clip(config.video) if config.video else world_orbit(config.world, config.prompt)
    return open_job(config, folder, device, stop, footage)
