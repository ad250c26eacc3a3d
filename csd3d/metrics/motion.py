"""Steadiness of an edited clip along the motion of its source, and visibility of the seams between patches.

Frames are [H, W, 3] in [0, 1]; flow_ab [H, W, 2] is (x, y) in pixels: what frame a shows at p, frame b shows at
p + flow_ab(p).
"""

from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from csd3d.cameras import pixel_centres
from csd3d.metrics.consistency import sample_pixels

Flow = Callable[[int, int], tuple[Tensor, Tensor]]
SEAM_FLOOR = (0.5 / 255) ** 2  # squared difference of half an 8-bit level; smaller edges are invisible


def warp_frame(frame: Tensor, flow: Tensor) -> Tensor:
    """Frame b `[H, W, C]` warped to frame a: b(p + flow_ab(p)), bilinear, with the border value outside."""
    height, width = flow.shape[:2]
    if frame.shape[:2] != flow.shape[:2] or flow.shape[2:] != (2,):
        raise ValueError(f"expected [H, W, C] and [H, W, 2] of one size, got {tuple(frame.shape)}, {tuple(flow.shape)}")
    centres = pixel_centres(width, height, flow.device).reshape(height, width, 2)
    return sample_pixels(frame, centres + flow)


class WarpedError:
    """Masked RMSE of frame a against frame b warped by the *source's* flow, pooled over all pairs of a range.
    (Lai et al. 2018, arXiv 1808.00449, take the squared error instead, and average over pairs.)

        E = √( Σ_ab Σ_p m_ab(p) ‖I_a(p) − I_b(p + flow_ab(p))‖² / 3  /  Σ_ab Σ_p m_ab(p) )

    over the pairs (t, t + 1), "short", and (t, t + gap), "long". The frames of the edited clip are added one by one;
    the last `gap` are kept. `flow(a, b)` of the source → (`[H, W, 2]`, m `[H, W]`, 0 where b does not show the pixel).
    """

    def __init__(self, flow: Flow, gap: int = 4) -> None:
        if gap < 2:
            raise ValueError(f"gap is {gap}: a long range spans at least 2 frames")
        self.flow, self.kept, self.count = flow, deque(maxlen=gap), 0
        self.steps = {"short": 1, "long": gap}
        self.sums = {name: [0.0, 0.0, 0, 0] for name in self.steps}

    def add(self, frame: Tensor) -> None:
        """Append the next frame `[H, W, 3]` in [0, 1]."""
        for name, step in self.steps.items():
            if self.count >= step:
                earlier = self.kept[-step]
                motion, mask = self.flow(self.count - step, self.count)
                error = (earlier.double() - warp_frame(frame.float(), motion).double()).square().mean(-1)
                found = float((mask * error).sum()), float(mask.double().sum()), int((mask > 0).sum()), 1
                self.sums[name] = [old + new for old, new in zip(self.sums[name], found, strict=True)]
        self.kept.append(frame)
        self.count += 1

    def report(self) -> dict[str, float | int | None]:
        """For each range its RMSE (None if no pixel is seen twice), `<range>_pixels` and `<range>_pairs`."""
        found: dict[str, float | int | None] = {}
        for name, (squared, weight, pixels, pairs) in self.sums.items():
            found |= {name: (squared / weight) ** 0.5 if weight else None}
            found |= {f"{name}_pixels": pixels, f"{name}_pairs": pairs}
        return found


def mean_of_ranges(name: str, report: dict[str, float | int | None]) -> dict[str, float | None]:
    """`name`, the mean of a report's ranges "short" and "long" that are known, and each as `<name>_<range>`."""
    errors = {key: report[key] for key in ("short", "long")}
    known = [error for error in errors.values() if error is not None]
    return {name: sum(known) / len(known) if known else None} | {f"{name}_{key}": e for key, e in errors.items()}


def seam_visibility(
    image: Tensor, rows: Iterable[int] = (), columns: Iterable[int] = (), wrap: bool = False
) -> float | None:
    """Gradient energy on patch borders relative to other lines: 1 if borders are invisible, more if they show.

        Σ_borders ‖I(p) − I(p − e)‖² / Σ_borders mean over the other lines of the same direction

    image `[H, W, 3]` in [0, 1]. Border y of `rows` lies between pixel rows y − 1 and y; the same for `columns`. `wrap`:
    column 0 follows the last one, with border 0 between them. None without borders. Raises ValueError for borders
    outside the picture, or if every line is a border.
    """
    found, expected, count = 0.0, 0.0, 0
    for axis, borders, closed in ((0, rows, False), (1, columns, wrap)):
        borders, length = sorted(set(borders)), image.shape[axis]
        if not borders:
            continue
        first = 0 if closed else 1
        if borders[0] < first or borders[-1] >= length:
            raise ValueError(f"borders {borders} along a side of {length} pixels: give numbers {first}..{length - 1}")
        lines = (image.double() - image.double().roll(1, axis)).square().mean((1 - axis, 2))
        on = torch.zeros(length, dtype=torch.bool)
        on[borders] = True
        elsewhere = lines[first:][~on[first:]]
        if not len(elsewhere):
            raise ValueError(f"all {length - first} lines of a side are borders: nothing to compare them with")
        found, count = found + float(lines[on].sum()), count + len(borders)
        expected += len(borders) * float(elsewhere.mean())
    return (found + SEAM_FLOOR * count) / (expected + SEAM_FLOOR * count) if count else None
