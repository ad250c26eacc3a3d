"""The surface of a room that was captured from inside: its walls as they are seen, without their outside."""

import math

import numpy as np
from scipy.ndimage import label


def inside_of_room(sigma: np.ndarray, threshold: float, low: np.ndarray, voxel: float, eyes: np.ndarray) -> bool:
    """If most of the cameras stand in closed rooms, make all that is outside of those solid, in place; return that.

    sigma [X, Y, Z]: densities on a grid that begins at `low` [3].  eyes [N, 3]: positions of the cameras.
    """
    index = np.round((eyes - low) / voxel).astype(int)
    within = ((index >= 0) & (index < sigma.shape)).all(1)
    if not within.any():
        return False
    empty = sigma < threshold
    regions, _ = label(empty)
    walls = [regions.take(end, axis) for axis in range(3) for end in (0, -1)]
    outside = np.unique(np.concatenate([wall.reshape(-1) for wall in walls]))
    at = regions[tuple(index[within].T)]
    rooms = np.setdiff1d(at, np.append(outside, 0))
    if np.isin(at, rooms).sum() <= len(eyes) / 2:
        return False
    sigma[empty & ~np.isin(regions, rooms)] = math.e * threshold
    return True
