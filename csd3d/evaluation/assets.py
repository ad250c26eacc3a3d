"""Hold an asset of text to 3D against the nearest object that its prompt allows, in pictures and in space.

The nearest object is searched among `candidates` drawn ones, then by changing one thing at a time that the prompt
leaves open (a colour, a kind, the light), as long as that brings it nearer. What counts is the error of all pixels that
the asset or the true object covers, before the same backdrop: matter in the wrong place counts as much as a wrong
colour. An object's plate is no part of it, unless the prompt says so.
Symbols: V views of S² pixels, K objects, P points; lengths in world units, of which an object is about 1.6 high.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_fill_holes
from torch import Tensor

from csd3d.cameras import Cameras, evenly
from csd3d.evaluation.ground_truth import RightObjects, TrueViews
from csd3d.evaluation.normals import normal_consistency
from csd3d.export.mesh import visible_threshold
from csd3d.metrics import psnr_weighted, ssim_weighted
from csd3d.metrics.surface import chamfer, pattern_found, seen_as, shares_found
from csd3d.representations.base import OPAQUE

SEARCH_VIEWS, SEARCH_SIDE = 4, 64  # of the pictures by which the nearest object is searched
ROUNDS = 4  # most rounds of changing one thing
UNLIKE = 0.02  # share of an object's pixels in which two of its sides differ at least, or they are not told apart
STRAY = 0.1  # matter further than this from the true surface is not the object
MOST_POINTS = 20_000
CELLS = 56  # of the grid for volumes, along each side of the box

Figures = dict[str, float | None]


@dataclass(frozen=True)
class SeenAsset:
    """An asset from V cameras, before the plain colour `backdrop` [3].

    rgb [V,S,S,3] in [0, 1]; opacity and depth [V,S,S], depth along the ray; density(points [P,3]): σ [P] in `box` [6].
    """

    rgb: Tensor
    opacity: Tensor
    depth: Tensor
    cameras: Cameras
    backdrop: Tensor
    density: Callable[[Tensor], Tensor] | None = None
    box: Tensor | None = None

    def smaller(self) -> "SeenAsset":
        """A few of the views, in small."""
        kept = evenly(len(self.cameras) + 1, SEARCH_VIEWS + 1)[:-1]  # the views are a circle
        side = min(SEARCH_SIDE, self.cameras.height)
        rgb = F.interpolate(self.rgb[kept].permute(0, 3, 1, 2), (side, side), mode="area").permute(0, 2, 3, 1)
        opacity, depth = (
            F.interpolate(x[kept, None], (side, side), mode="area")[:, 0] for x in (self.opacity, self.depth)
        )
        return SeenAsset(rgb, opacity, depth, self.cameras[kept].resized(side, side), self.backdrop)


def object_psnr(asset: SeenAsset, true: TrueViews) -> float:
    """PSNR, dB, over the pixels that the asset or the true object covers, of all views together."""
    return psnr_weighted(asset.rgb, true.rgb, torch.maximum(true.mask, asset.opacity)).item()


def nearest(asset: SeenAsset, objects: RightObjects, candidates: int, seed: int) -> Any:
    """Return the object that the prompt allows and that is nearest in the asset's pictures."""
    small = asset.smaller()

    def best(things: Sequence[Any]) -> tuple[float, Any]:
        scores = [object_psnr(small, objects.views(thing, small.cameras, small.backdrop)) for thing in things]
        return max(zip(scores, things, strict=True), key=lambda pair: pair[0])

    score, found = best(objects.draw(candidates, seed))
    for _ in range(ROUNDS):
        near = objects.near(found)
        better, thing = best(near) if near else (score, found)
        if better <= score:
            break
        score, found = better, thing
    return found


def judge_asset(asset: SeenAsset, objects: RightObjects, candidates: int = 64, seed: int = 0) -> tuple[Figures, Any]:
    """Figures of an asset against the nearest right object, and that object; None for what cannot be measured.

    object_psnr, object_ssim: on the pixels that either covers; mask_iou: of the silhouettes; colours_found,
    pattern_found: shares of what is asked; `sides_right`; chamfer: between the surfaces that are seen; volume_iou;
    stray_matter: share of the seen surface that is further than `STRAY` from the true one; normal_consistency: of the
    asset with itself.
    """
    found = nearest(asset, objects, candidates, seed)
    true = objects.views(found, asset.cameras, asset.backdrop)
    figures = picture_figures(asset, true) | colour_figures(asset, true) | {"sides_right": sides_right(asset, true)}
    figures |= surface_figures(asset, true, lambda points: objects.distance(found, points))
    if asset.density is not None and asset.box is not None:
        figures["volume_iou"] = volume_iou(asset.density, asset.box, lambda points: objects.distance(found, points))
        figures["normal_consistency"] = normal_consistency(
            asset.depth, asset.opacity, asset.cameras, asset.density, asset.box.device
        )
    return figures, found


def picture_figures(asset: SeenAsset, true: TrueViews) -> Figures:
    """PSNR, SSIM and silhouettes."""
    both, either = torch.minimum(true.mask, asset.opacity), torch.maximum(true.mask, asset.opacity)
    return {
        "object_psnr": object_psnr(asset, true),
        "object_ssim": ssim_weighted(asset.rgb, true.rgb, either).item(),
        "mask_iou": (both.sum() / either.sum()).item(),
    }


def colour_figures(asset: SeenAsset, true: TrueViews) -> Figures:
    """Shares of the asked colours and of the pattern that are found where the true object is; None if not known."""
    if true.asked is None:
        return {}
    known = true.asked >= 0
    samples = true.rgb[known], true.asked[known]

    def colours(rgb: Tensor, there: Tensor) -> Tensor:
        label = torch.full_like(true.asked, -1)
        label[there] = seen_as(rgb[there], *samples)
        return label

    there = true.mask > 0.5
    true_label = colours(true.rgb, there)  # in the same way, so that edges are read alike
    label = colours(asset.rgb, there & (asset.opacity > OPAQUE))
    shares = shares_found(label, true_label)
    return {
        "colours_found": sum(shares.values()) / len(shares) if shares else None,
        "pattern_found": pattern_found(asset.rgb, asset.opacity > OPAQUE, true.rgb, true.asked),
    }


def sides_right(asset: SeenAsset, true: TrueViews) -> float | None:
    """Share of the views, of a circle, that show the side which belongs there: a front on every side is no object.

    A view is right if it is nearer to the true one from its camera than to those from a quarter, a half and three
    quarters further round, each time by the pixels in which these two differ in shape or parts; patterns and light are
    no sides. None if the object looks the same from all of them, its parts are not known, or the views are no
    multiple of four. Chance is no 0: a quarter to a half of the views of an asset that shows nothing are right.
    """
    if true.asked is None or len(true.asked) % 4:
        return None
    seen = torch.where(true.mask > 0.5, torch.where(true.asked == 1, 0, true.asked), -2)  # −2 is behind it, −1 unclear
    differs, wrong = (torch.zeros(len(seen), dtype=torch.bool) for _ in range(2))
    for quarters in (1, 2, 3):
        away = -(quarters * len(seen) // 4)
        other, rgb = seen.roll(away, 0), true.rgb.roll(away, 0)
        unlike = (seen != other) & (seen != -1) & (other != -1)
        told = unlike.sum((1, 2)) > UNLIKE * ((seen > -2) | (other > -2)).sum((1, 2))
        own, elsewhere = ((asset.rgb - x).square().sum(-1).mul(unlike).sum((1, 2)) for x in (true.rgb, rgb))
        differs |= told
        wrong |= told & ~(own < elsewhere)  # nor is what is no number
    return ((differs & ~wrong).sum() / differs.sum()).item() if differs.any() else None


def surface_figures(asset: SeenAsset, true: TrueViews, distance: Callable[[Tensor], Tensor]) -> Figures:
    """Distances of the surfaces that the cameras see; None if there is no surface."""
    points = seen_points(asset.cameras, torch.where(asset.opacity > OPAQUE, asset.depth, torch.inf))
    true_points = seen_points(asset.cameras, torch.where(true.mask > 0.5, true.depth, torch.inf))
    if not len(points) or not len(true_points):
        return {"chamfer": None, "stray_matter": None}
    off = distance(points).abs()
    return {"chamfer": chamfer(points, off, true_points), "stray_matter": (off > STRAY).float().mean().item()}


def stray_faces(centres: np.ndarray, distance: Callable[[Tensor], Tensor]) -> float:
    """Share of the faces of a mesh, 0 to 1, whose centres [F,3] are further than `STRAY` from the true surface.

    distance(points [P,3]): the signed distance [P] to that surface, world units.
    """
    points = torch.tensor(np.asarray(centres), dtype=torch.float32)
    return (distance(points).abs() > STRAY).float().mean().item()


def seen_points(cameras: Cameras, depth: Tensor) -> Tensor:
    """At most `MOST_POINTS` points [P,3] of the surfaces in depth maps [V,S,S], evenly picked."""
    rays_o, rays_d = cameras.all_rays()
    points = (rays_o + rays_d * depth[..., None])[depth.isfinite()]
    return points[evenly(len(points), MOST_POINTS)] if len(points) else points


def volume_iou(density: Callable[[Tensor], Tensor], box: Tensor, distance: Callable[[Tensor], Tensor]) -> float:
    """Volume that both fill over the volume that either fills, on a grid of the box; the asset's hollows are filled."""
    low, high = box[:3].cpu(), box[3:].cpu()
    axes = [torch.linspace(a, b, CELLS) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    points = torch.cartesian_prod(*axes)
    true = (distance(points) < 0).view(CELLS, CELLS, CELLS).numpy()
    with torch.no_grad():
        sigma = torch.cat([density(part.to(box.device)).reshape(-1).cpu() for part in points.split(1 << 16)])
    sigma = np.nan_to_num(sigma.view(CELLS, CELLS, CELLS).numpy(), posinf=1e9, neginf=0.0)
    threshold = visible_threshold(sigma, ((high - low).max() / (CELLS - 1)).item())
    filled = binary_fill_holes(sigma >= threshold) if threshold > 0 else np.zeros_like(true)
    return float((filled & true).sum() / max((filled | true).sum(), 1))
