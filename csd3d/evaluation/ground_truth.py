"""What a result should be, from whoever knows: registered things of the kind "ground_truth" are asked in turn.

A ground truth knows some captures and some prompts. It says None or False of all others, which is what a user's own
photos and words get. The procedural world is one (`csd3d.world.plugin`); a plugin can bring another, such as a data set
that has photos from after the edit.

Depths are in the capture's normalised frame, distance along the ray, `inf` where there is no surface.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from csd3d import registry
from csd3d.cameras import Cameras
from csd3d.datasets import Capture

if TYPE_CHECKING:  # scenes are judged without what the metrics of texts need
    from csd3d.metrics.clip import ClipModel

CHANGED = 0.03  # a pixel whose colour moves by more than this in some channel belongs to the edit


@dataclass
class TrueViews:
    """True pictures of some views: `rgb` [B,H,W,3], `depth` [B,H,W], `mask` [B,H,W] share of the object in a pixel."""

    rgb: Tensor
    depth: Tensor
    mask: Tensor


class Truth(Protocol):
    """The truth about one instruction on one capture.

    `source` is the scene as it was captured, `answers` are all scenes that fulfil the instruction, at least one. What a
    scene is, only the ground truth knows; `views` makes pictures of it.
    """

    source: Any
    answers: Sequence[Any]

    def views(self, scene: Any, indices: Tensor) -> TrueViews:
        """`scene`, the source or an answer, through the capture's cameras `indices` [B]."""


class TextTruth(Protocol):
    """What there is to know about a prompt. Only `knows` may be called for a prompt that is not known."""

    def knows(self, prompt: str) -> bool:
        """Whether the other functions can be asked about this prompt."""

    def shape_prompt(self, prompt: str) -> str:
        """What a white, unpatterned object of the prompt's shape is called."""

    def distractors(self, prompt: str, count: int, seed: int) -> list[str]:
        """Up to `count` prompts, the nearest first, each of which no picture fits that fits this one."""

    def open_attribute_values(self, clip: "ClipModel", images: Tensor, prompt: str) -> dict[str, list[str]]:
        """Of each attribute that the prompt leaves open, what each of N particles shows, as `clip` reads it.

        images [N, V, 3, H, W] in [0, 1]: V views of each → {attribute: N values}.
        """

    def true_renders(
        self, prompt: str, azimuths_deg: Sequence[float], elevation_deg: float, count: int, size: int, seed: int
    ) -> Tensor:
        """`count` right objects, each from V azimuths that count from its front.

        Returns [count, V, 3, size, size] in [0, 1].
        """


class GroundTruth(TextTruth, Protocol):
    """What is registered: a class that is made without arguments.

    @register("ground_truth", "pairs", title="Photos before and after")
    class Pairs:
        def scene_truth(self, capture, prompt): ...
        def knows(self, prompt): return False       # then nothing else is asked about prompts
    """

    def scene_truth(self, capture: Capture, prompt: str) -> Truth | None:
        """The truth about `prompt` on `capture`; None where it is not known."""


def load_truth(capture: Capture, prompt: str) -> Truth | None:
    """The truth about `prompt` on `capture` from the first that knows it; None for a real capture or unknown words."""
    found = (entry.thing().scene_truth(capture, prompt) for entry in registry.entries("ground_truth"))
    return next((truth for truth in found if truth is not None), None)


def text_truth(prompt: str) -> TextTruth | None:
    """The first ground truth that knows the prompt, None where none does."""
    found = (entry.thing() for entry in registry.entries("ground_truth"))
    return next((truth for truth in found if truth.knows(prompt)), None)


def own_cameras(capture: Capture, cameras: Cameras) -> Cameras:
    """Cameras of the normalised frame in the capture's own."""
    rotation = capture.transform[:3, :3].to(cameras.camera_to_world).T @ cameras.camera_to_world[:, :, :3]
    position = capture.map_back(cameras.positions)
    pose = torch.cat((rotation, position[:, :, None]), 2)
    return Cameras(pose, cameras.fx, cameras.fy, cameras.cx, cameras.cy, cameras.width, cameras.height)


def changed_pixels(before: Tensor, after: Tensor) -> Tensor:
    """Mask [B,H,W] of the pixels that the true edit touches."""
    return ((before - after).abs() > CHANGED).any(-1)
