"""The hash encoding by the kernels of gpu/hashgrid.py, as a torch function; shapes and meaning are in hashgrid.py."""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from custom_kernels.gpu import hashgrid as kernels
from custom_kernels.hashgrid import hash_encode_reference
from custom_kernels.trials import device_of

BLOCK = 256  # points of a program


def encode_triton(positions: Tensor, table: Tensor, offsets: Sequence[int], resolutions: Sequence[float]) -> Tensor:
    """`hash_encode` in float32 on CUDA (on the CPU in Triton's interpreter); differentiable once."""
    return _Encode.apply(positions, table, tuple(offsets), tuple(resolutions))


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, positions: Tensor, table: Tensor, offsets: tuple[int, ...], resolutions: tuple[float, ...]
    ) -> Tensor:
        positions, table = positions.contiguous(), table.contiguous()
        ctx.save_for_backward(positions, table)
        ctx.layout = offsets, resolutions
        out = positions.new_empty(len(positions), len(resolutions) * table.shape[1])
        _launch(kernels.encode, (positions, table), ctx.layout, table.shape[1], out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        positions, table = ctx.saved_tensors
        gradient, features = gradient.contiguous(), table.shape[1]
        for_positions = for_table = None
        if ctx.needs_input_grad[0]:
            for_positions = torch.empty_like(positions)
            _launch(kernels.positions_gradient, (positions, table, gradient), ctx.layout, features, for_positions)
        if ctx.needs_input_grad[1] and torch.are_deterministic_algorithms_enabled():
            for_table = _sorted_gradient(positions, table, ctx.layout, gradient)
        elif ctx.needs_input_grad[1]:
            for_table = torch.zeros_like(table)
            _launch(kernels.table_gradient, (positions, gradient), ctx.layout, features, for_table)
        return for_positions, for_table, None, None


def _sorted_gradient(positions: Tensor, table: Tensor, layout: tuple, gradient: Tensor) -> Tensor:
    """The table's gradient by the reference: torch sums it in a fixed order, as atomics do not."""
    with torch.enable_grad():
        leaf = table.detach().requires_grad_()
        return torch.autograd.grad(hash_encode_reference(positions, leaf, *layout), leaf, gradient)[0]


def _launch(kernel: triton.JITFunction, inputs: tuple[Tensor, ...], layout: tuple, features: int, out: Tensor) -> None:
    """Run a kernel over all points, and over all levels as a second axis unless it sums them."""
    positions, levels = inputs[0], len(layout[1])
    if not len(positions):
        return
    blocks, sums = triton.cdiv(len(positions), BLOCK), kernel is kernels.positions_gradient
    grid, more = ((blocks,), (levels,)) if sums else ((blocks, levels), ())
    with device_of(positions):
        given = *inputs, *_levels(*layout, positions.device), out, len(positions), *more
        kernel[grid](*given, FEATURES=features, BLOCK=BLOCK)


@functools.lru_cache(maxsize=32)
def _levels(offsets: tuple[int, ...], resolutions: tuple[float, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The arrays that describe the levels to the kernels."""
    vertices = [math.ceil(n - 1) + 1 for n in resolutions]
    sizes = [b - a for a, b in itertools.pairwise(offsets)]
    hashed = [n**3 > size for n, size in zip(vertices, sizes, strict=True)]
    integers = (torch.tensor(values, dtype=torch.int32, device=device) for values in (vertices, sizes, hashed))
    scales = torch.tensor(resolutions, dtype=torch.float32, device=device) - 1
    return torch.tensor(offsets[:-1], device=device), scales, *integers
