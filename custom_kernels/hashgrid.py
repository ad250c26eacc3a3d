"""Multiresolution hash encoding (Müller et al. 2022, arXiv 2201.05989, section 3) with interchangeable backends.

Symbols: S points, L levels, F features a level, T entries of all levels together, N_l vertices along an axis of level
l (a real number).

The layout of the table is that of tiny-cuda-nn, so all backends can use the same parameters: levels follow each other,
and the features of an entry are adjacent. A level whose ⌈N_l⌉³ vertices fit is dense (x fastest, rounded up to 8
entries); a larger one is hashed. Positions are shifted by half a cell, p = x (N_l − 1) + 0.5, so that vertices of
different levels do not coincide.

Backends: `reference` (torch; any device and floating type), `native` (C++, float32 on the CPU; bit-identical for any
number of threads), `triton` (float32 on CUDA; the table's gradient is summed by atomics, so its last bits vary, except
under torch.use_deterministic_algorithms, where the reference sums it), `tcnn` (tinycudann, float32 on CUDA).
"""

import ctypes
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_kernels import native
from custom_kernels.libraries import TCNN, TRITON
from custom_kernels.trials import require, runs

PRIMES = (1, 2654435761, 805459861)
NATIVE_FEATURES = (1, 2, 4, 8)
BACKENDS = ("auto", "reference", "native", "triton", "tcnn")


def grid_layout(
    levels: int, base_resolution: int, max_resolution: int, log2_hashmap_size: int
) -> tuple[list[int], list[float]]:
    """First entry of each level and the total [L+1], and N_l = base · b^l up to `max_resolution` (equations 2, 3).

    Raises ValueError for invalid sizes.
    """
    if levels < 1 or base_resolution < 2 or max_resolution < base_resolution or not 3 <= log2_hashmap_size <= 28:
        raise ValueError(
            "a hash grid takes levels >= 1, 2 <= base_resolution <= max_resolution, 3 <= log2_hashmap_size <= 28; "
            f"got {levels}, {base_resolution}, {max_resolution}, {log2_hashmap_size}"
        )
    log2_growth = math.log2(max_resolution / base_resolution) / max(levels - 1, 1)
    growth = torch.exp2(torch.arange(levels, dtype=torch.float32) * torch.tensor(log2_growth, dtype=torch.float32))
    resolutions = (growth * base_resolution).tolist()  # single precision, as tiny-cuda-nn computes them
    dense = [math.ceil(_vertices(n) ** 3 / 8) * 8 for n in resolutions]
    sizes = [min(size, 1 << log2_hashmap_size) for size in dense]
    return [0, *itertools.accumulate(sizes)], resolutions


def init_table(entries: int, features: int, generator: torch.Generator | None = None) -> Tensor:
    """A table [T, F] drawn from U(−1e-4, 1e-4) (section 4, initialisation)."""
    return torch.empty(entries, features).uniform_(-1e-4, 1e-4, generator=generator)


def hash_encode(
    positions: Tensor, table: Tensor, offsets: Sequence[int], resolutions: Sequence[float], *, backend: str = "auto"
) -> Tensor:
    """Interpolated features of all levels, [S, L·F], level by level.

    positions [S, 3] in [0, 1] (clamped; the gradient is 0 outside), table [T, F], offsets [L+1] and resolutions [L] of
    `grid_layout`. Differentiable once, in the table and in the positions. `auto` is native if possible (CPU, float32,
    compiled), on CUDA the first of triton and tcnn that runs there, else the reference. Raises ValueError for wrong
    shapes, RuntimeError if a backend chosen by name is missing.
    """
    _check(positions, table, offsets, resolutions)
    backend = choose_backend(backend, positions, table)
    if backend == "native":
        return _encode(positions.contiguous(), table.contiguous(), list(offsets), list(resolutions))
    if backend == "triton":
        from custom_kernels.hashgrid_triton import encode_triton

        return encode_triton(positions, table, offsets, resolutions)
    if backend == "tcnn":
        from custom_kernels.hashgrid_tcnn import encode_tcnn

        return encode_tcnn(positions, table, offsets, resolutions)
    return hash_encode_reference(positions, table, offsets, resolutions)


def choose_backend(backend: str, positions: Tensor, table: Tensor) -> str:
    """The backend that `hash_encode` uses: `auto` resolved, a named one checked (RuntimeError if it cannot run)."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return _fastest(positions, table)
    if backend == "native":
        if not torch.compiler.is_compiling():  # torch.compile cannot trace the search for the library
            native.require_library()
        if (obstacle := _native_obstacle(positions, table)) is not None:
            raise RuntimeError(f"backend 'native' cannot take this: {obstacle}")
    if backend in ("triton", "tcnn"):
        require(TRITON if backend == "triton" else TCNN, positions, table)
    return backend


def _fastest(positions: Tensor, table: Tensor) -> str:
    compiling = torch.compiler.is_compiling()
    if _native_obstacle(positions, table) is None:
        return "native" if compiling or native.library() is not None else "reference"
    if positions.is_cuda and positions.dtype == table.dtype == torch.float32 and not compiling:
        # tinycudann need not be there, so nothing is said if it is not
        return "triton" if runs(TRITON) else "tcnn" if runs(TCNN, expected=False) else "reference"
    return "reference"


def _native_obstacle(positions: Tensor, table: Tensor) -> str | None:
    if positions.device.type != "cpu" or table.device.type != "cpu":
        return f"tensors on {positions.device} and {table.device}; it runs on the CPU"
    if positions.dtype != torch.float32 or table.dtype != torch.float32:
        return f"{positions.dtype} positions and a {table.dtype} table; it computes in float32"
    if table.shape[1] not in NATIVE_FEATURES:
        return f"{table.shape[1]} features a level; it is compiled for {NATIVE_FEATURES}"
    return None


def _check(positions: Tensor, table: Tensor, offsets: Sequence[int], resolutions: Sequence[float]) -> None:
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise ValueError(f"positions must be [S, 3], got {list(positions.shape)}")
    if len(offsets) != len(resolutions) + 1 or table.ndim != 2 or table.shape[0] != offsets[-1]:
        raise ValueError(
            f"table must be [T, F] with T = offsets[-1] and one offset more than resolutions, "
            f"got {list(table.shape)}, {len(offsets)} offsets and {len(resolutions)} resolutions"
        )


def _vertices(resolution: float) -> int:
    return math.ceil(resolution - 1) + 1


# ---- reference


def hash_encode_reference(
    positions: Tensor, table: Tensor, offsets: Sequence[int], resolutions: Sequence[float]
) -> Tensor:
    """`hash_encode` in plain torch, any device and floating dtype; cells and fractions are computed in float64."""
    x = positions.to(torch.float64).clamp(0, 1)
    spans = zip(offsets[:-1], offsets[1:], resolutions, strict=True)
    return torch.cat([_encode_level(x, table[start:stop], resolution) for start, stop, resolution in spans], dim=1)


def _encode_level(x: Tensor, table: Tensor, resolution: float) -> Tensor:
    p = x * (resolution - 1) + 0.5
    cell = p.detach().floor()
    fraction = p - cell
    corners = torch.tensor(list(itertools.product((0, 1), repeat=3)), device=x.device)  # [8, 3]
    index = _entry_index(cell.long()[:, None] + corners, table.shape[0], _vertices(resolution))
    weight = torch.where(corners == 1, fraction[:, None], 1 - fraction[:, None]).prod(dim=2).to(table.dtype)
    return (weight[:, :, None] * F.embedding(index, table)).sum(dim=1)


def _entry_index(vertex: Tensor, size: int, vertices: int) -> Tensor:
    """Entry of grid vertices [..., 3]: x + y·n + z·n² if all n³ fit, else the xor of equation 4; modulo the size."""
    if vertices**3 <= size:
        x, y, z = (vertex * torch.tensor([1, vertices, vertices**2], device=vertex.device)).unbind(-1)
        return (x + y + z) % size
    x, y, z = (vertex * torch.tensor(PRIMES, device=vertex.device)).unbind(-1)
    return (x ^ y ^ z) % size


# ---- native


class _Grid(ctypes.Structure):
    """Mirrors HashGrid in cpu/hashgrid.cpp."""

    _fields_ = (
        ("offsets", ctypes.POINTER(ctypes.c_int64)),
        ("resolutions", ctypes.POINTER(ctypes.c_float)),
        ("levels", ctypes.c_int32),
        ("features", ctypes.c_int32),
    )


def _grid(offsets: Sequence[int], resolutions: Sequence[float], features: int) -> _Grid:
    levels = len(resolutions)
    return _Grid((ctypes.c_int64 * (levels + 1))(*offsets), (ctypes.c_float * levels)(*resolutions), levels, features)


def _call(name: str, *tensors_then_grid: Tensor | _Grid | int) -> None:
    arguments = [
        native.pointer(a) if isinstance(a, Tensor) else ctypes.byref(a) if isinstance(a, _Grid) else ctypes.c_int64(a)
        for a in tensors_then_grid
    ]
    function = getattr(native.require_library(), name)
    function.restype = None
    function(*arguments, ctypes.c_int32(native.num_threads()))


@torch.library.custom_op("custom_kernels::hash_encode", mutates_args=(), device_types="cpu")
def _encode(positions: Tensor, table: Tensor, offsets: list[int], resolutions: list[float]) -> Tensor:
    count, features = positions.shape[0], table.shape[1]
    out = positions.new_empty(count, len(resolutions) * features)
    grid = _grid(offsets, resolutions, features)
    _call("hash_encode_forward", positions.contiguous(), count, table.contiguous(), grid, out)
    return out


@_encode.register_fake
def _(positions: Tensor, table: Tensor, offsets: list[int], resolutions: list[float]) -> Tensor:
    return positions.new_empty(positions.shape[0], len(resolutions) * table.shape[1])


@torch.library.custom_op("custom_kernels::hash_encode_table_grad", mutates_args=(), device_types="cpu")
def _table_grad(grad: Tensor, positions: Tensor, table: Tensor, offsets: list[int], resolutions: list[float]) -> Tensor:
    grad_table = torch.zeros_like(table, memory_format=torch.contiguous_format)
    grid = _grid(offsets, resolutions, table.shape[1])
    positions = positions.contiguous()
    _call("hash_encode_backward_table", grad.contiguous(), positions, len(positions), grid, grad_table)
    return grad_table


@_table_grad.register_fake
def _(grad: Tensor, positions: Tensor, table: Tensor, offsets: list[int], resolutions: list[float]) -> Tensor:
    return torch.empty_like(table, memory_format=torch.contiguous_format)


@torch.library.custom_op("custom_kernels::hash_encode_positions_grad", mutates_args=(), device_types="cpu")
def _positions_grad(
    grad: Tensor, positions: Tensor, table: Tensor, offsets: list[int], resolutions: list[float]
) -> Tensor:
    grad_positions = torch.empty_like(positions, memory_format=torch.contiguous_format)
    grid = _grid(offsets, resolutions, table.shape[1])
    grad, positions, table = grad.contiguous(), positions.contiguous(), table.contiguous()
    _call("hash_encode_backward_positions", grad, positions, len(positions), table, grid, grad_positions)
    return grad_positions


@_positions_grad.register_fake
def _(grad: Tensor, positions: Tensor, table: Tensor, offsets: list[int], resolutions: list[float]) -> Tensor:
    return torch.empty_like(positions, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    positions, table, ctx.offsets, ctx.resolutions = inputs
    ctx.save_for_backward(positions, table)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    arguments = (grad, *ctx.saved_tensors, ctx.offsets, ctx.resolutions)
    needs_positions, needs_table = ctx.needs_input_grad[:2]
    return (
        _positions_grad(*arguments) if needs_positions else None,
        _table_grad(*arguments) if needs_table else None,
        None,
        None,
    )


_encode.register_autograd(_backward, setup_context=_setup_context)
