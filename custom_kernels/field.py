"""The radiance field of instant-ngp (arXiv 2201.05989, section 5.4) on the CPU: hash grid and both networks in C++.

Symbols: S samples, L levels, T entries of the hash grid with 2 features each. The density network takes the encoding to
the colour's features and the raw density; sigma = density_scale exp(raw + blob − 1) inside the box. The colour network
takes spherical harmonics of the direction and the features to rgb by a sigmoid. All layers but the last are followed
by ReLU and none has a bias. float32; bit-identical for any number of threads.

Every function is differentiable once, in the table and the weights; not in positions and directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from custom_kernels.field_native import (
    FEATURES,
    addresses,
    call,
    colour_structure,
    encoded_structure,
    structure,
)

_LANES = 16  # samples are padded to this many
_WIDEST = 256  # layer
_HARMONICS = 16


@dataclass(frozen=True)
class Field:
    """Sizes and parameters of a field.

    aabb [6] (min, max), world units; if `unbounded`, the box becomes [−1, 1]³ and space is contracted around it
    (Mip-NeRF 360). `levels` in use, from the coarsest. blob_scale and blob_radius (world units): Magic3D's bias
    scale (1 − r/radius). Weights [out, in], the raw density being the density network's first output.
    """

    offsets: Sequence[int]
    resolutions: Sequence[float]
    levels: int
    sh_degree: int
    unbounded: bool
    density_scale: float
    blob_scale: float
    blob_radius: float
    aabb: Tensor
    table: Tensor
    density_weights: tuple[Tensor, ...]
    colour_weights: tuple[Tensor, ...]

    @property
    def hidden(self) -> int:
        """Width of the hidden layers."""
        return len(self.density_weights[0])

    @property
    def geo_features(self) -> int:
        """Numbers that the density network passes to the colour network."""
        return len(self.density_weights[1]) - 1

    @property
    def out_width(self) -> int:
        """Width of the density network's output, padded."""
        return -(-len(self.density_weights[1]) // 16) * 16

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The table, then all weights."""
        return self.table, *self.density_weights, *self.colour_weights


class Encoded(NamedTuple):
    """What the density pass leaves; P is S rounded up to 16.

    unit [3, P] in the grid's coordinates, features [levels, P, 2], sigma [S], and out [S, width] of the density
    network: the colour's features, then the raw density, then padding.
    """

    unit: Tensor
    features: Tensor
    out: Tensor
    sigma: Tensor


def obstacle(field: Field, *inputs: Tensor) -> str | None:
    """Why these kernels cannot take this field and these inputs, or None."""
    tensors = (*inputs, field.aabb, *field.parameters)
    if any(x.device.type != "cpu" for x in tensors):
        return "tensors that are not on the CPU"
    if any(x.dtype != torch.float32 for x in tensors):
        return "tensors that are not float32"
    if any(x.requires_grad for x in inputs):
        return "positions or directions that need gradients"
    if field.table.shape[1] != FEATURES:
        return f"{field.table.shape[1]} features a level; they are compiled for {FEATURES}"
    encoded = len(field.resolutions) * FEATURES
    if field.hidden % 16 or max(encoded, field.hidden, _HARMONICS + field.out_width) > _WIDEST:
        return f"hidden layers of {field.hidden}; they take multiples of 16, and widths up to {_WIDEST}"
    return None


def density(field: Field, positions: Tensor) -> tuple[Tensor, Tensor]:
    """World positions [S, 3] -> sigma [S] per world unit, out [S, width] of the density network (see `Encoded`)."""
    encoded = encode(field, positions)
    return _Density.apply(field, encoded, field.table, *field.density_weights)


def colour(field: Field, features: Tensor, directions: Tensor) -> Tensor:
    """Features [S, geo_features] (columns adjacent) and unit directions [S, 3] -> rgb [S, 3] in [0, 1]."""
    return _Colour.apply(field, directions, None, features, *field.colour_weights)


def radiance(field: Field, encoded: Encoded, directions: Tensor, rays: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Samples encoded by `encode` and unit directions -> rgb [S, 3] in [0, 1], sigma [S].

    directions [S, 3], or [R, 3] with `rays` [S] int64, the direction of each sample.
    """
    return _Radiance.apply(field, encoded, directions, rays, *field.parameters)


@torch.no_grad()
def encode(field: Field, positions: Tensor) -> Encoded:
    """Encode world positions [S, 3] and evaluate the density network, without a graph."""
    encoded = new_encoded(field, len(positions))
    call("field_density", structure(field), positions.contiguous(), encoded_structure(encoded))
    return encoded


def new_encoded(field: Field, count: int) -> Encoded:
    """Room for `count` samples."""
    padded = -(-count // _LANES) * _LANES
    shapes = ((3, padded), (field.levels, padded, FEATURES), (count, field.out_width), (count,))
    return Encoded(*(torch.empty(shape) for shape in shapes))


# ---- autograd


class _Density(torch.autograd.Function):
    @staticmethod
    def forward(ctx, field: Field, encoded: Encoded, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.field = field
        ctx.save_for_backward(*encoded[:3], *parameters)
        return encoded.sigma, encoded.out

    @staticmethod
    @once_differentiable
    def backward(ctx, g_sigma: Tensor, g_out: Tensor) -> tuple[Tensor | None, ...]:
        encoded = Encoded(*ctx.saved_tensors[:3], g_sigma)
        return None, None, *_density_gradients(ctx.field, encoded, g_sigma, g_out, ctx.needs_input_grad[2])


class _Colour(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, field: Field, directions: Tensor, rays: Tensor | None, features: Tensor, *weights: Tensor
    ) -> Tensor:
        rgb = colour_rows(field, features, directions, rays)
        ctx.field = field
        ctx.save_for_backward(directions, rays, features, rgb, *weights)
        return rgb

    @staticmethod
    @once_differentiable
    def backward(ctx, g_rgb: Tensor) -> tuple[Tensor | None, ...]:
        directions, rays, features, rgb = ctx.saved_tensors[:4]
        g_out, weights = _colour_gradients(ctx.field, features, directions, rays, rgb, g_rgb)
        return None, None, None, g_out[:, : ctx.field.geo_features], *weights


class _Radiance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, field: Field, encoded: Encoded, directions: Tensor, rays: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        rgb = colour_rows(field, encoded.out, directions, rays)
        ctx.field = field
        ctx.save_for_backward(*encoded[:3], directions, rays, rgb, *parameters)
        return rgb, encoded.sigma

    @staticmethod
    @once_differentiable
    def backward(ctx, g_rgb: Tensor, g_sigma: Tensor) -> tuple[Tensor | None, ...]:
        unit, features, out, directions, rays, rgb = ctx.saved_tensors[:6]
        g_out, colour_weights = _colour_gradients(ctx.field, out, directions, rays, rgb, g_rgb)
        encoded = Encoded(unit, features, out, g_sigma)
        table, *density_weights = _density_gradients(ctx.field, encoded, g_sigma, g_out, ctx.needs_input_grad[4])
        return None, None, None, None, table, *density_weights, *colour_weights


@torch.no_grad()
def colour_rows(
    field: Field, features: Tensor, directions: Tensor, rays: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """`colour` without a graph, with `rays` as in `radiance`; only of the `rows` int64 of features, 0 elsewhere."""
    rgb = torch.empty(len(features), 3) if rows is None else torch.zeros(len(features), 3)
    call("field_colour", structure(field), colour_structure(field, features, directions, rays, rows), rgb)
    return rgb


def _colour_gradients(
    field: Field, features: Tensor, directions: Tensor, rays: Tensor | None, rgb: Tensor, g_rgb: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the density network's output [S, width] and of the colour network's weights."""
    g_out = torch.empty(len(features), field.out_width)
    weights = [torch.empty_like(w) for w in field.colour_weights]
    inputs = colour_structure(field, features, directions, rays)
    call("field_colour_backward", structure(field), inputs, rgb, g_rgb.contiguous(), g_out, addresses(weights))
    return g_out, weights


def _density_gradients(
    field: Field, encoded: Encoded, g_sigma: Tensor, g_out: Tensor, with_table: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of the table (None if not wanted) and of the density network's weights."""
    table = torch.zeros_like(field.table) if with_table else None
    weights = [torch.empty_like(w) for w in field.density_weights]
    gradients = g_sigma.contiguous(), g_out.contiguous(), table
    call("field_density_backward", structure(field), encoded_structure(encoded), *gradients, addresses(weights))
    return table, *weights
