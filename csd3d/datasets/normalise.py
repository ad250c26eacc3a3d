"""Orientation, centring and scaling of a capture's poses, as nerfstudio's auto_orient_and_center_poses.

poses [B, 4, 4] float64, camera to world, OpenGL axes (column 1 is the camera's up, column 2 points backwards).
"""

import logging

import numpy as np

log = logging.getLogger("csd3d")


def normalising_transform(poses: np.ndarray, orientation: str, centre: str) -> np.ndarray:
    """The rigid motion [4, 4] x -> R (x - c): R turns the mean camera up direction to +z ("up"), c is `centre_of`."""
    rotation = np.eye(3)
    if orientation == "up":
        up = poses[:, :3, 1].mean(axis=0)
        if np.linalg.norm(up) < 1e-3:
            log.warning("the cameras' up directions cancel out: the capture keeps its own orientation")
        else:
            rotation = rotation_between(up, np.array((0.0, 0.0, 1.0)))
    transform = np.eye(4)
    transform[:3, :3] = rotation
    transform[:3, 3] = -rotation @ centre_of(poses, centre)
    return transform


def centre_of(poses: np.ndarray, centre: str) -> np.ndarray:
    """The mean camera position [3] ("poses"), the point cameras look at ("focus"), or zero ("none")."""
    if centre == "none":
        return np.zeros(3)
    mean = poses[:, :3, 3].mean(axis=0)
    return focus_of_attention(poses, mean) if centre == "focus" else mean


def looks_inward(poses: np.ndarray) -> bool:
    """Whether nearly all cameras have their common focus in front of them."""
    mean = poses[:, :3, 3].mean(axis=0)
    focus = focus_of_attention(poses, mean)
    return bool(len(poses) > 1 and not np.array_equal(focus, mean) and _in_front(poses, focus).mean() >= 0.9)


def camera_scale(poses: np.ndarray, transform: np.ndarray) -> float:
    """The factor that scales all cameras, moved by `transform`, into [-1, 1]^3; 1 if all are at the origin."""
    positions = poses[:, :3, 3] @ transform[:3, :3].T + transform[:3, 3]
    reach = np.abs(positions).max()
    return float(1.0 / reach) if reach > 1e-6 else 1.0


def warn_of_one_place(poses: np.ndarray, where: str) -> None:
    """Warn if all poses are at one point, from which depth cannot be told; `where` begins the message."""
    spread = np.ptp(poses[:, :3, 3], axis=0).max()
    if spread <= max(1e-6, 1e-9 * np.abs(poses[:, :3, 3]).max()):  # 1e-9: a centimetre at 1e7
        seen = "there is one training picture" if len(poses) == 1 else "all cameras stand at one point"
        log.warning("%s: %s, so depth can't be known: the scene is right from there only", where, seen)


def rotation_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smallest rotation [3, 3] from a [3] to b [3], by Rodrigues: 1 + V + V^2 / (1 + a.b), V = [a x b].

    For opposite vectors, where it is not unique: 180 degrees about a fixed axis perpendicular to a.
    """
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    cosine = a @ b
    if cosine < -1 + 1e-9:
        axis = np.cross(a, np.eye(3)[np.abs(a).argmin()])
        axis /= np.linalg.norm(axis)
        return 2 * np.outer(axis, axis) - np.eye(3)
    x, y, z = np.cross(a, b)
    v = np.array(((0, -z, y), (z, 0, -x), (-y, x, 0)))
    return np.eye(3) + v + v @ v / (1 + cosine)


def focus_of_attention(poses: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The point [3] nearest to the viewing axes of the cameras that have it in front of them.

    min_c sum_i |(1 - d_i d_i^T)(c - o_i)|^2, solved again without the cameras that have it behind them until none
    drops out. Starts with the cameras that have `start` [3] in front, and returns it if fewer than two do or if all
    axes are parallel.
    """
    focus, active = start, poses[_in_front(poses, start)]
    while len(active) > 1:
        directions = active[:, :3, 2]
        across = np.eye(3) - directions[:, :, None] * directions[:, None, :]
        normal = across.mean(axis=0)
        if np.linalg.cond(normal) > 1e8:
            break
        focus = np.linalg.solve(normal, np.einsum("bij,bj->i", across, active[:, :3, 3]) / len(active))
        seeing = _in_front(active, focus)
        if seeing.all():
            break
        active = active[seeing]
    return focus


def _in_front(poses: np.ndarray, point: np.ndarray) -> np.ndarray:
    return ((poses[:, :3, 3] - point) * poses[:, :3, 2]).sum(axis=1) > 0


def move_poses(poses: np.ndarray, transform: np.ndarray, scale: float) -> np.ndarray:
    """Move poses [B, 4, 4] by x -> scale (R x + t); the scale applies to positions only."""
    moved = transform @ poses
    moved[:, :3, 3] *= scale
    return moved


def move_box(box: np.ndarray, transform: np.ndarray, scale: float) -> np.ndarray:
    """The axis-aligned box [2, 3] around a box [2, 3] moved by x -> scale (R x + t)."""
    corners = np.stack(np.meshgrid(*box.T, indexing="ij"), axis=-1).reshape(-1, 3)
    moved = scale * (corners @ transform[:3, :3].T + transform[:3, 3])
    return np.stack((moved.min(axis=0), moved.max(axis=0)))
