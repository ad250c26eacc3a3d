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
from typing import Any

import torch
from torch import Tensor

from custom_kernels import native
from custom_kernels.libraries import GSPLAT
from custom_kernels.splats_reference import (
    BLUR,
    C0,
    MAX_DEGREE,
    NEAREST,
    Image,
    Splats,
    View,
    harmonics,
    render_reference,
    rotation_matrices,
)
from custom_kernels.trials import obstacle, require, runs

__all__ = ["C0", "Image", "Splats", "View", "harmonics", "render", "rotation_matrices"]

BACKENDS = ("auto", "reference", "native", "gsplat")


def render(
    splats: Splats, view: View, *, degree: int, antialiased: bool = True, depth: bool = False, backend: str = "auto"
) -> Image:
    """Render one view, differentiably in the splats (once); harmonics up to `degree` are used.

    Splats that are not finite are not seen. `auto` is gsplat on CUDA if it runs there, native if possible, else the
    reference. Raises ValueError for wrong shapes, RuntimeError if a backend chosen by name cannot run, and where the
    splats are so many and so large that they reach more than 2²⁸ tiles.
    """
    _check(splats, degree)
    backend = choose_backend(backend, splats, view)
    if backend == "native":
        rgb, light, deep = _Native.apply(*splats, view, degree, antialiased, depth)
        return Image(rgb, light, deep if depth else None)
    if backend == "gsplat":
        return render_gsplat(splats, view, degree, antialiased, depth)
    return render_reference(splats, view, degree=degree, antialiased=antialiased, depth=depth)


def choose_backend(backend: str, splats: Splats, view: View) -> str:
    """The backend that `render` uses: `auto` resolved, a named one checked (RuntimeError if it cannot run)."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    device, plain = splats.means.device, all(x.dtype == torch.float32 for x in splats)
    if backend == "auto":
        if device.type == "cuda" and plain and not view.kind:
            return "gsplat" if runs(GSPLAT) else "reference"
        return "native" if device.type == "cpu" and plain and native.library() is not None else "reference"
    check_backend(backend, *splats)
    if backend == "gsplat" and view.kind:
        raise RuntimeError("gsplat renders pinhole cameras, and this one has a lens")
    return backend


def check_backend(backend: str, *tensors: Tensor) -> None:
    """Raise RuntimeError if a backend chosen by name cannot run on tensors like these."""
    if backend == "gsplat":
        require(GSPLAT, *tensors)
    if backend == "native":
        native.require(*tensors)


def gsplat_obstacle() -> str | None:
    """Why gsplat does not render on this machine's GPU, or None; tried at the first call."""
    return obstacle(GSPLAT)


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


def render_gsplat(splats: Splats, view: View, degree: int, antialiased: bool, depth: bool) -> Image:
    """`render` by gsplat: float32 on CUDA, no lens."""
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
