"""Edit a video by an instruction: its frames, or patches of them, are the particles of random mini-batches."""

from dataclasses import dataclass

import torch

from csd3d import registry
from csd3d.canvas.clip import open_clip
from csd3d.editors.edit_canvas import Edit2dConfig
from csd3d.registry import register
from csd3d.schema import path_key
from csd3d.tasks.run_2d import CanvasJob, open_job


@register("task", "edit_video", title="Edit of a video")
@dataclass(kw_only=True)
class EditVideoConfig(Edit2dConfig):
    """The job of `configs/csd-edit-video.yaml`; `video`: a file or a folder of frames, "": an orbit of the world's."""

    video: str = path_key()

    def open(self, device: torch.device) -> CanvasJob:
        """Opens everything that can be wrong before any work is done: the video and the prior."""
        if self.video:
            footage = open_clip(self.video)
        else:
            footage = registry.get("demo", "orbit").thing(self.world, self.prompt)
        return open_job(self, device, footage)
