"""Camera paths for videos of a capture: a full circle if it was seen from all sides, else back and forth."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from csd3d.cameras import Cameras, look_at, on_sphere
from csd3d.datasets import Capture

OPEN_GAP_DEG = 100.0  # a capture with a wider gap between neighbouring azimuths was not seen from all sides


def video_cameras(capture: Capture, count: int) -> Cameras:
    """Return `count` cameras on a closed path at the training cameras' median distance and elevation."""
    cameras = capture.cameras[capture.train]
    target = looked_at(cameras)
    offset = cameras.positions - target
    radius = offset.norm(dim=1)
    azimuth = torch.atan2(offset[:, 1], offset[:, 0])
    elevation = torch.asin((offset[:, 2] / radius).clamp(-1, 1)).median().item()
    angles = path_azimuths(azimuth, count)
    poses = look_at(target + radius.median() * on_sphere(angles, elevation), target)
    first = {name: getattr(cameras, name)[:1].expand(count) for name in ("fx", "fy", "cx", "cy")}
    return replace(cameras, camera_to_world=poses, **first, distortion=None, fisheye=False)


def looked_at(cameras: Cameras) -> Tensor:
    """Return the point [3] nearest to all viewing axes in least squares."""
    axis = -cameras.camera_to_world[:, :, 2]
    across = torch.eye(3) - axis[:, :, None] * axis[:, None, :]
    total = across.sum(0) + 1e-6 * torch.eye(3)
    return torch.linalg.solve(total, (across @ cameras.positions[:, :, None]).sum(0)[:, 0])


def path_azimuths(azimuth: Tensor, count: int) -> Tensor:
    """Return azimuths [count] in radians: a full turn, or a swing back and forth over the part the capture covers."""
    ordered = azimuth.sort().values
    gaps = torch.cat((ordered[1:] - ordered[:-1], ordered[:1] + 2 * math.pi - ordered[-1:]))
    turn = 2 * math.pi * torch.arange(count) / count
    widest = int(gaps.argmax())
    if gaps[widest] < math.radians(OPEN_GAP_DEG):
        return azimuth[0] + turn
    start = ordered[(widest + 1) % len(ordered)]
    span = 2 * math.pi - gaps[widest]
    return start + span * (0.5 - 0.35 * turn.cos())
