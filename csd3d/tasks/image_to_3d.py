"""Image to 3D: text to 3D that is also held to one picture, its front view.

Each step renders the picture's camera too, and adds the errors of colour and opacity there to the score of the other
views, as Zero-1-to-3's and Magic123's optimisation does (arXiv 2303.11328, 2306.17843). Their prior sees the picture;
ours knows the camera and the words, so that what the picture does not show is what the words say, not what it shows.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from csd3d import registry
from csd3d.cameras import Cameras
from csd3d.datasets.cutout import read_cutout
from csd3d.errors import at_key
from csd3d.guidance.front import FrontConfig, FrontView
from csd3d.registry import register
from csd3d.schema import incidental, path_key
from csd3d.tasks.text_to_3d import AssetJob, TextTo3DConfig

ANYTHING = "an object"  # the prompt of a picture without words


@register("task", "image_to_3d", title="Image to 3D")
@dataclass
class ImageTo3DConfig(TextTo3DConfig):
    """The job of `configs/image-to-3d.yaml`.

    Without `image` the picture is one that a demo draws of `demo`; without `prompt` the words are the demo's, or "an
    object".
    """

    task: str = "image_to_3d"
    name: str = incidental("image-to-3d")  # name of the run's folder in outputs/
    image: str = path_key()  # a picture with the object cut out, or before a plain background; "": a demo
    demo: str = "a red chair with yellow stripes"  # without an image: what the demo's picture shows
    front: FrontConfig = field(default_factory=FrontConfig)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            self.prompt = ANYTHING if self.image else self.demo
        super().__post_init__()

    @property
    def has_truth(self) -> bool:
        """Not of a user's own picture: it shows another object than the world's, whatever the words are."""
        return not self.image

    def open(self, device: torch.device) -> AssetJob:
        """Open the picture, then the prior; what is wrong with them raises InputError before any work."""
        front = open_front(self)
        job = super().open(device)
        job.front = front.to(device)
        return job


def open_front(config: ImageTo3DConfig) -> FrontView:
    """The picture with its camera."""
    camera, settings = config.front.camera(config.views), config.front
    if config.image:
        with at_key("image"):
            found = read_cutout(Path(config.image).expanduser(), settings.size, settings.fill, settings.tolerance)
        colour, mask = torch.from_numpy(found.colour), torch.from_numpy(found.mask)
    else:
        colour, mask = draw_demo(config, camera)
    return FrontView(camera, colour.permute(2, 0, 1).contiguous(), mask, settings)


def draw_demo(config: ImageTo3DConfig, camera: Cameras) -> tuple[torch.Tensor, torch.Tensor]:
    """The demo's picture [S, S, 3], premultiplied by its mask [S, S]."""
    with at_key("demo"):
        return registry.get("demo", "object").thing(config.demo, config.seed, camera)
