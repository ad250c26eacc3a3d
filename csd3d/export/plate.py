"""Taking away the plate under an object that was made from words, and what floats about it.

Models draw things standing on something, so they put a disc or a ring of matter below an object that floats. It is told
from a part of the object by its shape alone: it is the lowest matter, thin, round, ends abruptly at its top, and covers
more ground than everything above it. So the brim of a hat that lies on its own is taken for one, and the hull of a ship
or a lamp's foot under its wider shade is not. Whole levels are removed: where the ring reaches up beside the object's
feet, those are cut too.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_dilation, distance_transform_edt, label
from scipy.spatial import ConvexHull

THIN = 1 / 3  # of the height of all matter: how thick a plate is at most; rings of foam are thick
ROUND = 0.75  # least share of the circle about it that its hull fills; a square fills .64
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
    whole = _hulls(solid)
    found = False
    while (top := plate_top(solid, whole.thin)) is not None:
        found = True
        window = whole.window
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
    found = _hulls(solid)
    for level in range(found.bottom + 1, min(found.thin, found.thin if highest is None else highest) + 1):
        plate = max(found.bottom, level - found.window)
        plate += int(found.area[plate:level].argmax())
        if found.round[plate] >= ROUND and 0 < WIDER * found.area[level:].max(initial=0.0) <= found.area[plate]:
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


@dataclass(frozen=True)
class Levels:
    """The levels [Z] of matter: the lowest, how many there are to the highest, and their hulls (see `hull`)."""

    bottom: int
    height: int
    area: np.ndarray
    round: np.ndarray

    @property
    def thin(self) -> int:
        """The last level that can be above a plate."""
        return self.bottom + int(THIN * self.height)

    @property
    def window(self) -> int:
        """In how many levels a plate ends."""
        return max(2, round(ABRUPT * self.height))


def _hulls(solid: np.ndarray) -> Levels:
    """The levels of matter [X, Y, Z] and their hulls; those that hardly have any count as empty."""
    count = solid.sum(axis=(0, 1))
    levels = np.flatnonzero(count > LEAST * count.max(initial=0))
    hulls = np.zeros((len(count), 2))
    for level in levels:
        hulls[level] = hull(solid[:, :, level])
    bottom, height = (int(levels[0]), int(levels[-1] + 1 - levels[0])) if len(levels) else (0, 0)
    return Levels(bottom, height, *hulls.T)


def hull(level: np.ndarray) -> tuple[float, float]:
    """The convex hull of a level of matter [X, Y] without its floaters: its area in voxels, and how round it is.

    Round is the share of the circle about its middle that it fills: 1 a disc, .64 a square, less what is longer.
    """
    labels, _ = label(level)
    sizes = np.bincount(labels.reshape(-1))[1:]
    kept = np.append(False, sizes >= CRUMB * sizes.max(initial=0))[labels]
    rows = np.flatnonzero(kept.any(axis=1))
    if not len(rows):
        return 0.0, 0.0
    # the ends of every row are enough for a hull; voxels are squares
    first, last = kept[rows].argmax(axis=1), kept.shape[1] - kept[rows, ::-1].argmax(axis=1)
    corners = [np.stack([rows + step, end], axis=1) for step in (0, 1) for end in (first, last)]
    found = ConvexHull(np.concatenate(corners))
    ends = found.points[found.vertices]
    reach = np.linalg.norm(ends - (ends.min(axis=0) + ends.max(axis=0)) / 2, axis=1).max()
    return float(found.volume), float(found.volume / (np.pi * reach**2))
