"""Sparse points in PLY files: read without trusting them, and written."""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from csd3d import files
from csd3d.datasets.listing import Points
from csd3d.errors import InputError

MAX_POINTS = 20_000_000
MAX_HEADER_BYTES = 1 << 16
TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"},
}
ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


def read_ply(path: Path, where: str) -> Points:
    """The vertices of a PLY file, ASCII or binary, with their colours (grey where there are none).

    where: begins every message. Raises InputError, one line.
    """
    try:
        return _read_ply(path, where)
    except OSError as error:
        raise InputError(f"{where}: {path} cannot be read ({error.strerror})") from error


def _read_ply(path: Path, where: str) -> Points:
    with path.open("rb") as file:
        order, count, columns = ply_header(file, f"{where}: {path}", MAX_POINTS, "points")
        start = file.tell()
        if order:
            row = np.dtype([(name, order + kind) for name, kind in columns])
            if start + count * row.itemsize > path.stat().st_size:
                raise InputError(f"{where}: {path} ends before its {count} points do")
            table = np.fromfile(file, row, count)
        else:
            text = file.read(64 * len(columns) * count).split(b"\n", count)[:count]
            try:
                values = np.array([line.split()[: len(columns)] for line in text], np.float64).reshape(count, -1)
                table = {name: values[:, i] for i, (name, _) in enumerate(columns)}
            except (ValueError, IndexError):
                raise InputError(f"{where}: {path}: its points are not {count} rows of numbers") from None
    xyz = np.stack([table[axis].astype(np.float64) for axis in "xyz"], axis=1)
    if not np.isfinite(xyz).all() or (len(xyz) and np.abs(xyz).max() > 1e12):
        raise InputError(f"{where}: {path}: holds points that are not finite")
    names = [name for name, _ in columns]
    rgb = np.full((count, 3), 0.5, np.float32)
    if {"red", "green", "blue"} <= set(names):
        whole = dict(columns)["red"] == "u1"
        rgb = np.stack([table[channel] for channel in ("red", "green", "blue")], axis=1).astype(np.float32)
        rgb = np.nan_to_num(rgb / 255 if whole else rgb).clip(0, 1)
    return Points(xyz, rgb)


def ply_header(file: BinaryIO, where: str, most: int, what: str) -> tuple[str, int, list[tuple[str, str]]]:
    """Byte order ("" for ASCII), number of vertices, and name and type of their columns; leaves `file` behind it.

    Raises InputError if there are more than `most` vertices, which messages call `what`.
    """
    words: list[list[str]] = []
    while not words or words[-1] != ["end_header"]:
        line = file.readline(1000)
        if not line or file.tell() > MAX_HEADER_BYTES or (not words and line.strip() != b"ply"):
            raise InputError(f"{where} is no PLY file")
        words.append(line.decode("latin-1").split())
    order = next((ORDERS.get(line[1]) for line in words if line[:1] == ["format"] and len(line) > 1), None)
    elements = [i for i, line in enumerate(words) if line[:1] == ["element"]]
    if order is None or not elements or words[elements[0]][1:2] != ["vertex"]:
        raise InputError(f"{where}: expected a PLY file whose first element is its vertices")
    count = words[elements[0]][2] if len(words[elements[0]]) == 3 else ""
    if not count.isdecimal() or len(count) > 12 or int(count) > most:
        raise InputError(f"{where}: its number of {what} is not between 0 and {most}")
    end = elements[1] if len(elements) > 1 else len(words)
    properties = [line for line in words[elements[0] : end] if line[:1] == ["property"]]
    if any(len(line) != 3 or line[1] not in TYPES for line in properties):
        raise InputError(f"{where}: a point has a property that is no single number")
    columns = [(line[2], TYPES[line[1]]) for line in properties]
    names = [name for name, _ in columns]
    if not {"x", "y", "z"} <= set(names) or len(set(names)) < len(names):
        raise InputError(f"{where}: its points have no x, y, z")
    return order, int(count), columns


def write_ply(path: Path, points: Points) -> None:
    """Writes points as binary PLY: x, y, z as doubles, colours as bytes."""
    row = np.dtype([*((axis, "<f8") for axis in "xyz"), *((name, "u1") for name in ("red", "green", "blue"))])
    table = np.empty(len(points.xyz), row)
    for i, axis in enumerate("xyz"):
        table[axis] = points.xyz[:, i]
    for i, name in enumerate(("red", "green", "blue")):
        table[name] = np.round(255 * points.rgb[:, i]).astype(np.uint8)
    lines = [f"property {'double' if kind == '<f8' else 'uchar'} {name}" for name, kind in row.descr]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}", *lines, "end_header\n"]
    files.write_whole(path, lambda partial: partial.write_bytes("\n".join(head).encode() + table.tobytes()))
