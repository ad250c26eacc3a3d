"""Edit a picture of any size by an instruction, or each of its regions by one of its own."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from csd3d import registry
from csd3d.canvas.clip import open_picture
from csd3d.canvas.regions import Region, check_regions, region_masks
from csd3d.editors.edit_canvas import Edit2dConfig
from csd3d.registry import register
from csd3d.schema import path_key
from csd3d.tasks.run_2d import CanvasJob, open_job


@register("task", "edit_image", title="Edit of a picture")
@dataclass(kw_only=True)
class EditImageConfig(Edit2dConfig):
    """The job of `configs/csd-edit-image.yaml` and `configs/csd-edit-regions.yaml`; `image` "": one of the world's."""

    image: str = path_key()
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

    def open(self, device: torch.device) -> CanvasJob:
        """Opens everything that can be wrong before any work is done: the picture, the masks and the prior."""
        return open_picture_job(self, device)


def open_picture_job(config: EditImageConfig, device: torch.device, wrap: bool = False) -> CanvasJob:
    """As `EditImageConfig.open`; `wrap`: the picture's right border continues at its left."""
    if config.image:
        footage = open_picture(config.image)
    else:
        strips = all(not region.mask and region.box is None for region in config.regions)
        each = [region.prompt.strip() or None for region in config.regions] if strips else []
        footage = registry.get("demo", "strip").thing(config.world, each if config.regions else config.prompt)
    masks = None
    if config.regions:
        edited = sorted(range(len(config.regions)), key=lambda i: not config.regions[i].prompt.strip())
        masks = region_masks(config.regions, *footage.size)[edited]  # those with an instruction first
    return open_job(config, device, footage, masks=masks, wrap=wrap)
