"""True results to compare with, from registered things of the kind "ground_truth", which are asked in turn.

A ground truth knows some captures and some prompts, and returns None or False for all others, such as a user's own
photos and prompts. The procedural world is one (`csd3d.world.plugin`); a plugin can add another, such as a data set
with photos taken after the edit.

Depths are in the capture's normalised frame, distance along the ray, `inf` where there is no surface.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from csd3d import registry
from csd3d.cameras import Cameras
from csd3d.datasets import Capture
from csd3d.vocabulary import Vocabulary

if TYPE_CHECKING:  # evaluating scenes should not import CLIP
    from csd3d.metrics.clip import ClipModel

CHANGED = 0.03  # a pixel that changes by more than this in some channel belongs to the edit


@dataclass
class TrueViews:
    """True pictures of some views: `rgb` [B,H,W,3], `depth` [B,H,W], `mask` [B,H,W] share of the object in a pixel.

    `asked`, only from `RightObjects`: the colour that each pixel of the object is meant to have, [B,H,W] int: 0 the
    object's own, 1 its pattern's, 2 and more those of its other parts; −1 where there is none, or a mixture.
    """

    rgb: Tensor
    depth: Tensor
    mask: Tensor
    asked: Tensor | None = None


class Truth(Protocol):
    """The true results of one instruction on one capture.

    `source` is the captured scene, `answers` are all scenes that fulfil the instruction, at least one. Scenes may be
    any objects; `views` renders them.
    """

    source: Any
    answers: Sequence[Any]

    def views(self, scene: Any, indices: Tensor) -> TrueViews:
        """Render `scene`, the source or an answer, from the capture's cameras `indices` [B]."""


class RightObjects(Protocol):
    """The objects that a prompt allows, each alone: without what it stands on, unless the prompt says so.

    Objects may be anything; they stand in the frame of assets: z up, the front along +x, lengths in world units.
    """

    def draw(self, count: int, seed: int) -> Sequence[Any]:
        """Return `count` random right objects."""

    def near(self, thing: Any) -> Sequence[Any]:
        """Return the right objects that differ from `thing` in one thing that the prompt leaves open, or in light."""

    def views(self, thing: Any, cameras: Cameras, backdrop: Tensor) -> TrueViews:
        """Render the object from all cameras before the colour `backdrop` [3]; depths in world units."""

    def distance(self, thing: Any, points: Tensor) -> Tensor:
        """Return the signed distance [P] of `points` [P,3] to the object's surface, negative inside."""

    def open_values(self, thing: Any) -> dict[str, str]:
        """Return what the object has of each attribute that the prompt leaves open, without light and turn."""

    def name(self, thing: Any) -> str:
        """Return the object in words."""


class TextTruth(Protocol):
    """Ground truth about prompts. For an unknown prompt only `knows` may be called."""

    def knows(self, prompt: str) -> bool:
        """Return whether the other functions accept this prompt."""

    def shape_prompt(self, prompt: str) -> str:
        """Return a prompt for a white, unpatterned object of the same shape."""

    def distractors(self, prompt: str, count: int, seed: int) -> list[str]:
        """Return up to `count` prompts, the nearest first, that no picture fits together with this one."""

    def open_attribute_values(self, clip: "ClipModel", images: Tensor, prompt: str) -> dict[str, list[str]]:
        """Return, for each attribute that the prompt leaves open, what each of N particles shows, judged by `clip`.

        images [N, V, 3, H, W] in [0, 1]: V views of each → {attribute: N values}.
        """

    def true_renders(
        self, prompt: str, azimuths_deg: Sequence[float], elevation_deg: float, count: int, size: int, seed: int
    ) -> Tensor:
        """Render `count` right objects from V azimuths (0 is the front): [count, V, 3, size, size] in [0, 1]."""

    def right_objects(self, prompt: str) -> RightObjects | None:
        """Return the objects that the prompt allows, None if not known; a ground truth need not have this method."""

    def vocabulary(self) -> Vocabulary:
        """Return the words that models which were trained on this truth know; it need not have this method."""


class GroundTruth(TextTruth, Protocol):
    """The interface of a registered class, which is created without arguments.

    @register("ground_truth", "pairs", title="Photos before and after")
    class Pairs:
        def scene_truth(self, capture, prompt): ...
        def knows(self, prompt): return False       # then nothing else is called for prompts
    """

    def scene_truth(self, capture: Capture, prompt: str) -> Truth | None:
        """Return the truth about `prompt` on `capture`; None if unknown."""


def load_truth(capture: Capture, prompt: str) -> Truth | None:
    """The truth about `prompt` on `capture` from the first ground truth that knows it; None if none does."""
    found = (entry.thing().scene_truth(capture, prompt) for entry in registry.entries("ground_truth"))
    return next((truth for truth in found if truth is not None), None)


def text_truth(prompt: str) -> TextTruth | None:
    """The first ground truth that knows the prompt; None if none does."""
    found = (entry.thing() for entry in registry.entries("ground_truth"))
    return next((truth for truth in found if truth.knows(prompt)), None)


def own_cameras(capture: Capture, cameras: Cameras) -> Cameras:
    """Move cameras from the normalised frame to the capture's own; poses in float64."""
    rotation = capture.transform[:3, :3].to(cameras.camera_to_world).T @ cameras.camera_to_world[:, :, :3]
    position = capture.map_back(cameras.positions)
    return replace(cameras, camera_to_world=torch.cat((rotation.double(), position[:, :, None]), 2))


def changed_pixels(before: Tensor, after: Tensor) -> Tensor:
    """Mask [B,H,W] of the pixels that the true edit changes."""
    return ((before - after).abs() > CHANGED).any(-1)
