"""Multi-view consistency: whether two views show the same colour at the same surface point.

View a is reprojected into view b by depth; where both see the surface point, the colours should agree. Symbols: a, b
view indices; P pairs; depth is the *distance along the ray* in world units (`inf`, NaN or ≤ 0 without a surface).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.cameras import Cameras

FAR = 1e6  # depth without a surface; finite, because inf times a bilinear weight of zero is NaN


def warped_error(
    images: Tensor,
    depths: Tensor,
    cameras: Cameras,
    masks: Tensor | None = None,
    pairs: dict[str, Tensor] | None = None,
    depth_tolerance: float = 0.02,
) -> dict[str, float | int | None]:
    """Masked RMSE of view a against view b, sampled at a's surface points, pooled over all pairs of a range.

        E = √( Σ_ab Σ_p w_a(p) ‖I_a(p) − I_b(π_b(X_a(p)))‖² / 3  /  Σ_ab Σ_p w_a(p) ),   X_a = o_a + depth_a d_a

    images `[B, H, W, 3]` in [0, 1]; depths `[B, H, W]`; masks `[B, H, W]` bool, or float weights of a's pixels (zero:
    ignored in both views), e.g. the object's mask; pairs: name → `[P, 2]` long, default `view_pairs(cameras)`;
    depth_tolerance: see `warp_view`. Returns for each range its RMSE (None if no pixel is seen twice),
    `<range>_pixels` and `<range>_pairs`.
    """
    if images.shape[:-1] != depths.shape or len(cameras) != len(images):
        raise ValueError(
            f"images {tuple(images.shape)}, depths {tuple(depths.shape)} and {len(cameras)} cameras disagree"
        )
    weights = torch.ones_like(depths) if masks is None else masks.to(depths)
    report: dict[str, float | int | None] = {}
    for name, chosen in (view_pairs(cameras) if pairs is None else pairs).items():
        total = torch.zeros(2, dtype=torch.float64, device=images.device)
        pixels = 0
        for a, b in chosen.tolist():
            warped, seen = warp_view(images, depths, cameras, a, b, weights=weights, depth_tolerance=depth_tolerance)
            weight = weights[a] * seen
            squared = (images[a] - warped).square().mean(-1) * weight
            total += torch.stack([squared.sum(dtype=torch.float64), weight.sum(dtype=torch.float64)])
            pixels += int((weight > 0).sum())
        report[name] = float((total[0] / total[1]).sqrt()) if pixels else None
        report |= {f"{name}_pixels": pixels, f"{name}_pairs": len(chosen)}
    return report


def warp_view(
    images: Tensor,
    depths: Tensor,
    cameras: Cameras,
    a: int,
    b: int,
    *,
    weights: Tensor | None = None,
    depth_tolerance: float = 0.02,
) -> tuple[Tensor, Tensor]:
    """View b resampled onto the pixels of view a through a's depth → (warped `[H, W, 3]`, seen `[H, W]` bool).

    A pixel is seen if it has a surface in a, lands inside b, and b's depth there (bilinear, like the colour) agrees
    with the distance from b to the point within `depth_tolerance` (relative). Otherwise the point is hidden in b, or
    the sample lies across an edge.
    """
    pixels, seen = reproject(depths, cameras, a, b, depth_tolerance)
    usable = torch.ones_like(depths[b]) if weights is None else (weights[b] > 0).to(depths)
    sampled = sample_pixels(torch.cat([images[b], usable[..., None]], -1), pixels)
    return sampled[..., :3], seen & (sampled[..., 3] > 0.999)


def reproject(depths: Tensor, cameras: Cameras, a: int, b: int, depth_tolerance: float = 0.02) -> tuple[Tensor, Tensor]:
    """Where view b shows the surface points of view a's pixels → (pixels of b `[H, W, 2]`, seen `[H, W]` bool).

    Pixels are (u, v), the first centre at (0.5, 0.5); `seen` as in `warp_view`.
    """
    height, width = depths.shape[1:]
    rays_o, rays_d = cameras.image_rays(a)
    distance = depths[a].reshape(-1)
    surface = _has_surface(distance)
    points = rays_o + rays_d * torch.where(surface, distance, 1.0)[:, None]
    pixels, axial = cameras.project(points, b)
    size = pixels.new_tensor([width, height])
    inside = (axial > 0) & (pixels >= 0.5).all(-1) & (pixels <= size - 0.5).all(-1)
    pixels = pixels.reshape(height, width, 2)
    depth_b = sample_pixels(torch.where(_has_surface(depths[b]), depths[b], FAR)[..., None], pixels).reshape(-1)
    reach = (points - cameras.positions[b]).norm(dim=-1)
    agrees = (reach - depth_b).abs() <= depth_tolerance * reach
    return pixels, (surface & inside & agrees).reshape(height, width)


def view_pairs(
    cameras: Cameras, neighbours: int = 2, long_angle_deg: float = 45.0, long_neighbours: int = 2
) -> dict[str, Tensor]:
    """Pairs (a, b), `[P, 2]` long, by the angle between viewing axes: `short` with the smallest angles, `long` with
    angles nearest to `long_angle_deg`; no pair is in both.

    Deterministic: angles are rounded to 0.01°, ties go to the nearer camera, then to the lower index.
    """
    angle = _view_angles_deg(cameras)
    gap = (cameras.positions[:, None] - cameras.positions[None]).norm(dim=-1).cpu()
    own = torch.eye(len(cameras), dtype=torch.bool)
    short = _nearest(angle, gap, own, neighbours)
    taken = own.clone()
    taken[short[:, 0], short[:, 1]] = True
    return {"short": short, "long": _nearest((angle - long_angle_deg).abs(), gap, taken, long_neighbours)}


def _nearest(cost: Tensor, gap: Tensor, taken: Tensor, count: int) -> Tensor:
    """For each row, its `count` columns of least cost that are not taken → `[P, 2]`."""
    pairs = []
    for a in range(len(cost)):
        free = [b for b in range(len(cost)) if not taken[a, b]]
        free.sort(key=lambda b, a=a: (round(float(cost[a, b]), 2), round(float(gap[a, b]), 4), b))
        pairs += [(a, b) for b in free[:count]]
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


def _view_angles_deg(cameras: Cameras) -> Tensor:
    axis = -cameras.camera_to_world[:, :, 2].double().cpu()
    axis = axis / axis.norm(dim=-1, keepdim=True)
    return torch.rad2deg(torch.arccos((axis @ axis.T).clamp(-1.0, 1.0)))


def _has_surface(depth: Tensor) -> Tensor:
    return torch.isfinite(depth) & (depth > 0)


def sample_pixels(values: Tensor, pixels: Tensor) -> Tensor:
    """Bilinear `values` `[H, W, C]` at `pixels` `[H, W, 2]` (first centre at 0.5, 0.5); outside, the border value."""
    size = pixels.new_tensor([values.shape[1], values.shape[0]])
    grid = (2.0 * pixels / size - 1.0).nan_to_num(-2.0)[None]
    stack = values.movedim(-1, 0)[None]
    sampled = F.grid_sample(stack, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[0].movedim(0, -1)
