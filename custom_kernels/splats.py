"""3D Gaussian splatting (Kerbl et al. 2023, arXiv 2308.04079) with interchangeable backends.

Symbols: N splats, H × W pixels, K harmonics. World and camera are right-handed; the camera looks along +z, y down
(OpenCV), p = R (x − o). Pixel centres are at half-integers.

    Σ' = J R Σ Rᵀ Jᵀ + b I,   Σ = R(q) S² R(q)ᵀ,  J the camera's Jacobian at the splat's middle, through the lens
    α(u) = min(0.99, o exp(−½ (u − μ')ᵀ Σ'⁻¹ (u − μ'))),   counted where α ≥ 1/255 and the light left T > 1e-4
    rgb = Σ_i T_i α_i c_i,   light = T_end,   T_i = Π_{j<i} (1 − α_j),   splats by rising depth
    o = sigmoid(logit) √(|Σ' − b I| / |Σ'|) if antialiased (Mip-Splatting, arXiv 2311.16493)

A splat far off the axis is stretched without limit by a pinhole, so J is taken where the middle's slope is inside
`View.limits`, as the original does. A lens bends a splat to first order only, which is exact for small ones. The depth
is Σ T α t / … without the division: t(u) is the distance of the Gaussian's densest point along the pixel's ray, to
first order; it has no gradient.

Backends: `reference` (torch; any device and floating type, a loop over splats), `native` (C++, float32 on the CPU; the
same bytes for any number of threads), `gsplat` (float32 on CUDA; no lens, its own limits, depth of the middles).
"""

import ctypes
import importlib.util
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_kernels import native

BACKENDS = ("auto", "reference", "native", "gsplat")
GSPLAT_INSTALL = 'pip install "csd3d[gsplat]"'
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


def render(
    splats: Splats, view: View, *, degree: int, antialiased: bool = True, depth: bool = False, backend: str = "auto"
) -> Image:
    """Render one view, differentiably in the splats (once); harmonics up to `degree` are used.

    Splats that are not finite are not seen. `auto` is gsplat on CUDA if it is installed, native if possible, else the
    reference. Raises ValueError for wrong shapes, RuntimeError if a backend chosen by name cannot run, and where the
    splats are so many and so large that they reach more than 2²⁸ tiles.
    """
    _check(splats, degree)
    backend = choose_backend(backend, splats, view)
    if backend == "native":
        rgb, light, deep = _Native.apply(*splats, view, degree, antialiased, depth)
        return Image(rgb, light, deep if depth else None)
    if backend == "gsplat":
        return _render_gsplat(splats, view, degree, antialiased, depth)
    return render_reference(splats, view, degree=degree, antialiased=antialiased, depth=depth)


def choose_backend(backend: str, splats: Splats, view: View) -> str:
    """The backend that `render` uses: `auto` resolved, a named one checked (RuntimeError if it cannot run)."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    device, plain = splats.means.device, all(x.dtype == torch.float32 for x in splats)
    cuda = None if device.type == "cuda" and plain and not view.kind else "float32 tensors on CUDA and no lens"
    if cuda is None and importlib.util.find_spec("gsplat") is None:
        cuda = f"gsplat: {GSPLAT_INSTALL}"
    if backend == "auto":
        native_runs = device.type == "cpu" and plain and native.library() is not None
        return "gsplat" if cuda is None else "native" if native_runs else "reference"
    if backend == "gsplat" and cuda is not None:
        if importlib.util.find_spec("gsplat") is None:
            cuda = f"gsplat: {GSPLAT_INSTALL}"
        raise RuntimeError(f"backend 'gsplat' needs {cuda}")
    if backend == "native":
        native.require_library()
        if device.type != "cpu" or not plain:
            raise RuntimeError(f"backend 'native' takes float32 tensors on the CPU, got {splats.means.dtype}, {device}")
    return backend


def _check(splats: Splats, degree: int) -> None:
    count = len(splats.means)
    shapes = [tuple(x.shape) for x in splats[:5]]
    stored = splats.rest.shape[1] if splats.rest.ndim == 3 else -1
    wanted = [(count, 3), (count, 3), (count, 4), (count,), (count, 3)]
    if shapes != wanted or splats.rest.shape != (count, stored, 3):
        raise ValueError(
            f"splats have shapes {shapes} and {tuple(splats.rest.shape)}; expected {wanted}, (N, K − 1, 3)"
        )
    if not 0 <= degree <= MAX_DEGREE or (degree + 1) ** 2 - 1 > stored:
        raise ValueError(f"harmonics of degree {degree} are asked for; the splats have {stored} besides the constant")


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


# ---- reference


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


# ---- native


class _View(ctypes.Structure):
    """Mirrors SplatView in cpu/splats.cpp."""

    _fields_ = (
        ("rotation", ctypes.c_float * 9),
        ("position", ctypes.c_float * 3),
        *((name, ctypes.c_float) for name in ("fx", "fy", "cx", "cy")),
        ("k", ctypes.c_float * 9),
        ("limits", ctypes.c_float * 4),
        *((name, ctypes.c_float) for name in ("fold", "nearest", "blur")),
        *((name, ctypes.c_int32) for name in ("width", "height", "lens", "antialiased", "degree", "stored")),
    )


class _Arrays(ctypes.Structure):
    """Mirrors SplatArrays in cpu/splats.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in Splats._fields)


def _native_view(view: View, degree: int, antialiased: bool, stored: int) -> _View:
    rotation, position = view.rotation.flatten().tolist(), view.position.tolist()
    limits, k = (ctypes.c_float * 4)(*view.limits), (ctypes.c_float * 9)(*view.coefficients)
    numbers = (*view.focal, *view.centre, k, limits, min(view.fold, 1e18), NEAREST, BLUR)
    sizes = (view.width, view.height, view.kind, int(antialiased), degree, stored)
    return _View((ctypes.c_float * 9)(*rotation), (ctypes.c_float * 3)(*position), *numbers, *sizes)


def _arrays(tensors: tuple[Tensor, ...]) -> _Arrays:
    return _Arrays(*(native.pointer(x) for x in tensors))


class _Picture:
    """Owns what the forward pass keeps for the backward pass."""

    def __init__(self, library: ctypes.CDLL, address: int) -> None:
        self.address = ctypes.c_void_p(address)
        self.free = library.splats_free
        self.free.restype, self.free.argtypes = None, [ctypes.c_void_p]

    def __del__(self) -> None:
        self.free(self.address)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, view, degree, antialiased, depth = arguments
        tensors = tuple(x.detach().contiguous() for x in tensors)
        library = native.require_library()
        rgb, light = torch.empty(view.height, view.width, 3), torch.empty(view.height, view.width)
        deep = torch.empty(light.shape if depth else 0)
        call = library.splats_forward
        call.restype = ctypes.c_void_p
        known = (
            ctypes.byref(_native_view(view, degree, antialiased, tensors[5].shape[1])),
            ctypes.byref(_arrays(tensors)),
        )
        count, threads = ctypes.c_int64(len(tensors[0])), ctypes.c_int(native.num_threads())
        outputs = native.pointer(rgb), native.pointer(deep if depth else None), native.pointer(light)
        address = call(*known, count, *outputs, threads)
        if not address:
            raise RuntimeError(
                f"{len(tensors[0])} splats reach more than 2^28 tiles; lower their number or their sizes"
            )
        ctx.picture = _Picture(library, address)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(deep)
        return rgb, light, deep

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_rgb: Tensor, g_light: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        gradients = tuple(torch.zeros_like(x) for x in tensors)
        call = native.require_library().splats_backward
        call.restype = None
        known = ctx.picture.address, ctypes.byref(_arrays(tensors)), ctypes.c_int64(len(tensors[0]))
        g_rgb, g_light = g_rgb.contiguous(), g_light.contiguous()
        out = ctypes.byref(_arrays(gradients)), ctypes.c_int(native.num_threads())
        call(*known, native.pointer(g_rgb), native.pointer(g_light), *out)
        return *gradients, None, None, None, None


# ---- gsplat


def _render_gsplat(splats: Splats, view: View, degree: int, antialiased: bool, depth: bool) -> Image:
    import gsplat

    means = splats.means
    camera = torch.eye(4, device=means.device)
    camera[:3, :3] = view.rotation
    camera[:3, 3] = -camera[:3, :3] @ view.position.to(means)
    intrinsics = means.new_tensor(((view.focal[0], 0, view.centre[0]), (0, view.focal[1], view.centre[1]), (0, 0, 1.0)))
    shape = splats.quats, splats.log_scales.exp(), splats.opacities.sigmoid()
    colours = torch.cat((splats.dc[:, None], splats.rest), 1)
    found, opacity, _ = gsplat.rasterization(
        means,
        *shape,
        colours,
        camera[None],
        intrinsics[None],
        view.width,
        view.height,
        near_plane=NEAREST,
        sh_degree=degree,
        render_mode="RGB+D" if depth else "RGB",
        rasterize_mode="antialiased" if antialiased else "classic",
    )
    return Image(found[0, ..., :3], 1 - opacity[0, ..., 0], found[0, ..., 3].detach() if depth else None)
