"""Holes of a density that no one sees: thin spots of sheets, and hollows inside matter. Densities are [X,Y,Z] grids."""

import math

import numpy as np
from scipy.ndimage import binary_fill_holes, distance_transform_edt

NARROW = 0.06  # width of an opening, of the box, that no view looks through
SOLID = math.e  # what is filled is so much denser than the threshold


def close_holes(sigma: np.ndarray, threshold: float, empty: float) -> None:
    """Fill thin spots of flat sheets in place: holes of a slice along an axis that are denser than `empty`."""
    spots = np.zeros(sigma.shape, bool)
    for axis in range(3):
        for slab, spot in zip(np.moveaxis(sigma, axis, 0), np.moveaxis(spots, axis, 0), strict=True):
            spot |= binary_fill_holes(slab >= threshold) & (slab > empty) & (slab < threshold)
    sigma[spots] = SOLID * threshold


def fill_hollows(sigma: np.ndarray, threshold: float) -> None:
    """Fill in place what is hollow inside matter, also where it has an opening up to `NARROW` of the box wide, or one
    of any width in the floor that the object stands on.

    No view sees in through these, so nothing was learned there, but the walls could be a quarter of a mesh's faces.
    Hollows are found on a grid of every other sample; z, the last axis, is up.
    """
    solid = sigma >= threshold
    if not solid.any():
        return
    floor = int(solid.any((0, 1)).argmax())
    coarse, edge = solid[::2, ::2, ::2].copy(), max(round(NARROW / 4 * max(sigma.shape)), 1)
    coarse[:, :, : (floor + 1) // 2 + 1] = True
    padded = np.pad(coarse, edge + 1)
    closed = distance_transform_edt(distance_transform_edt(~padded) <= edge) > edge
    hollow = binary_fill_holes(closed) & ~closed
    if not hollow.any():
        return
    near = (distance_transform_edt(~hollow) <= edge + 1)[(slice(edge + 1, -edge - 1),) * 3]
    for axis in range(3):
        near = np.take(near, np.arange(sigma.shape[axis]) // 2, axis)
    inside = near & ~solid
    inside[:, :, :floor] = False
    sigma[inside] = SOLID * threshold
