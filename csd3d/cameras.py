"""A batch of posed cameras: rays, projection, lens distortion, orbits.

Symbols and frames, once for the module:
    world    right-handed, z up.
    camera   OpenGL: x right, y up, looking along -z. `camera_to_world` [B, 3, 4] = [R | o], R a rotation.
    pixels   (u, v), u right, v down; the first pixel's centre is (0.5, 0.5), the picture spans [0, W] x [0, H].
    (x, y)   normalised picture coordinates with y DOWN, as in OpenCV: x = (u - cx) / fx, y = (v - cy) / fy.
    k        lens coefficients [..., 6] = (k1, k2, k3, k4, p1, p2), or [..., 9] with (q1, q2, q3) behind them.
             OPENCV           d = 1 + k1 r^2 + k2 r^4 + k3 r^6 + k4 r^8, r^2 = x^2 + y^2 of the undistorted point,
                              x_d = x d + 2 p1 x y + p2 (r^2 + 2 x^2),  y_d = y d + p1 (r^2 + 2 y^2) + 2 p2 x y
             OPENCV_FISHEYE   a_d = a (1 + k1 a^2 + k2 a^4 + k3 a^6 + k4 a^8), a the angle off the viewing axis
             FULL_OPENCV      as OPENCV with d / (1 + q1 r^2 + q2 r^4 + q3 r^6); OpenCV calls q1..q3 k4..k6
             (OpenCV's calibration manual; k4 of OPENCV is nerfstudio's polynomial one, not OpenCV's rational one.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from csd3d.waits import sent

NEWTON_STEPS = 25  # mild lenses need 3; the rest is for steps that had to be halved
OPENGL = (1.0, -1.0, -1.0)  # OpenCV's camera axes (y down, z forward) to OpenGL's
Angle = TypeVar("Angle", float, Tensor)


@dataclass(frozen=True)
class Cameras:
    """B cameras of one picture size; frames, units and symbols as the module's docstring says."""

    camera_to_world: Tensor  # [B, 3, 4]
    fx: Tensor  # [B] pixels, as are the next three
    fy: Tensor
    cx: Tensor
    cy: Tensor
    width: int
    height: int
    distortion: Tensor | None = None  # [B, 6] (k1, k2, k3, k4, p1, p2), or [B, 9] with (q1, q2, q3)
    fisheye: bool | Tensor = False  # or [B] bool, where lenses of both kinds are in one batch

    def __post_init__(self):
        count = len(self.fx)
        if self.camera_to_world.shape != (count, 3, 4):
            raise ValueError(f"camera_to_world is {tuple(self.camera_to_world.shape)}; expected ({count}, 3, 4)")
        if self.distortion is not None and self.distortion.shape not in ((count, 6), (count, 9)):
            raise ValueError(f"distortion is {tuple(self.distortion.shape)}; expected ({count}, 6) or ({count}, 9)")

    def __len__(self) -> int:
        return len(self.fx)

    def __getitem__(self, index: int | slice | Tensor) -> "Cameras":
        """Some of the cameras; an int gives a batch of one."""
        if isinstance(index, int):
            index = [range(len(self))[index]]  # range() raises IndexError and resolves negatives
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> "Cameras":
        return self._map(lambda tensor: sent(tensor, torch.device(device)))

    def _map(self, function) -> "Cameras":
        names = ("camera_to_world", "fx", "fy", "cx", "cy", "distortion", "fisheye")
        values = {name: getattr(self, name) for name in names}
        return replace(self, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor)})

    def resized(self, width: int, height: int) -> "Cameras":
        """The same views on another pixel raster: intrinsics scale with it, lens coefficients don't depend on it."""
        sx, sy = width / self.width, height / self.height
        scaled = {"fx": self.fx * sx, "cx": self.cx * sx, "fy": self.fy * sy, "cy": self.cy * sy}
        return replace(self, **scaled, width=width, height=height)

    def with_longer_side(self, side: int) -> "Cameras":
        """The same cameras with pictures whose longer side has `side` pixels."""
        longer = max(self.width, self.height)
        return self.resized(max(1, round(self.width * side / longer)), max(1, round(self.height * side / longer)))

    @property
    def positions(self) -> Tensor:
        """[B, 3] world units."""
        return self.camera_to_world[:, :, 3]

    def rays(self, camera_indices: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Rays through pixels, lens undone: camera_indices [R], pixels [R, 2] -> rays_o [R, 3], unit rays_d [R, 3]."""
        i = camera_indices
        offset = pixels - torch.stack((self.cx[i], self.cy[i]), dim=-1)
        xy = offset / torch.stack((self.fx[i], self.fy[i]), dim=-1)
        k = None if self.distortion is None else self.distortion[i]
        fisheye = self.fisheye[i, None] if isinstance(self.fisheye, Tensor) else self.fisheye
        local = _by_lens(fisheye, _fisheye_directions, _perspective_directions, xy, k)
        pose = self.camera_to_world[i]
        rays_d = (pose[:, :, :3] * (local * local.new_tensor(OPENGL))[:, None, :]).sum(dim=-1)
        return pose[:, :, 3], torch.nn.functional.normalize(rays_d, dim=-1)

    def image_rays(self, index: int) -> tuple[Tensor, Tensor]:
        """Rays through the centres of all pixels of one camera, row-major: rays_o [H*W, 3], rays_d [H*W, 3]."""
        pixels = pixel_centres(self.width, self.height, self.fx.device)
        return self.rays(torch.full((len(pixels),), index, device=self.fx.device), pixels)

    def all_rays(self) -> tuple[Tensor, Tensor]:
        """`image_rays` of all cameras: rays_o [V, H, W, 3], rays_d [V, H, W, 3]."""
        parts = zip(*(self.image_rays(i) for i in range(len(self))), strict=True)
        rays_o, rays_d = (torch.stack(part).view(-1, self.height, self.width, 3) for part in parts)
        return rays_o, rays_d

    def project(self, points: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """World points [P, 3] to pixels [P, 2] and depth [P], the distance along the viewing axis; through the lens.

        A pixel means something only where depth > 0 (a fisheye also sees behind itself). Points so far off the axis
        that the lens polynomial has turned back are projected without a lens: finite, and outside the picture instead
        of folded into it.
        """
        pose = self.camera_to_world[index]
        local = (points - pose[:, 3]) @ pose[:, :3] * points.new_tensor(OPENGL)  # OpenCV axes
        k = None if self.distortion is None else self.distortion[index]
        fisheye = bool(self.fisheye[index]) if isinstance(self.fisheye, Tensor) else self.fisheye
        xy = _by_lens(fisheye, _fisheye_coordinates, _perspective_coordinates, local, k)
        u = self.fx[index] * xy[:, 0] + self.cx[index]
        v = self.fy[index] * xy[:, 1] + self.cy[index]
        return torch.stack((u, v), dim=-1), local[:, 2]


def pixel_centres(width: int, height: int, device: torch.device | str = "cpu") -> Tensor:
    """Centres (u, v) of a picture's pixels, row-major: [H*W, 2]."""
    v, u = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack((u, v), dim=-1).reshape(-1, 2) + 0.5


# --- lenses ---


def _by_lens(
    fisheye: bool | Tensor, one: Callable[..., Tensor], other: Callable[..., Tensor], x: Tensor, k: Tensor | None
) -> Tensor:
    """one(x, k) for fisheye lenses, other(x, k) for others; a mask [R, 1] chooses by row."""
    if isinstance(fisheye, Tensor):
        return torch.where(fisheye, one(x, k), other(x, k))
    return (one if fisheye else other)(x, k)


def _perspective_directions(xy_d: Tensor, k: Tensor | None) -> Tensor:
    xy = xy_d if k is None else undistort(xy_d, k)
    return torch.cat((xy, torch.ones_like(xy[:, :1])), dim=-1)


def _perspective_coordinates(local: Tensor, k: Tensor | None) -> Tensor:
    depth = local[:, 2:]
    tiny = torch.full_like(depth, 1e-8)
    xy = local[:, :2] / torch.where(depth.abs() < tiny, torch.copysign(tiny, depth), depth)
    if k is None:
        return xy
    within = (xy * xy).sum(dim=-1, keepdim=True) < fold_radius(k) ** 2
    return torch.where(within, distort(xy, k), xy)


def _fisheye_directions(xy_d: Tensor, k: Tensor | None) -> Tensor:
    theta_d = xy_d.norm(dim=-1, keepdim=True)
    theta = theta_d if k is None else _fisheye_angle(theta_d, k)
    along = xy_d / theta_d.clamp_min(1e-12)
    return torch.cat((along * theta.sin(), theta.cos()), dim=-1)


def _fisheye_coordinates(local: Tensor, k: Tensor | None) -> Tensor:
    r = local[:, :2].norm(dim=-1, keepdim=True)
    theta = torch.atan2(r, local[:, 2:])
    if k is None:
        theta_d = theta
    else:
        theta_d = torch.where(theta < fold_radius(k), theta * _radial(theta * theta, _columns(k))[0], theta)
    return local[:, :2] / r.clamp_min(1e-12) * theta_d


def _radial(u: Tensor, k: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The radial factor d(u) = 1 + k1 u + k2 u^2 + k3 u^3 + k4 u^4 and its derivative in u = r^2.

    With nine coefficients d(u) is divided by 1 + q1 u + q2 u^2 + q3 u^3.
    """
    k1, k2, k3, k4 = k[:4]
    d, d_u = 1 + u * (k1 + u * (k2 + u * (k3 + u * k4))), k1 + u * (2 * k2 + u * (3 * k3 + u * 4 * k4))
    if len(k) == 6:
        return d, d_u
    q1, q2, q3 = k[6:]
    below, below_u = 1 + u * (q1 + u * (q2 + u * q3)), q1 + u * (2 * q2 + u * 3 * q3)
    return d / below, (d_u - d * below_u / below) / below


def fold_radius(k: Tensor) -> float:
    """Radius (or fisheye angle) up to which r d(r^2) grows, so that lens k [6|9] is invertible; inf if it always is."""
    above, below = np.poly1d([*k[:4].flip(0).tolist(), 1.0]), np.poly1d([*k[6:].flip(0).tolist(), 1.0])
    u = np.poly1d([1.0, 0.0])  # r^2; with d = above / below, the numerator of d/dr [r d(r^2)] is
    slope = (above + 2 * u * above.deriv()) * below - 2 * u * above * below.deriv()
    roots = np.concatenate((slope.roots, below.roots))
    positive = roots.real[(np.abs(roots.imag) < 1e-9) & (roots.real > 0)]
    return math.sqrt(positive.min()) if len(positive) else math.inf


def _columns(tensor: Tensor) -> tuple[Tensor, ...]:
    """The last dimension taken apart, each part contiguous: arithmetic on strided ones takes twice as long."""
    return tensor.movedim(-1, 0).contiguous().unbind()


def distort(xy: Tensor, k: Tensor) -> Tensor:
    """The OPENCV lens: undistorted [..., 2] -> distorted [..., 2], coefficients k [..., 6] (module docstring)."""
    return torch.stack(_distort(*_columns(xy), _columns(k)), dim=-1)


def _distort(x: Tensor, y: Tensor, k: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    p1, p2 = k[4:6]
    xx, yy, xy2 = x * x, y * y, 2 * x * y
    u = xx + yy
    d, _ = _radial(u, k)
    return x * d + p1 * xy2 + p2 * (u + 2 * xx), y * d + p1 * (u + 2 * yy) + p2 * xy2


def _newton_step(x: Tensor, y: Tensor, residual: tuple[Tensor, Tensor], k: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """J^-1 residual, J = ((a, b), (b, c)) the Jacobian of `distort` at (x, y); where J is singular, the residual."""
    p1, p2 = k[4:6]
    d, d_u = _radial(x * x + y * y, k)
    a = d + 2 * x * x * d_u + 2 * p1 * y + 6 * p2 * x
    b = 2 * (x * y * d_u + p1 * x + p2 * y)
    c = d + 2 * y * y * d_u + 6 * p1 * y + 2 * p2 * x
    determinant = a * c - b * b
    singular = determinant.abs() < 1e-6
    inverse = torch.where(singular, 1.0, 1 / determinant)
    dx, dy = (c * residual[0] - b * residual[1]) * inverse, (a * residual[1] - b * residual[0]) * inverse
    return torch.where(singular, residual[0], dx), torch.where(singular, residual[1], dy)


def undistort(xy_d: Tensor, k: Tensor) -> Tensor:
    """Inverts `distort` by Newton's method, a step being halved wherever it would make that point worse.

    xy_d [..., 2], k [..., 6] -> [..., 2]. Where no inverse exists (past the fold) the nearest point found.
    """
    k = _columns(k)
    x_d, y_d = x, y = _columns(xy_d)
    rx, ry = (wanted - got for wanted, got in zip((x_d, y_d), _distort(x, y, k), strict=True))
    length = torch.ones_like(x)
    for _ in range(NEWTON_STEPS):
        if _negligible(rx) and _negligible(ry):
            break
        dx, dy = _newton_step(x, y, (rx, ry), k)
        x_new, y_new = x + length * dx, y + length * dy
        x_got, y_got = _distort(x_new, y_new, k)
        rx_new, ry_new = x_d - x_got, y_d - y_got
        better = rx_new * rx_new + ry_new * ry_new < rx * rx + ry * ry
        x, y = torch.where(better, x_new, x), torch.where(better, y_new, y)
        rx, ry = torch.where(better, rx_new, rx), torch.where(better, ry_new, ry)
        length = torch.where(better, 1.0, length / 2)
    return torch.stack((x, y), dim=-1)


def _negligible(value: Tensor) -> bool:
    return value.numel() == 0 or bool(value.abs().max() <= 4 * torch.finfo(value.dtype).eps)


def _fisheye_angle(theta_d: Tensor, k: Tensor) -> Tensor:
    """Inverts theta_d = theta d(theta^2) on [0, pi] by Newton's method; [..., 1] radians in and out."""
    theta = theta_d.clamp(max=math.pi)
    k = tuple(part[..., None] for part in _columns(k))
    for _ in range(NEWTON_STEPS):
        d, d_u = _radial(theta * theta, k)
        slope = d + 2 * theta * theta * d_u
        step = (theta_d - theta * d) / slope.clamp_min(0.1)
        theta = (theta + step).clamp(0, math.pi)
        if _negligible(step):
            break
    return theta


# --- poses ---


def look_at(position: Tensor, target: Tensor) -> Tensor:
    """Poses at `position` [B, 3] looking at `target` [3] or [B, 3], world z up in the picture: [B, 3, 4].

    Looking straight up or down, where z gives no up, the picture's up is the world's y.
    Raises ValueError where target and position are the same.
    """
    back = position - target
    if (back.norm(dim=-1) < 1e-12).any():
        raise ValueError("look_at: target and position are the same point")
    back = torch.nn.functional.normalize(back, dim=-1)
    z, y = back.new_tensor((0.0, 0.0, 1.0)).expand_as(back), back.new_tensor((0.0, 1.0, 0.0)).expand_as(back)
    up = torch.where(back[:, 2:].abs() > 1 - 1e-6, y, z)
    right = torch.nn.functional.normalize(torch.linalg.cross(up, back), dim=-1)
    return torch.stack((right, torch.linalg.cross(back, right), back, position), dim=-1)


def on_sphere(azimuth_rad: Tensor, elevation_rad: float | Tensor) -> Tensor:
    """Unit vectors [..., 3] (cos e cos a, cos e sin a, sin e) at azimuths a [...] and elevations e [...] or e, z up."""
    a, e = azimuth_rad, elevation_rad
    flat, height = (e.cos(), e.sin()) if isinstance(e, Tensor) else (math.cos(e), torch.full_like(a, math.sin(e)))
    return torch.stack((flat * a.cos(), flat * a.sin(), height), dim=-1)


def wrap_deg(angle_deg: Angle) -> Angle:
    """The same angle in [−180, 180)."""
    return (angle_deg + 180) % 360 - 180


def side_seen(azimuth_deg: float, front_deg: float = 45.0, back_deg: float = 45.0) -> str:
    """ "front", "left", "right" or "back": the side of an object that a camera at an azimuth from its front sees.

    Front and back reach `front_deg` and `back_deg` to either side, limits included. At azimuth 90 the camera sees the
    object's left side, and the object faces left in the picture.
    """
    turn = wrap_deg(azimuth_deg)
    if abs(turn) <= front_deg or abs(turn) >= 180 - back_deg:
        return "front" if abs(turn) <= front_deg else "back"
    return "left" if turn > 0 else "right"


def evenly(count: int, most: int) -> Tensor:
    """At most `most` of the numbers 0 to count − 1, evenly spread, the first and the last among them."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def orbit(
    count: int,
    radius: float,
    elevation_deg: float,
    fov_deg: float,
    width: int,
    height: int,
    azimuth_start_deg: float = 0.0,
    target: Sequence[float] = (0.0, 0.0, 0.0),
) -> Cameras:
    """`count` pinhole cameras evenly round `target`, looking at it; `fov_deg` is the vertical field of view.

    position = target + radius (cos e cos a, cos e sin a, sin e), a = azimuth_start + 360 i / count, e = elevation.
    """
    azimuth = torch.deg2rad(azimuth_start_deg + 360.0 * torch.arange(count) / count)
    unit = on_sphere(azimuth, math.radians(elevation_deg))
    centre = torch.as_tensor(target, dtype=torch.float32)
    focal = 0.5 * height / math.tan(math.radians(fov_deg) / 2)
    fill = [torch.full((count,), float(value)) for value in (focal, focal, width / 2, height / 2)]
    return Cameras(look_at(centre + radius * unit, centre), *fill, width=width, height=height)
