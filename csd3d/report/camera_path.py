"""Camera paths for videos of a capture.

Where the photos look at one point, the path goes round it: a full circle if it was seen from all sides, else back and
forth. Elsewhere (a room seen from inside, a street, a tripod, one photo) it goes from photo to photo.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation, Slerp
from torch import Tensor

from csd3d.cameras import Cameras, evenly, look_at, on_sphere
from csd3d.datasets import Capture
from csd3d.datasets.normalise import looks_inward
from csd3d.evaluation.ground_truth import own_cameras
from csd3d.files import write_text

OPEN_GAP_DEG = 100.0  # a capture with a wider gap between neighbouring azimuths was not seen from all sides
KEY_POSES = 64  # most photos that a path goes through
TOUR_REACH = 0.5  # of the spread of the positions: as far as half a turn of the view
SWAY = 0.1  # radius of the circle on which the camera of one photo moves, in distances of what it looks at
STANDING_STILL = 1e-4  # world units


def video_cameras(capture: Capture, count: int) -> Cameras:
    """Return `count` cameras on a closed path that looks where the training photos look.

    Round a common point it is at the training cameras' median distance and elevation.
    """
    cameras = capture.cameras[capture.train]
    first = {name: getattr(cameras, name)[:1].expand(count) for name in ("fx", "fy", "cx", "cy")}
    poses = _round_trip(cameras, count) if looks_at_one_point(cameras) else _tour(cameras, count)
    return replace(cameras, camera_to_world=poses, **first, distortion=None, fisheye=False)


def looks_at_one_point(cameras: Cameras) -> bool:
    """Whether the axes meet in a point that all but a few of the cameras have in front of them, at some distance."""
    poses = np.tile(np.eye(4), (len(cameras), 1, 1))
    poses[:, :3] = cameras.camera_to_world.double().cpu().numpy()
    if np.ptp(poses[:, :3, 3], axis=0).max() < STANDING_STILL or not looks_inward(poses):
        return False
    offset = cameras.positions - looked_at(cameras)
    ahead = (offset * cameras.camera_to_world[:, :, 2]).sum(1)
    return bool(ahead.median() > STANDING_STILL)


def _round_trip(cameras: Cameras, count: int) -> Tensor:
    target = looked_at(cameras)
    offset = cameras.positions - target
    radius = offset.norm(dim=1)
    azimuth = torch.atan2(offset[:, 1], offset[:, 0])
    elevation = torch.asin((offset[:, 2] / radius).clamp(-1, 1)).median().item()
    angles = path_azimuths(azimuth, count)
    return look_at(target + radius.median() * on_sphere(angles, elevation), target)


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


def _tour(cameras: Cameras, count: int) -> Tensor:
    """Poses [count, 3, 4] from photo to photo: round if the last is near the first, else back and forth.

    Each leg takes as long as its length, a turn of the view counting as a way; positions are linear, rotations slerp.
    """
    chosen = evenly(len(cameras), KEY_POSES)
    poses = cameras.camera_to_world[chosen].double().cpu().numpy()
    cost = _costs(poses)
    order = _nearest_neighbours(cost)
    legs = cost[order[:-1], order[1:]]
    if not legs.sum() > 1e-6:
        return _sway(cameras.camera_to_world[0], count)
    closing = cost[order[-1], order[0]]
    closed = len(order) > 2 and closing <= 2 * legs.mean()
    if closed:
        order, legs = np.append(order, order[0]), np.append(legs, closing)
    kept = np.append(True, legs > 1e-9)  # Slerp wants increasing times
    times = np.append(0.0, np.cumsum(legs))[kept]
    turn = np.arange(count) / count
    at = times[-1] * (turn if closed else 0.5 - 0.5 * np.cos(2 * np.pi * turn))
    key = poses[order][kept]
    result = np.empty((count, 3, 4))
    result[:, :, :3] = Slerp(times, Rotation.from_matrix(key[:, :, :3]))(at).as_matrix()
    for axis in range(3):
        result[:, axis, 3] = np.interp(at, times, key[:, axis, 3])
    return torch.from_numpy(result).float()


def _costs(poses: np.ndarray) -> np.ndarray:
    """[K, K] how far poses are apart: distance in spreads of the positions, plus the angle between the views."""
    position, axis = poses[:, :, 3], poses[:, :, 2]
    spread = np.linalg.norm(position - position.mean(0), axis=1).max()
    distance = np.linalg.norm(position[:, None] - position, axis=2)
    angle = np.arccos((axis @ axis.T).clip(-1, 1)) / np.pi
    angle[angle < 1e-6] = 0.0
    return angle + (TOUR_REACH * distance / spread if spread > STANDING_STILL else 0.0)


def _nearest_neighbours(cost: np.ndarray) -> np.ndarray:
    """An order [K] in which each is followed by the nearest that is left, from one of the two farthest apart."""
    order = [int(cost.max(1).argmax())]
    left = set(range(len(cost))) - set(order)
    while left:
        order.append(min(left, key=lambda i: (cost[order[-1], i], i)))
        left.remove(order[-1])
    return np.array(order)


def _sway(pose: Tensor, count: int) -> Tensor:
    """Poses [count, 3, 4] on a small circle about that of one photo, which look at the point a unit ahead of it."""
    turn = 2 * math.pi * torch.arange(count) / count
    right, up, back, position = pose.unbind(1)
    target = position - back
    moved = position + SWAY * (turn.sin()[:, None] * right + (1 - turn.cos())[:, None] * 0.5 * up)
    backward = torch.nn.functional.normalize(moved - target, dim=1)
    across = torch.nn.functional.normalize(torch.linalg.cross(up.expand_as(backward), backward), dim=1)
    return torch.stack((across, torch.linalg.cross(backward, across), backward, moved), dim=2)


def write_camera_path(path: Path, cameras: Cameras, capture: Capture, fps: int) -> None:
    """Write a path in the capture's own frame, as a transforms.json (OpenGL axes) with the intrinsics of its video."""
    poses = own_cameras(capture, cameras).camera_to_world.tolist()
    intrinsics = {"fl_x": cameras.fx, "fl_y": cameras.fy, "cx": cameras.cx, "cy": cameras.cy}
    said = {key: float(value[0]) for key, value in intrinsics.items()} | {"w": cameras.width, "h": cameras.height}
    frames = [{"transform_matrix": [*pose, [0.0, 0.0, 0.0, 1.0]]} for pose in poses]
    write_text(path, json.dumps({"camera_model": "PINHOLE", **said, "fps": fps, "frames": frames}, indent=1) + "\n")
