"""Where a mesh goes in its files: the frame of OBJ and PLY, and that of GLB.

Symbols: x a point of the scene's frame, in which it was fitted (right-handed, z up);  own  the frame of OBJ and PLY,
the capture's if the scene is one, else the scene's;  glTF  y up, an object that has a front faces +z.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from csd3d.files import write_text

FACING = np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])  # own z up, front at +x, to glTF: (x, y, z) -> (y, z, x)
UPRIGHT = {  # own axis that points up -> rotation that turns it to +y by whole quarters
    "+z": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "-z": np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]),
    "+y": np.eye(3),
    "-y": np.diag([1.0, -1, -1]),
    "+x": np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]),
    "-x": np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]),
}
NEAR_AXIS = np.cos(np.radians(15))
FAR = 100.0  # sizes of the scene between it and the origin from which float32 is too coarse for its coordinates


@dataclass(frozen=True)
class Placement:
    """x_own = rotation x / scale + shift;  x_glTF = axes (x_own - offset).

    The default is for an object made from words: own is the scene's frame, and in GLB it faces +z and stands on y = 0.
    """

    rotation: np.ndarray = field(default_factory=lambda: np.eye(3))  # [3, 3] float64, scene to own
    scale: float = 1.0
    shift: np.ndarray = field(default_factory=lambda: np.zeros(3))
    axes: np.ndarray = field(default_factory=lambda: FACING)  # [3, 3], own to glTF
    offset: np.ndarray = field(default_factory=lambda: np.zeros(3))  # in own coordinates; GLB holds float32 only
    standing: bool = True  # in GLB, move the lowest point to y = 0
    frame: str = "right-handed, z up, world units"  # what OBJ and PLY say of their frame

    def own(self, points: np.ndarray) -> np.ndarray:
        """Points [N, 3] of the scene's frame in the own frame, float64."""
        return np.asarray(points, np.float64) @ self.rotation.T / self.scale + self.shift

    def gltf(self, points: np.ndarray) -> np.ndarray:
        """Points [N, 3] of the scene's frame in the GLB's, float64."""
        moved = (self.own(points) - self.offset) @ self.axes.T
        if self.standing and len(moved):
            moved[:, 1] -= moved[:, 1].min()
        return moved

    def matrices(self) -> dict[str, list[list[float]]]:
        """The maps between the frames, [4, 4] for columns (x, y, z, 1)."""
        own = _matrix(self.rotation / self.scale, self.shift)
        glb = _matrix(self.axes, -self.axes @ self.offset)
        back = _matrix(self.rotation.T * self.scale, -self.rotation.T @ self.shift * self.scale)
        maps = {"normalised_to_own": own, "own_to_normalised": back}
        maps |= {"own_to_glb": glb, "glb_to_own": _matrix(self.axes.T, self.offset)}
        return {name: matrix.tolist() for name, matrix in maps.items()}


def capture_placement(transform: np.ndarray, scale: float, aabb: np.ndarray) -> Placement:
    """The placement of a capture: files in its own coordinates.

    transform [4, 4] float64 and scale: x = scale (R x_own + t), as in `Capture`; aabb [6], its box.
    In GLB the own axis that points up becomes y, so that coordinates keep their values; where none of them does, the
    scene is turned upright.
    """
    rotation = transform[:3, :3].T
    shift = -rotation @ transform[:3, 3]
    up = rotation[:, 2]
    axis = int(np.abs(up).argmax())
    axes = UPRIGHT["+-"[int(up[axis] < 0)] + "xyz"[axis]] if abs(up[axis]) > NEAR_AXIS else UPRIGHT["+z"] @ rotation.T
    corners = np.asarray(aabb, np.float64).reshape(2, 3) / scale
    centre, size = rotation @ corners.mean(0) + shift, np.ptp(corners, axis=0).max()
    offset = np.round(centre) if np.abs(centre).max() > FAR * size else np.zeros(3)
    frame = "the coordinates of the capture"
    return Placement(rotation, scale, shift, axes, offset, standing=False, frame=frame)


def write_scene_json(path: Path, placement: Placement, aabb: np.ndarray) -> None:
    """Write how a run's scene lies in its capture: the maps between the frames, both ways."""
    said = {
        "about": "own: the capture's coordinates, as in mesh.obj, mesh.ply and camera_path.json; normalised: the frame "
        "that the scene was fitted in, z up; glb: mesh.glb, y up. Each matrix maps columns (x, y, z, 1).",
        "scale": placement.scale,
        **placement.matrices(),
        "glb_offset": placement.offset.tolist(),
        "aabb_normalised": np.asarray(aabb, np.float64).reshape(2, 3).tolist(),
    }
    write_text(path, json.dumps(said, indent=1) + "\n")


def _matrix(linear: np.ndarray, shift: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, shift
    return matrix + 0.0  # no -0.0
