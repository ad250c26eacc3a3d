"""What the edit of a capture should look like, where the capture is of the procedural world and so can be asked.

Depths are in the capture's normalised frame, distance along the ray, `inf` where there is no surface.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.datasets import Capture
from csd3d.world.dataset import read_scene, render_views, true_answers
from csd3d.world.render import FAR
from csd3d.world.scene import Scene

CHANGED = 0.03  # a pixel whose colour moves by more than this in some channel belongs to the edit


@dataclass
class TrueViews:
    """True pictures of some views: `rgb` [B,H,W,3], `depth` [B,H,W], `mask` [B,H,W] share of the object in a pixel."""

    rgb: Tensor
    depth: Tensor
    mask: Tensor


@dataclass
class Truth:
    """The source scene and every scene that fulfils the instruction, best first once `choose` was asked."""

    capture: Capture
    source: Scene
    answers: tuple[Scene, ...]

    def views(self, scene: Scene, indices: Tensor) -> TrueViews:
        """`scene` through the capture's cameras `indices`."""
        cameras = own_cameras(self.capture, self.capture.cameras[indices])
        intrinsics = torch.stack((cameras.fx, cameras.fy, cameras.cx, cameras.cy), 1)
        pictures = render_views(scene, cameras.camera_to_world, intrinsics, cameras.width, cameras.height)
        depth = torch.from_numpy(pictures.depth)
        depth = torch.where(depth < FAR, depth * self.capture.scale, torch.inf)
        return TrueViews(torch.from_numpy(pictures.rgb), depth, torch.from_numpy(pictures.mask))


def load_truth(capture: Capture, prompt: str) -> Truth | None:
    """The truth about `prompt` on `capture`; None for a real capture or words that the world does not know."""
    scene = read_scene(capture.folder)
    answers = true_answers(scene, prompt) if scene is not None else ()
    return Truth(capture, scene, answers) if answers else None


def own_cameras(capture: Capture, cameras: Cameras) -> Cameras:
    """Cameras of the normalised frame in the capture's own."""
    rotation = capture.transform[:3, :3].to(cameras.camera_to_world).T @ cameras.camera_to_world[:, :, :3]
    position = capture.map_back(cameras.positions)
    pose = torch.cat((rotation, position[:, :, None]), 2)
    return Cameras(pose, cameras.fx, cameras.fy, cameras.cx, cameras.cy, cameras.width, cameras.height)


def changed_pixels(before: Tensor, after: Tensor) -> Tensor:
    """Mask [B,H,W] of the pixels that the true edit touches."""
    return ((before - after).abs() > CHANGED).any(-1)
