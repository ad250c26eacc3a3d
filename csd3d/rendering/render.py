"""Rendering of rays: march, evaluate the field, composite, add the background.

A field is callable, (positions [S, 3], directions [S, 3]) -> rgb [S, 3], sigma [S], and has density(positions) ->
sigma [S], features; a background is callable, (directions [R, 3]) -> rgb [R, 3]. A field may return a third value, a
penalty of each sample [S], whose weighted sum along the ray is reported (`ShadedField`'s orientation).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csd3d.cameras import Cameras
from csd3d.fields import RadianceField
from csd3d.rendering.occupancy import OccupancyGrid, RenderConfig
from csd3d.rendering.shading import ShadedField
from custom_kernels import field as fields
from custom_kernels import rendering as kernels

Background = Callable[[Tensor], Tensor]
AT_ONCE = 2**21  # samples that the field is evaluated at together, without gradients: 2.5 GiB of torch's operations


@dataclass(frozen=True)
class Rendered:
    """The result of rendering; the leading shape is [R], or [H, W] for a whole picture.

    rgb [..., 3] over the background; depth [...] the expected distance along the ray, sum w t / sum w, world units, 0
    where nothing is hit; opacity [...] in [0, 1]; samples, how many were composited; distortion [...] or None; penalty
    [...] summed along the ray, or None, with no gradient to the weights.
    """

    rgb: Tensor
    depth: Tensor
    opacity: Tensor
    samples: int
    distortion: Tensor | None = None
    penalty: Tensor | None = None


def render_rays(
    field: nn.Module,
    background: Background,
    grid: OccupancyGrid,
    rays_o: Tensor,
    rays_d: Tensor,
    config: RenderConfig,
    *,
    jitter: Tensor | None = None,
    distortion: bool = False,
) -> Rendered:
    """Render rays [R, 3] (unit directions), differentiably where gradients are enabled.

    rgb = sum_k w_k rgb_k + (1 - sum_k w_k) background. jitter [R] in [0, 1) shifts the steps of each ray (training);
    None does not (evaluation). With gradients, samples that less than config.early_stop of the light reaches are
    dropped. Without, steps are config.finer times shorter, and colour is evaluated only where w_k > config.early_stop;
    where the compiled kernels trace a field's rays, those samples are dropped too: opacity is at most early_stop lower.
    distortion: also return each ray's distortion loss.
    """
    samples, rgbs, sigmas, *more = _evaluate(field, grid, rays_o, rays_d, jitter, config)
    out = kernels.composite(sigmas, rgbs, samples.t_starts, samples.t_ends, samples.packed_info, config.backend)
    rgb = out.rgb + (1 - out.opacity)[:, None] * background(rays_d)
    depth = out.depth / out.opacity.clamp(min=1e-6)
    spread = _distortion(grid, samples, out.weights) if distortion else None
    penalty = _along_rays(out.weights.detach() * more[0], samples) if more else None
    return Rendered(rgb, depth, out.opacity, len(samples.t_starts), spread, penalty)


def _evaluate(
    field: nn.Module, grid: OccupancyGrid, rays_o: Tensor, rays_d: Tensor, jitter: Tensor | None, config: RenderConfig
) -> tuple[kernels.Samples, Tensor, ...]:
    """The samples, their rgb [S, 3] and sigma [S], and a penalty [S] if the field has one and gradients are enabled."""
    training = torch.is_grad_enabled()
    finer = 1 if training else config.finer
    fused = _fused(field, config, rays_o, rays_d)
    if fused is None:
        samples = grid.march(rays_o, rays_d, jitter, finer)
        if not training:
            return samples, *_visible_colours(field, rays_o, rays_d, samples, config.early_stop)
        samples = _lit(field, rays_o, rays_d, samples, config.early_stop)
        return samples, *field(*_points(rays_o, rays_d, samples))
    plain = isinstance(field, RadianceField)
    samples, seen, encoded = grid.trace(fused, rays_o, rays_d, jitter, finer, config.early_stop, plain and training)
    if training:
        if plain:
            return samples, *fields.radiance(fused, encoded, rays_d, samples.ray_indices)
        return samples, *field(*_points(rays_o, rays_d, samples))
    rows = seen.nonzero()[:, 0]
    if plain:
        rgbs = fields.colour_rows(fused, encoded.out, rays_d, samples.ray_indices, rows)
    else:
        rgbs = _colours(field, *_points(rays_o, rays_d, samples), rows)
    return samples, rgbs, encoded.sigma


def _fused(field: nn.Module, config: RenderConfig, *rays: Tensor) -> fields.Field | None:
    """The radiance field whose density this field has, if the compiled kernels can trace its rays."""
    inner = field.field if isinstance(field, ShadedField) else field
    if config.backend not in ("auto", "native") or not isinstance(inner, RadianceField):
        return None
    return inner.fused(*rays)


def _along_rays(values: Tensor, samples: kernels.Samples) -> Tensor:
    """Sums [R] of the samples' values [S] along each ray."""
    return values.new_zeros(len(samples.packed_info)).index_add(0, samples.ray_indices, values)


def _points(rays_o: Tensor, rays_d: Tensor, samples: kernels.Samples) -> tuple[Tensor, Tensor]:
    """Midpoints and directions of the samples, [S, 3] each."""
    directions = rays_d[samples.ray_indices]
    return rays_o[samples.ray_indices] + directions * ((samples.t_starts + samples.t_ends)[:, None] / 2), directions


@torch.no_grad()
def _lit(field: nn.Module, rays_o: Tensor, rays_d: Tensor, samples: kernels.Samples, least: float) -> kernels.Samples:
    """Samples with transmittance >= `least`: a density without gradients costs little next to the passes it saves."""
    sigmas = field.density(_points(rays_o, rays_d, samples)[0])[0]
    light = kernels.transmittance(sigmas, samples.t_starts, samples.t_ends, samples.packed_info)
    return kernels.keep(samples, light >= least)


def _visible_colours(
    field: nn.Module, rays_o: Tensor, rays_d: Tensor, samples: kernels.Samples, least: float
) -> tuple[Tensor, Tensor]:
    positions, directions = _points(rays_o, rays_d, samples)
    several = len(positions) > AT_ONCE
    if several:  # keep no features: those of the few visible samples are computed again with their colour
        sigmas = torch.cat([field.density(part)[0] for part in positions.split(AT_ONCE)])
    else:
        sigmas, features = field.density(positions)
    light = kernels.transmittance(sigmas, samples.t_starts, samples.t_ends, samples.packed_info)
    weights = -light * torch.expm1(-sigmas * (samples.t_ends - samples.t_starts))
    rows = (weights > least).nonzero()[:, 0]
    if several or not isinstance(field, RadianceField):
        return _colours(field, positions, directions, rows), sigmas
    rgbs = torch.zeros_like(positions)
    rgbs[rows] = field.colour(features[rows], directions[rows]).to(rgbs.dtype)
    return rgbs, sigmas


def _colours(field: nn.Module, positions: Tensor, directions: Tensor, rows: Tensor) -> Tensor:
    """rgb [S, 3] of the samples `rows`, 0 elsewhere."""
    rgbs = torch.zeros_like(positions)
    for part in rows.split(AT_ONCE):
        rgbs[part] = field(positions[part], directions[part])[0].to(rgbs.dtype)
    return rgbs


@torch.no_grad()
def render_image(
    field: nn.Module,
    background: Background,
    grid: OccupancyGrid,
    cameras: Cameras,
    index: int,
    config: RenderConfig,
    chunk: int = 2**14,
) -> Rendered:
    """Render the picture of camera `index` without gradients, `chunk` rays at a time: Rendered with [H, W, ...]."""
    rays = zip(*(x.split(chunk) for x in cameras.image_rays(index)), strict=True)
    parts = [render_rays(field, background, grid, o, d, config) for o, d in rays]

    def whole(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts]).unflatten(0, (cameras.height, cameras.width))

    return Rendered(whole("rgb"), whole("depth"), whole("opacity"), sum(p.samples for p in parts))


def distortion_loss(weights: Tensor, s_starts: Tensor, s_ends: Tensor, packed_info: Tensor) -> Tensor:
    """Distortion of each ray, [R] (mip-NeRF 360, Barron et al. 2022, eq. 15), in O(S) by prefix sums (Sun et al. 2022).

    sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i^2 (s_end - s_start)_i,  m the midpoints of s, ascending along each ray.
    """
    middle = (s_starts + s_ends) / 2
    before = kernels.exclusive_sum(weights, packed_info)
    moment = kernels.exclusive_sum(weights * middle, packed_info)
    each = 2 * weights * (middle * before - moment) + weights**2 * (s_ends - s_starts) / 3
    rays = kernels.expand_rays(packed_info, len(weights))
    return weights.new_zeros(len(packed_info)).index_add(0, rays, each.to(weights.dtype))


def _distortion(grid: OccupancyGrid, samples: kernels.Samples, weights: Tensor) -> Tensor:
    """Distortion with s in [0, 1]: t over the box's diagonal; if unbounded, nerfstudio's t / 2 up to t = 1, then
    1 - 1 / (2 t)."""

    def scaled(t: Tensor) -> Tensor:
        if grid.unbounded:
            return torch.where(t < 1, t / 2, 1 - 0.5 / t)
        return t / (grid.steps.size * grid.config.steps)

    return distortion_loss(weights, scaled(samples.t_starts), scaled(samples.t_ends), samples.packed_info)
