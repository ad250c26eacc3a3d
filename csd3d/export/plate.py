"""Taking away the plate under an object that was made from words, and what floats about it.

Models draw things standing on something, so they put a disc or a ring of matter below an object that floats. It is told
from a part of the object by its shape alone: it is the lowest matter, thin, ends abruptly at its top, and covers more
ground than everything above it. So the brim of a hat that lies on its own is taken for one, and a lamp's foot under
its wider shade is not. Whole levels are removed: where the ring reaches up beside the object's feet, those are cut too.
"""

import numpy as np
from scipy.ndimage import binary_dilation, distance_transform_edt, label
from scipy.spatial import ConvexHull

THIN = 0.25  # of the height of all matter: how thick a plate is at most
ABRUPT = 0.08  # of that height: within which it gives way to what stands on it
WIDER = 1.5  # least ratio of the area that its hull covers to that of everything above it
LEAST = 0.01  # of the largest level: how much matter a level has that counts
CRUMB = 0.05  # of a level's largest part: smaller parts are floaters, and do not count in its hull
GAP = 0.04  # of the height: parts of an object are this far apart at most


def remove_plate(sigma: np.ndarray, threshold: float) -> bool:
    """Set the density [X, Y, Z] of the plate, the lowest levels, to 0, in place; return whether there is a plate.

    Matter is what is at least `threshold`; z points up. Of a ragged plate also what stands up beyond the object's
    shadow is removed, and what is left is looked at again, up to `THIN` of the height in all.
    """
    solid = sigma >= threshold
    bottom, height, _ = _hulls(solid)
    found = False
    while (top := plate_top(solid, bottom + int(THIN * height))) is not None:
        found = True
        window = max(2, round(ABRUPT * height))
        gone = np.zeros_like(solid)
        gone[:, :, :top] = True
        above = solid[:, :, top + window :].any(axis=2)
        if above.any():
            gone[:, :, top : top + window] = (distance_transform_edt(~above) > window)[:, :, None]
        solid &= ~gone
        sigma[gone] = 0.0
    return found


def plate_top(solid: np.ndarray, highest: int | None = None) -> int | None:
    """Return the first level [Z] above the plate of matter [X, Y, Z] bool, None if it stands on no plate.

    highest: the last level that can be it, if not `THIN` of the height.
    """
    bottom, height, area = _hulls(solid)
    last = bottom + int(THIN * height)
    window = max(2, round(ABRUPT * height))
    for level in range(bottom + 1, (last if highest is None else min(highest, last)) + 1):
        below, above = area[max(bottom, level - window) : level].max(), area[level:].max(initial=0.0)
        if 0 < WIDER * above <= below:
            return level
    return None


def keep_object(sigma: np.ndarray, threshold: float) -> None:
    """Set the density [X, Y, Z] of all matter but the largest object's to 0, in place.

    Parts that are at most `GAP` of its height apart are one object, as the head of a robot is that does not touch its
    body.
    """
    solid = sigma >= threshold
    levels = np.flatnonzero(solid.any(axis=(0, 1)))
    if not len(levels):
        return
    reach = max(1, round(GAP / 2 * (levels[-1] + 1 - levels[0])))
    labels, _ = label(binary_dilation(solid, iterations=reach))
    largest = np.bincount(labels[solid]).argmax()
    sigma[solid & (labels != largest)] = 0.0


def _hulls(solid: np.ndarray) -> tuple[int, int, np.ndarray]:
    """The lowest level of matter [X, Y, Z], how many levels there are to the highest, and each level's hull's area."""
    count = solid.sum(axis=(0, 1))
    levels = np.flatnonzero(count > LEAST * count.max(initial=0))
    area = np.zeros(len(count))
    for level in levels:
        area[level] = hull_area(solid[:, :, level])
    return (int(levels[0]), int(levels[-1] + 1 - levels[0]), area) if len(levels) else (0, 0, area)


def hull_area(level: np.ndarray) -> float:
    """Return the area in voxels of the convex hull of a level of matter [X, Y], without its floaters."""
    labels, _ = label(level)
    sizes = np.bincount(labels.reshape(-1))[1:]
    kept = np.append(False, sizes >= CRUMB * sizes.max(initial=0))[labels]
    rows = np.flatnonzero(kept.any(axis=1))
    if not len(rows):
        return 0.0
    # the ends of every row are enough for a hull; voxels are squares
    first, last = kept[rows].argmax(axis=1), kept.shape[1] - kept[rows, ::-1].argmax(axis=1)
    corners = [np.stack([rows + step, end], axis=1) for step in (0, 1) for end in (first, last)]
    return float(ConvexHull(np.concatenate(corners)).volume)
