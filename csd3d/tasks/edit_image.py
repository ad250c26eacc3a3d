"""Edit a picture of any size by an instruction, or each of its regions by one of its own."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from csd3d.canvas.clip import open_picture, world_strip
from csd3d.canvas.regions import Region, check_regions, region_masks
from csd3d.editors.edit_canvas import Edit2dConfig
from csd3d.interrupt import StopRequest
from csd3d.tasks.run_2d import CanvasJob, open_job, run_job


@dataclass(kw_only=True)
class EditImageConfig(Edit2dConfig):
    """The job of `configs/csd-edit-image.yaml` and `configs/csd-edit-regions.yaml`; `image` "": one of the world's."""

    image: str = ""
    regions: list[Region] = field(default_factory=list)

    VIDEO_ONLY: ClassVar[tuple[str, ...]] = ("pix2video", "fatezero")

    def __post_init__(self) -> None:
        check_regions(self.regions)
        if self.regions and self.prompt.strip():
            raise ValueError(
                "prompt and regions are both given: each region has a prompt of its own; empty one of them"
            )
        if self.regions and self.compare:
            raise ValueError("compare: no baseline knows regions; leave it empty")
        for method in self.VIDEO_ONLY:
            if method in self.compare:
                raise ValueError(f"compare names {method!r}, which edits videos; leave it out")
        super().__post_init__()

    @property
    def instructions(self) -> list[str]:
        return [r.prompt for r in self.regions if r.prompt.strip()] if self.regions else super().instructions


def run(config: EditImageConfig, folder: Path, device: torch.device, stop: StopRequest) -> None:
    """Does the whole job in `folder`."""
    run_job(prepare(config, folder, device, stop))


def prepare(
    config: EditImageConfig, folder: Path, device: torch.device, stop: StopRequest, wrap: bool = False
) -> CanvasJob:
    """Opens everything that can be wrong before any work is done: the picture, the masks and the prior."""
    if config.image:
        footage = open_picture(config.image)
    else:
        strips = all(not region.mask and region.box is None for region in config.regions)
        each = [region.prompt.strip() or None for region in config.regions] if strips else []
        footage = world_strip(config.world, each if config.regions else config.prompt)
    masks = None
    if config.regions:
        edited = sorted(range(len(config.regions)), key=lambda i: not config.regions[i].prompt.strip())
        masks = region_masks(config.regions, *footage.size)[edited]  # those with an instruction first
    return open_job(config, folder, device, stop, footage, masks=masks, wrap=wrap)
