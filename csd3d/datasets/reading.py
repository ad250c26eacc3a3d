"""Checked reading of a capture's files, which may be malformed or hostile: values of JSON, and paths.

Functions take `where`, the file and key of the value, and raise InputError with one line that begins with it.
"""

import math
import reprlib
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from csd3d.errors import InputError, one_line

EXTENSIONS = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG", ".webp", ".tif", ".tiff")

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong, _short.maxlist, _short.maxdict = 2, 80, 80, 30, 4, 3


def shown(value: Any) -> str:
    """An untrusted value, shortened for a message of one line."""
    return _short.repr(value)


def number(value: Any, where: str) -> float:
    """Return a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {shown(value)}; expected a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise InputError(f"{where}: {shown(value)}; expected a finite number")
    return result


def positive(value: Any, where: str) -> float:
    """Return a finite number above zero that float32 can hold."""
    result = number(value, where)
    if not 1e-12 < result < 1e12:
        raise InputError(f"{where}: {shown(value)}; expected a positive number")
    return result


def pixel_count(value: Any, where: str) -> int:
    """Return a whole number of pixels, 1 to 1e6; instant-ngp writes it as a float."""
    result = number(value, where)
    if result != int(result) or not 1 <= result <= 10**6:
        raise InputError(f"{where}: {shown(value)}; expected a whole number of pixels, 1 to 1000000")
    return int(result)


def text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {shown(value)}; expected a non-empty string")
    return value


def matrix(value: Any, shapes: tuple[tuple[int, int], ...], where: str) -> np.ndarray:
    """Return nested lists of finite numbers, of one of the given shapes, as float64."""
    expected = " or ".join(f"{rows}x{columns}" for rows, columns in shapes)
    is_table = isinstance(value, list) and all(isinstance(row, list) for row in value)
    widths = {len(row) for row in value} if is_table else set()
    if len(widths) != 1 or (len(value), *widths) not in shapes:
        raise InputError(f"{where}: {shown(value)}; expected a {expected} matrix as a list of rows")
    return np.array([[number(x, f"{where}[{i}][{j}]") for j, x in enumerate(row)] for i, row in enumerate(value)])


def rigid(value: Any, where: str, tolerance: float = 5e-3) -> np.ndarray:
    """Return a rigid motion, 3x4 or 4x4, as [4, 4], its rotation replaced by the nearest orthonormal one (SVD).

    Refuses scaled, sheared, singular or mirrored matrices, and positions beyond 1e7 (too large for float32).
    The tolerance on |R^T R - 1| accepts matrices printed with three digits.
    """
    m = np.vstack((matrix(value, ((3, 4), (4, 4)), where)[:3], (0.0, 0.0, 0.0, 1.0)))
    if len(value) == 4 and not np.allclose(value[3], m[3], rtol=0, atol=1e-6):
        raise InputError(f"{where}: the last row is {shown(value[3])}; expected [0, 0, 0, 1]")
    return nearest_rigid(m, where, tolerance)


def nearest_rigid(m: np.ndarray, where: str, tolerance: float = 5e-3) -> np.ndarray:
    """Return a copy of [4, 4] as `rigid` does, and refuse what it refuses."""
    if not np.isfinite(m).all():
        raise InputError(f"{where}: holds numbers that are not finite; expected a rigid pose")
    if np.abs(m).max() > 1e7:
        raise InputError(f"{where}: holds {np.abs(m).max():g}; expected coordinates within 1e7")
    rotation = m[:3, :3]
    error = np.abs(rotation.T @ rotation - np.eye(3)).max()
    if error > tolerance:
        raise InputError(f"{where}: its 3x3 part is no rotation (|R^T R - 1| is {error:.3g}); expected a rigid pose")
    if np.linalg.det(rotation) < 0:
        raise InputError(f"{where}: its 3x3 part is mirrored (determinant -1); expected a rotation, right-handed")
    u, _, vt = np.linalg.svd(rotation)
    m = m.copy()
    m[:3, :3] = u @ vt
    return m


def listed_file(folder: Path, value: Any, where: str) -> Path | None:
    """Return a listed file inside the capture's folder; None if it does not exist.

    A missing extension is added, as Blender's files need. Raises InputError for a path that leaves the folder: an
    absolute one, `..`, or a symbolic link.
    """
    name = text(value, where)
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        raise InputError(f"{where}: {shown(name)} holds control characters; expected a path inside {folder}")
    try:
        path = folder / name
        candidates = [path] + [path.with_name(path.name + extension) for extension in EXTENSIONS if path.name]
        found = next((candidate for candidate in candidates if candidate.is_file()), path)
        inside = not Path(name).is_absolute() and found.resolve().is_relative_to(folder.resolve())
        exists = found.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, not permitted, a loop of links
        raise InputError(f"{where}: {shown(name)} is no usable path ({one_line(error)})") from error
    if not inside:
        raise InputError(f"{where}: {shown(name)} leaves the capture's folder {folder}; expected a path inside it")
    return found.resolve() if exists else None
