"""The C structures of field.py, each with the tensors that its pointers need, and calls with them."""

import ctypes
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from custom_kernels import native
from custom_kernels.hashgrid import _Grid, _grid

if TYPE_CHECKING:
    from custom_kernels.field import Encoded, Field

FEATURES = 2  # of an entry of the hash grid


class _Field(ctypes.Structure):
    """Mirrors Field in cpu/field.h."""

    _fields_ = (
        ("grid", _Grid),
        *((name, ctypes.c_int32) for name in ("levels", "hidden", "colour_layers", "geo_features")),
        *((name, ctypes.c_int32) for name in ("sh_degree", "unbounded")),
        *((name, ctypes.c_float) for name in ("density_scale", "blob_scale", "blob_radius")),
        *((name, ctypes.c_void_p) for name in ("aabb", "table", "weights")),
    )  # fmt: skip


class _Encoded(ctypes.Structure):
    """Mirrors Encoded in cpu/field.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "padded")),
        *((name, ctypes.c_void_p) for name in ("unit", "features", "out", "sigma")),
    )


class _ColourInputs(ctypes.Structure):
    """Mirrors ColourInputs in cpu/colour.cpp."""

    _fields_ = (
        ("features", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride", "count")),
        *((name, ctypes.c_void_p) for name in ("directions", "rays", "rows")),
    )


def structure(field: "Field") -> _Field:
    """The sizes and parameters of a field."""
    parameters = [p.detach().contiguous() for p in field.parameters]
    aabb = field.aabb.contiguous()
    weights = addresses(parameters[1:])
    grid = _levels(tuple(field.offsets[: field.levels + 1]), tuple(field.resolutions[: field.levels]))
    sizes = (len(field.resolutions), field.hidden, len(field.colour_weights) - 1, field.geo_features)
    scales = (field.density_scale, field.blob_scale, field.blob_radius)
    pointers = (native.pointer(aabb), native.pointer(parameters[0]), ctypes.addressof(weights))
    found = _Field(grid, *sizes, field.sh_degree, field.unbounded, *scales, *pointers)
    found.kept = parameters, aabb, weights
    return found


@functools.lru_cache(maxsize=64)
def _levels(offsets: tuple[int, ...], resolutions: tuple[float, ...]) -> _Grid:
    return _grid(offsets, resolutions, FEATURES)


def encoded_structure(encoded: "Encoded") -> _Encoded:
    """What a density pass leaves, or where it is to be left."""
    padded = encoded.unit.shape[1]
    found = _Encoded(len(encoded.out), padded, *map(native.pointer, encoded))
    found.kept = encoded
    return found


def colour_structure(
    field: "Field", features: Tensor, directions: Tensor, rays: Tensor | None, rows: Tensor | None = None
) -> _ColourInputs:
    """The rows that a pass of the colour network takes."""
    if not _whole_rows(field, features):
        features = features.contiguous()
    directions = directions.contiguous()
    first = ctypes.c_void_p(features.data_ptr())
    pointers = native.pointer(directions), native.pointer(rays), native.pointer(rows)
    stride = features.stride(0) if len(features) else field.geo_features
    found = _ColourInputs(first, stride, len(features if rows is None else rows), *pointers)
    found.kept = features, directions, rays, rows
    return found


def _whole_rows(field: "Field", features: Tensor) -> bool:
    """Whether these are rows of the density network's output, which the kernels read whole."""
    width = field.out_width
    return features.stride() == (width, 1) and features.storage_offset() % width == 0


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array:
    """An array of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def call(name: str, *arguments: Tensor | ctypes.Structure | ctypes.Array | None) -> None:
    """Call a kernel of the library with these arguments and the number of threads."""

    def passed(a: Tensor | ctypes.Structure | ctypes.Array | None) -> object:
        if isinstance(a, ctypes.Structure):
            return ctypes.byref(a)
        return a if isinstance(a, ctypes.Array) else native.pointer(a)

    function = getattr(native.require_library(), name)
    function.restype = None
    function(*map(passed, arguments), ctypes.c_int(native.num_threads()))
