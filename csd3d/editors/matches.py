"""Points that two views of a scene both show, by its depth, and a loss that is 0 where they look alike.

Symbols: N views with latents z [N, C, h, w]; P pairs (a, b) of views; p a latent pixel of a. x_ab(p) is where b shows
the surface that a shows at p, v_ab(p) in [0, 1] the share of p's pixels that b shows, b the bilinear weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from csd3d.cameras import Cameras, pixel_centres
from csd3d.canvas.latents import pixel_grid, to_latent
from csd3d.editors.scene import SceneEdit, SceneSource
from csd3d.memory import check_fits
from csd3d.metrics.consistency import reproject, view_pairs
from csd3d.rendering import Rendered
from csd3d.representations.base import surface_depth

BYTES = 4 * 40  # of a latent pixel of a pair: what `Matches` holds, and one warp of four channels with its taps


@dataclass
class Matches:
    """The matches of P pairs of views, and the consistency loss along them.

        L(z) = ¼ Σ_ab Σ_p ω_ab(p) ‖z_a(p) − Σ_q b(q − x_ab(p)) z_b(q)‖²,   ω_ab(p) = v_ab(p) / Σ_c v_ac(p)

    So z − ∇L takes views that all match exactly, pixel by pixel, to within 1/(N − 1) of their mean.

    views: N.  pairs [P, 2].  index, weight [P, h w, 4]: the pixels q of b that each p reads, flat, and their bilinear
    weights.  share [P, h w]: v.
    """

    views: int
    pairs: Tensor
    index: Tensor
    weight: Tensor
    share: Tensor

    def __post_init__(self) -> None:
        total = self.share.new_zeros(self.views, self.share.shape[1]).index_add_(0, self.pairs[:, 0], self.share)
        self.omega = self.share / total[self.pairs[:, 0]].clamp_min(torch.finfo(self.share.dtype).tiny)

    def to(self, device: torch.device) -> "Matches":
        return Matches(self.views, *(part.to(device) for part in (self.pairs, self.index, self.weight, self.share)))

    def of(self, view: int, others: list[int]) -> "Matches":
        """The matches between a view and some others."""
        kept = torch.tensor([view in pair and sum(pair) - view in others for pair in self.pairs.tolist()])
        return Matches(self.views, *(part[kept] for part in (self.pairs, self.index, self.weight, self.share)))

    def in_turn(self) -> Iterator[tuple[int, list[int]]]:
        """Each view with those before it: the first, then always the one of which those before show most."""
        shown = torch.zeros(self.views, self.views)
        shown[self.pairs[:, 0].cpu(), self.pairs[:, 1].cpu()] = self.share.sum(1).cpu().float()
        before, left = [], list(range(self.views))
        while left:
            view = max(left, key=lambda v: float(shown[v, before].sum()))
            yield view, list(before)
            before.append(view)
            left.remove(view)

    def loss(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """L, divided by the number of values in z, and ∇L [N, C, h, w] (of the undivided loss)."""
        flat, (a, b) = z.flatten(2), self.pairs.T
        weight = self.weight.flatten(1).to(z)[:, None]
        index = self.index.flatten(1)[:, None].expand(-1, z.shape[1], -1)
        read = (flat[b].gather(2, index) * weight).unflatten(2, (-1, 4)).sum(-1)
        misses = flat[a] - read
        pulls = self.omega.to(z)[:, None] * misses
        given_back = torch.zeros_like(read).scatter_add_(2, index, pulls.repeat_interleave(4, 2) * weight)
        gradient = torch.zeros_like(flat).index_add_(0, a, pulls / 2).index_add_(0, b, given_back / -2)
        return (pulls * misses).sum() / (4 * z.numel()), gradient.view_as(z)


def match_views(
    cameras: Cameras, depths: Tensor, pairs: Tensor, size: tuple[int, int], unit: int, depth_tolerance: float = 0.02
) -> Matches:
    """The matches of `pairs` [P, 2] of views, by their `depths` [N, H, W], distances along the rays.

    `size` = (h, w) of the latents, each `unit` pixels a side. Pixels without a surface, or whose surface is hidden from
    the other view by `reproject` with `depth_tolerance`, match nothing.
    """
    place, share = (each.flatten(1, 2) for each in places_seen(cameras, depths, pairs, size, unit, depth_tolerance))
    return Matches(len(depths), pairs.to(share.device), *bilinear_taps(place, size), share)


def places_seen(
    cameras: Cameras, depths: Tensor, pairs: Tensor, size: tuple[int, int], unit: int, depth_tolerance: float
) -> tuple[Tensor, Tensor]:
    """x_ab [P, h, w, 2] and v_ab [P, h, w] of `pairs` [P, 2] of views; the other arguments as for `match_views`."""
    height, width = depths.shape[1:]
    centres = pixel_centres(width, height, depths.device).reshape(height, width, 2)
    flow, share = depths.new_zeros(len(pairs), *size, 2), depths.new_zeros(len(pairs), *size)
    for k, (a, b) in enumerate(pairs.tolist()):
        pixels, seen = reproject(depths, cameras, a, b, depth_tolerance)
        flow[k], share[k] = to_latent(torch.where(seen[..., None], pixels - centres, 0), seen, size, unit)
    return pixel_grid(*size).to(flow) + flow, share


def bilinear_taps(place: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The four pixels [..., 4] around `place` [..., 2] = (x, y), as flat indices, and their bilinear weights.

    Places outside a picture of `size` = (h, w) are moved to its border.
    """
    last = place.new_tensor([size[1] - 1, size[0] - 1])
    place = place.clamp_min(0).minimum(last)
    low = place.floor()
    x, y = (place - low).unbind(-1)
    x0, y0 = low.long().unbind(-1)
    x1, y1 = (x0 + 1).clamp_max(size[1] - 1), (y0 + 1).clamp_max(size[0] - 1)
    index = torch.stack([y0 * size[1] + x0, y0 * size[1] + x1, y1 * size[1] + x0, y1 * size[1] + x1], -1)
    return index, torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], -1)


def check_matches(source: SceneSource, views: int, nearest: int, key: str, remedy: str) -> None:
    """Raise InputError, naming `key`, if matches of `views` views with `nearest` views each do not fit in memory."""
    height, width = source.prior.latent_shape(*source.size)[1:]
    pairs = views * nearest
    given = f"{key}: the matches of {pairs} pairs of views of {height}x{width} latents"
    check_fits(BYTES * pairs * height * width, given, remedy, source.prior.device)


def matches_of(edit: SceneEdit, rows: Tensor, views: Rendered, nearest: int | None = None) -> Matches:
    """The matches of the views `rows`, each with its `nearest` views (None: all), by the depth of their renders."""
    cameras = edit.cameras[rows].to(views.depth.device)
    pairs = view_pairs(cameras, neighbours=nearest or len(rows), long_neighbours=0)["short"]
    size, unit = tuple(edit.source.z.shape[2:]), edit.prior.codec.downscale
    return match_views(cameras, surface_depth(views), pairs, size, unit).to(edit.prior.device)
