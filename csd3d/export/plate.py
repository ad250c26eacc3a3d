"""Taking away the plate under an object that was made from words.

Models draw things standing on something, so they put a disc of matter below an object that floats. It is told from a
part of the object by its shape alone: it is the lowest matter, thin, ends abruptly at its top, and is wider than
everything above it. So the brim of a hat that lies on its own is taken for one, and a lamp's foot under its wider
shade is not.
"""

import numpy as np

THIN = 0.2  # of the height of all matter: how thick a plate is at most
ABRUPT = 0.08  # of that height: within which it gives way to what stands on it
WIDER = 1.25  # least ratio of its reach to that of everything above it
REACH = 0.9  # quantile of the distances from the axis that is a level's reach; fewer than the rest are floaters
LEAST = 0.01  # of the largest level: how much matter a level has that counts


def remove_plate(sigma: np.ndarray, threshold: float) -> bool:
    """Set the density [X, Y, Z] of the plate, its lowest levels, to 0, in place; return whether there is a plate.

    Matter is what is at least `threshold`; z points up.
    """
    solid = sigma >= threshold
    top = plate_top(solid)
    if top is None:
        return False
    sigma[:, :, :top] = 0.0
    return True


def plate_top(solid: np.ndarray) -> int | None:
    """Return the first level [Z] above the plate of matter [X, Y, Z] bool, None if it stands on no plate."""
    reach = level_reach(solid)
    levels = np.flatnonzero(reach > 0)
    if not len(levels):
        return None
    bottom, top = int(levels[0]), int(levels[-1]) + 1
    height = top - bottom
    window = max(2, round(ABRUPT * height))
    for level in range(bottom + 1, bottom + int(THIN * height) + 1):
        below = reach[max(bottom, level - window) : level].max()
        if below >= WIDER * reach[level:top].max():
            return level
    return None


def level_reach(solid: np.ndarray) -> np.ndarray:
    """Return, for each level z of matter [X, Y, Z], how far it reaches from the axis, in voxels; 0 of next to none.

    The axis is vertical, through the mean of all matter.
    """
    x, y, z = np.nonzero(solid)
    if not len(z):
        return np.zeros(solid.shape[2])
    distance = np.hypot(x - x.mean(), y - y.mean()) + 0.5
    order = np.lexsort((distance, z))
    count = np.bincount(z, minlength=solid.shape[2])
    first = np.cumsum(count) - count
    at = first + np.minimum((REACH * count).astype(int), np.maximum(count - 1, 0))
    reach = distance[order][np.minimum(at, len(z) - 1)]
    return np.where(count >= LEAST * count.max(), reach, 0.0)
