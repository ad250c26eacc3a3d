"""Finding what a captured object stands on, and taking it away before the surface is made.

The ground is the largest flat, roughly level part of the surface, found by RANSAC over its faces, with something
standing on it. A seat or a table top is none: below it there are legs.
"""

from dataclasses import dataclass

import numpy as np
import trimesh

TRIALS = 200
LEVEL = np.cos(np.radians(30))  # least cosine between the ground's normal and z
FLAT = np.cos(np.radians(20))  # and between a face's normal and the ground's
THICKNESS = 2.0  # voxels about the plane that belong to the ground
WIDER = 1.5  # least ratio of the ground's area to the area that what stands on it covers
SLAB = 0.1  # of the box's height: how thick a ground is that ends before the walls of the box


@dataclass(frozen=True)
class Plane:
    """The points x with normal . x = height; normal [3] points up."""

    normal: np.ndarray
    height: float

    def above(self, points: np.ndarray) -> np.ndarray:
        return points @ self.normal - self.height


def remove_ground(sigma: np.ndarray, low: np.ndarray, voxel: float, threshold: float, mesh: trimesh.Trimesh) -> bool:
    """Set the density [X, Y, Z] of the ground and of all below it to 0, in place; return whether there is a ground.

    mesh: the surface of that density at `threshold`.  low [3]: the position of sigma[0, 0, 0].
    """
    plane, faces = ground_plane(mesh, voxel)
    if plane is None:
        return False
    axes = [start + voxel * np.arange(count) for start, count in zip(low, sigma.shape, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    above = plane.normal[0] * x + plane.normal[1] * y + plane.normal[2] * z - plane.height
    solid = sigma >= threshold
    over = solid & (above > THICKNESS * voxel)
    area = float(mesh.area_faces[faces].sum())
    covered = float(over.any(axis=2).sum()) * voxel**2
    tall = np.max(np.where(over, above, 0.0)) > 2 * THICKNESS * voxel + 2 * voxel
    if not tall or over.sum() < 64 or area + covered < WIDER * covered or area < covered * (WIDER - 1):
        return False
    deep = solid & (above < -SLAB * sigma.shape[2] * voxel)
    if deep.any(axis=2).sum() * voxel**2 > 0.01 * area and not _reaches_walls(
        mesh.triangles_center[faces], low, sigma, voxel
    ):
        return False
    sigma[np.broadcast_to(above <= THICKNESS * voxel, sigma.shape)] = 0.0
    return True


def ground_plane(mesh: trimesh.Trimesh, voxel: float) -> tuple[Plane | None, np.ndarray]:
    """The plane with the most upward surface within `THICKNESS`, and the faces that are in it; None without any."""
    up = np.flatnonzero(mesh.face_normals[:, 2] > LEVEL)
    if not len(up):
        return None, up
    normals, centres, areas = mesh.face_normals[up], mesh.triangles_center[up], mesh.area_faces[up]
    generator = np.random.default_rng(0)
    best, most = None, 0.0
    for i in generator.choice(len(up), TRIALS, p=areas / areas.sum()):
        found = _inside(Plane(normals[i], float(normals[i] @ centres[i])), normals, centres, voxel)
        total = areas[found].sum()
        if total > most:
            best, most = found, total
    for _ in range(3):  # the mean normal and height of its faces, and the faces of that plane
        normal = (areas[best, None] * normals[best]).sum(0)
        normal /= np.linalg.norm(normal)
        plane = Plane(normal, float(np.average(centres[best] @ normal, weights=areas[best])))
        best = _inside(plane, normals, centres, voxel)
        if not best.any():
            return None, up[:0]
    return plane, up[best]


def _inside(plane: Plane, normals: np.ndarray, centres: np.ndarray, voxel: float) -> np.ndarray:
    return (normals @ plane.normal > FLAT) & (np.abs(plane.above(centres)) < THICKNESS * voxel)


def _reaches_walls(centres: np.ndarray, low: np.ndarray, sigma: np.ndarray, voxel: float) -> bool:
    """Whether the ground comes near at least three of the box's four side walls."""
    sides = voxel * (np.array(sigma.shape[:2]) - 1)
    near = np.concatenate((centres[:, :2].min(0) - low[:2], low[:2] + sides - centres[:, :2].max(0)))
    return int((near < 0.05 * np.tile(sides, 2)).sum()) >= 3
