"""Which pixels of two views show the same thing, computed once from the source views, by depth or by optical flow.

Symbols: V views of H x W pixels, P ordered pairs (a, b) of views; grid [P, H, W, 2] says where view b shows what view a
shows at a pixel, as (x, y) in [−1, 1] across the picture, so that it serves feature maps of any size; weight [P, H, W]
is 0 where b does not show it. Ranges are "short" (neighbours) and "long" (farther apart).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.cameras import Cameras, pixel_centres
from csd3d.metrics.consistency import reproject, sample_pixels, view_pairs

GAP = 4  # frames from one to the other of a long pair, without cameras
VALUES_AT_ONCE = 2**25  # numbers of a warped batch in memory, 128 MiB


@dataclass(frozen=True)
class Overlaps:
    """What pairs of views share; rows are numbers of pairs.

    ranges: name → rows.  both_ways [2N] rows: each two neighbours, (a, b) then (b, a) next to it.
    """

    pairs: Tensor  # [P, 2]
    grid: Tensor  # [P, H, W, 2]
    weight: Tensor  # [P, H, W]
    ranges: dict[str, Tensor]
    both_ways: Tensor
    coarser: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    shown: dict[tuple[int, int], list] = field(default_factory=dict, repr=False)  # of `points`

    def at(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(grid, weight) for maps of another `size` (h, w): means over the pixels in a cell that both views show."""
        if self.weight.shape[1:] == size:
            return self.grid, self.weight
        if size not in self.coarser:
            weight = F.adaptive_avg_pool2d(self.weight[:, None], size)[:, 0]
            moved = F.adaptive_avg_pool2d((self.grid * self.weight[..., None]).movedim(-1, 1), size).movedim(1, -1)
            self.coarser[size] = moved / weight.clamp_min(1e-12)[..., None], weight
        return self.coarser[size]

    def chunks(self, rows: Tensor, values: int) -> Iterator[Tensor]:
        """Rows in parts, for `values` numbers a row in memory."""
        return iter(rows.split(max(1, VALUES_AT_ONCE // max(1, values))))

    def warp(self, maps: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [V, C, h, w] of views b seen from views a, bilinear: [n, C, h, w], and their weight [n, h, w]."""
        grid, weight = self.at(tuple(maps.shape[2:]))
        found = F.grid_sample(maps[self.pairs[rows, 1]], grid[rows], padding_mode="border", align_corners=False)
        return found, weight[rows]

    def points(self, size: tuple[int, int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each pair the cells of maps of `size` that both views show: numbers [n], grid [n, 2] and weight [n]."""
        if size not in self.shown:
            grid, weight = (each.flatten(1, 2) for each in self.at(size))
            kept = [row.nonzero()[:, 0] for row in weight]
            self.shown[size] = [(k, g[k], w[k]) for k, g, w in zip(kept, grid, weight, strict=True)]
        return self.shown[size]

    def share(self) -> float | None:
        """How much of a view its neighbours show, mean over the short pairs; None without any."""
        rows = self.ranges["short"]
        return float((self.weight[rows] > 0).double().mean()) if len(rows) else None


def neighbours_of(count: int, cameras: Cameras | None) -> Tensor:
    """Unordered neighbours [N, 2], a < b: by the angle between cameras (`view_pairs`), else each view and the next."""
    if cameras is None:
        return torch.stack([torch.arange(count - 1), torch.arange(1, count)], 1) if count > 1 else _no_pairs()
    pairs = view_pairs(cameras)["short"].sort(1).values
    return pairs.unique(dim=0) if len(pairs) else _no_pairs()


def by_depth(depths: Tensor, cameras: Cameras, masks: Tensor | None = None, tolerance: float = 0.02) -> Overlaps:
    """Overlaps by depths [V, H, W] along the rays, of the pairs of `view_pairs`, with the weights of `warped_error`.

    masks [V, H, W]: bool, or weights of pixels; 0 is ignored in both views.
    """
    ranges = view_pairs(cameras)
    usable = None if masks is None else (masks > 0).to(depths)

    def overlap(a: int, b: int) -> tuple[Tensor, Tensor]:
        pixels, seen = reproject(depths, cameras, a, b, tolerance)
        if masks is None:
            return pixels, seen.to(depths)
        kept = sample_pixels(usable[b][..., None], pixels)[..., 0] > 0.999
        return pixels, masks[a].to(depths) * (seen & kept)

    return _of_pairs(ranges, neighbours_of(len(depths), cameras), overlap, tuple(depths.shape[1:]))


def by_flow(images: Tensor, cameras: Cameras | None = None, masks: Tensor | None = None) -> Overlaps:
    """Overlaps along the optical flow between source views [V, H, W, 3] in [0, 1]; pixels where it does not lead back
    have weight 0.

    Without cameras the views are in order, as the frames of a video: short pairs are (v, v + 1), long ones
    (v, v + 4), whose flow is chained. With cameras the neighbours by angle are the short pairs, and none are long,
    since flow does not reach that far.
    """
    from csd3d.canvas.optical_flow import ClipFlow, consistent, dense_flow, grey, resize_flow

    height, width = images.shape[1:3]
    stack = images.permute(0, 3, 1, 2)
    near = neighbours_of(len(images), cameras)
    centres = pixel_centres(width, height).reshape(height, width, 2)
    if cameras is None:
        flow = ClipFlow(lambda indices: stack[list(indices)]).pixels
        count = len(images)
        ranges = {name: _steps(count, step) for name, step in (("short", 1), ("long", GAP))}
    else:
        greys = [grey(picture) for picture in stack]
        both = torch.cat([near, near.flip(1)])
        found = {(a, b): dense_flow(greys[a], greys[b]) for a, b in both.tolist()}
        ranges = {"short": both, "long": _no_pairs()}

        def flow(a: int, b: int) -> tuple[Tensor, Tensor]:
            return resize_flow(found[a, b], consistent(found[a, b], found[b, a]), (height, width))

    def overlap(a: int, b: int) -> tuple[Tensor, Tensor]:
        motion, valid = flow(a, b)
        return centres + motion, valid.float() if masks is None else masks[a].float() * valid

    return _of_pairs(ranges, near, overlap, (height, width))


def _of_pairs(ranges: dict[str, Tensor], near: Tensor, overlap, size: tuple[int, int]) -> Overlaps:
    """`overlap(a, b)` → (pixels of b [H, W, 2], weight [H, W]) of every pair that a range or `near` names, once."""
    height, width = size
    ways = torch.stack([near, near.flip(1)], 1).reshape(-1, 2)
    listed = [tuple(pair) for pairs in (*ranges.values(), ways) for pair in pairs.tolist()]
    row = {pair: i for i, pair in enumerate(dict.fromkeys(listed))}
    grid, weight = torch.empty(len(row), height, width, 2), torch.empty(len(row), height, width)
    scale = torch.tensor([2.0 / width, 2.0 / height])
    for (a, b), i in sorted(row.items(), key=lambda item: min(item[0])):  # along time, so that flow is cached
        pixels, weight[i] = overlap(a, b)
        grid[i] = (pixels * scale - 1).nan_to_num(-2.0, -2.0, -2.0).clamp(-4, 4)
    rows = {name: _rows(row, pairs) for name, pairs in ranges.items()}
    return Overlaps(torch.tensor(list(row)).reshape(-1, 2), grid, weight, rows, _rows(row, ways))


def _rows(row: dict[Sequence[int], int], pairs: Tensor) -> Tensor:
    return torch.tensor([row[tuple(pair)] for pair in pairs.tolist()], dtype=torch.long)


def _steps(count: int, step: int) -> Tensor:
    return torch.tensor([(v, v + step) for v in range(count - step)], dtype=torch.long).reshape(-1, 2)


def _no_pairs() -> Tensor:
    return torch.empty(0, 2, dtype=torch.long)
