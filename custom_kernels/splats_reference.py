"""What splats and views are, and their rendering in plain torch; the equations are in splats.py."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR = 0.3  # b, pixels²
NEAREST = 0.01  # splats nearer than this are not seen, world units
LEAST_ALPHA, MOST_ALPHA, LEAST_LIGHT, LEAST_RATIO = 1 / 255, 0.99, 1e-4, 2.5e-5
MAX_DEGREE = 3
C0 = 0.28209479177387814
C1 = 0.4886025119029199
C2 = (1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396)
C3 = (
    *(-0.5900435899266435, 2.890611442640554, -0.4570457994644658, 0.3731763325901154),
    *(-0.4570457994644658, 1.445305721320277, -0.5900435899266435),
)


class Splats(NamedTuple):
    """N splats, as the files of 3DGS have them."""

    means: Tensor  # [N, 3]
    log_scales: Tensor  # [N, 3]
    quats: Tensor  # [N, 4] w x y z, of any length
    opacities: Tensor  # [N] logits
    dc: Tensor  # [N, 3] the constant harmonic's coefficients: rgb = 0.5 + C0 dc + …
    rest: Tensor  # [N, K − 1, 3] of the others


@dataclass(frozen=True)
class View:
    """One camera."""

    rotation: Tensor  # R [3, 3], world to camera
    position: Tensor  # o [3]
    focal: tuple[float, float]
    centre: tuple[float, float]
    width: int
    height: int
    lens: tuple[float, ...] = ()  # k1 k2 k3 k4 p1 p2 q1 q2 q3 of OpenCV's rational lens, k1 k2 k3 k4 of its fisheye
    fisheye: bool = False
    fold: float = float("inf")  # slope (fisheye: angle) from which the lens turns back; splats beyond are not seen
    limits: tuple[float, float, float, float] = (-1e3, 1e3, -1e3, 1e3)  # slopes x, y at which J is taken: low, high

    @property
    def kind(self) -> int:
        """0 pinhole, 1 rational lens, 2 fisheye."""
        return 2 if self.fisheye else 1 if any(self.lens) else 0

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The nine coefficients of the lens, zeros where there are none."""
        return (*self.lens, *([0.0] * (9 - len(self.lens))))


class Image(NamedTuple):
    """A picture without its background."""

    rgb: Tensor  # [H, W, 3]
    light: Tensor  # [H, W] what passes all splats: 1 − opacity
    depth: Tensor | None  # [H, W] Σ T α t, without gradient


def harmonics(directions: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics [..., K] of unit directions [..., 3], in the order and with the signs of 3DGS."""
    x, y, z = directions.unbind(-1)
    found = [torch.full_like(x, C0)]
    if degree > 0:
        found += [-C1 * y, C1 * z, -C1 * x]
    if degree > 1:
        xx, yy, zz = x * x, y * y, z * z
        found += [C2[0] * x * y, C2[1] * y * z, C2[2] * (2 * zz - xx - yy), C2[3] * x * z, C2[4] * (xx - yy)]
    if degree > 2:
        found += [C3[0] * y * (3 * xx - yy), C3[1] * x * y * z, C3[2] * y * (4 * zz - xx - yy)]
        found += [C3[3] * z * (2 * zz - 3 * xx - 3 * yy), C3[4] * x * (4 * zz - xx - yy)]
        found += [C3[5] * z * (xx - yy), C3[6] * x * (xx - 3 * yy)]
    return torch.stack(found, -1)


def rotation_matrices(quats: Tensor) -> Tensor:
    """R(q) [N, 3, 3] of quaternions [N, 4] (w, x, y, z) of any length."""
    w, x, y, z = F.normalize(quats, dim=1, eps=1e-12).unbind(1)
    rows = (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y))
    rows += (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x))
    rows += (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y))
    return torch.stack(rows, 1).view(-1, 3, 3)


class _Projected(NamedTuple):
    """Splats in the picture; those that are not `seen` have values without meaning."""

    middle: Tensor  # μ' [N, 2]
    conic: Tensor  # Σ'⁻¹ [N, 3]: a b c
    opacity: Tensor
    colour: Tensor
    distance: Tensor
    slope: Tensor  # [N, 2] change of the depth with the pixel
    key: Tensor  # by which they are sorted
    seen: Tensor


def render_reference(
    splats: Splats, view: View, *, degree: int, antialiased: bool = True, depth: bool = False
) -> Image:
    """`render` in plain torch."""
    parts = _project(splats, view, degree, antialiased) if len(splats.means) else None
    columns, rows = torch.arange(view.width), torch.arange(view.height)
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack((u, v), -1).to(splats.means) + 0.5
    light = pixels.new_ones(pixels.shape[:2])
    rgb, deep = pixels.new_zeros(*light.shape, 3), torch.zeros_like(light)
    for i in _in_order(parts):
        x, y = (pixels - parts.middle[i]).unbind(-1)
        a, b, c = parts.conic[i].unbind()
        power = -0.5 * (a * x * x + c * y * y) - b * x * y
        alpha = (parts.opacity[i] * power.exp()).clamp(max=MOST_ALPHA)
        weight = torch.where((alpha >= LEAST_ALPHA) & (light > LEAST_LIGHT), alpha, 0) * light
        rgb = rgb + weight[..., None] * parts.colour[i]
        slope = parts.slope[i].detach()
        deep = deep + weight.detach() * (parts.distance[i].detach() + slope[0] * x.detach() + slope[1] * y.detach())
        light = light - weight
    return Image(rgb, light, deep if depth else None)


def _in_order(parts: _Projected | None) -> list[int]:
    """The seen splats by rising depth; None: there are no splats, which torch.func cannot map over."""
    if parts is None:
        return []
    order = torch.where(parts.seen, parts.key, torch.inf).sort(stable=True).indices
    return order[: int(parts.seen.sum())].tolist()


def _project(splats: Splats, view: View, degree: int, antialiased: bool) -> _Projected:
    rotation, position = view.rotation.to(splats.means), view.position.to(splats.means)
    offset = splats.means - position
    distance = offset.norm(dim=1)
    p = offset @ rotation.T
    front = (distance if view.fisheye else p[:, 2]) > NEAREST
    p = torch.where(front[:, None], p, p.new_tensor((0.0, 0.0, 1.0)))
    low, high = (torch.tensor(view.limits[i::2]).to(p) for i in range(2))
    slope = p[:, :2] / p[:, 2:]
    clamped = p
    if not view.fisheye:
        held = torch.maximum(torch.minimum(slope, high), low)
        clamped = torch.cat((torch.where(held == slope, p[:, :2], held.detach() * p[:, 2:]), p[:, 2:]), 1)
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda x: _lens(x, view)))(clamped).to(p)  # [N, 2, 3]
    axes = rotation @ rotation_matrices(splats.quats) * splats.log_scales.exp()[:, None]
    m = jacobian @ axes
    bare = m @ m.mT
    covariance = bare + BLUR * torch.eye(2).to(bare)
    det = covariance[:, 0, 0] * covariance[:, 1, 1] - covariance[:, 0, 1] ** 2
    bare_det = torch.linalg.cross(m[:, 0], m[:, 1]).square().sum(1)
    opacity = splats.opacities.sigmoid()
    if antialiased:
        opacity = opacity * (bare_det / det).clamp_min(LEAST_RATIO).sqrt()
    conic = torch.stack((covariance[:, 1, 1], -covariance[:, 0, 1], covariance[:, 0, 0]), 1) / det[:, None]
    basis = harmonics(offset / distance.clamp_min(1e-12)[:, None], degree)
    shade = (basis[:, 1:, None] * splats.rest[:, : basis.shape[1] - 1]).sum(1)
    colour = (C0 * splats.dc + shade + 0.5).clamp_min(0)
    along = ((p / distance.clamp_min(1e-12)[:, None])[:, None] @ axes @ m.mT)[:, 0]  # covariance of t with u and v
    a, b, c = conic.unbind(1)
    slopes = torch.stack((along[:, 0] * a + along[:, 1] * b, along[:, 0] * b + along[:, 1] * c), 1)
    middle = _lens(p.T, view).T
    seen = front & (det > 1e-12) & (det < 1e18) & (opacity >= LEAST_ALPHA) & (middle.abs() < 1e6).all(1)
    seen &= torch.isfinite(colour).all(1)
    if view.kind == 1:
        seen &= slope.square().sum(1) < view.fold**2
    elif view.kind == 2:
        seen &= torch.atan2(p[:, :2].norm(dim=1), p[:, 2]) < view.fold
    return _Projected(middle, conic, opacity, colour, distance, slopes, distance if view.fisheye else p[:, 2], seen)


def _lens(p: Tensor, view: View) -> Tensor:
    """The pixel [2, ...] of camera-space points [3, ...]."""
    x, y, z = p.unbind(0)
    k = view.coefficients
    if view.kind == 2:
        r = (x * x + y * y + 1e-12).sqrt()
        theta = torch.atan2(r, z)
        u = theta * theta
        factor = theta * (1 + u * (k[0] + u * (k[1] + u * (k[2] + u * k[3])))) / r
        x, y = x * factor, y * factor
    else:
        a, b = x / z, y / z
        u = a * a + b * b
        d = 1 + u * (k[0] + u * (k[1] + u * (k[2] + u * k[3])))
        d = d / (1 + u * (k[6] + u * (k[7] + u * k[8])))
        x = a * d + 2 * k[4] * a * b + k[5] * (u + 2 * a * a)
        y = b * d + k[4] * (u + 2 * b * b) + 2 * k[5] * a * b
    return torch.stack((x * view.focal[0] + view.centre[0], y * view.focal[1] + view.centre[1]), 0)
