"""Checked reading of a capture's files, which may be malformed or hostile: values of JSON, and paths.

Functions take `where`, the file and key of the value, and raise InputError with one line that begins with it.
"""

import itertools
import math
import os
import reprlib
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np

from csd3d.errors import InputError, one_line

TOLERANCE = 5e-3  # of a rotation: on |R^T R - 1| and on its scale; accepts matrices printed with three digits
EXTENSIONS = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG", ".webp", ".tif", ".tiff")

# Whether files may lie outside the capture's folder. Readers do not pass it on, so that each need not know of it.
_outside_allowed: ContextVar[bool] = ContextVar("outside_allowed", default=False)

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


def rigid(value: Any, where: str) -> np.ndarray:
    """Return a rigid motion, 3x4 or 4x4, as [4, 4], its rotation replaced by the nearest orthonormal one (SVD).

    Refuses scaled, sheared, singular or mirrored matrices, and positions beyond 1e8.
    """
    return nearest_rigid(_motion(value, where), where)


def scaled_rigid(value: Any, where: str) -> tuple[np.ndarray, float]:
    """As `rigid`, but divide the 3x3 part by its scale if that is the same in all directions; also return the scale.

    pyrender, and Blender for a camera whose parent is scaled, write such camera matrices: the position is right, and
    the scale means nothing for a camera.
    """
    return _without_scale(_motion(value, where), where)


def nearest_rigid(m: np.ndarray, where: str) -> np.ndarray:
    """Return a copy of [4, 4] as `rigid` does, and refuse what it refuses."""
    motion, scale = _without_scale(m, where)
    if abs(scale - 1) > TOLERANCE:
        raise InputError(f"{where}: its 3x3 part is scaled by {scale:.3g} and so no rotation; expected a rigid pose")
    return motion


def _motion(value: Any, where: str) -> np.ndarray:
    """A matrix of 3x4 or 4x4 numbers as [4, 4]."""
    m = np.vstack((matrix(value, ((3, 4), (4, 4)), where)[:3], (0.0, 0.0, 0.0, 1.0)))
    if len(value) == 4 and not np.allclose(value[3], m[3], rtol=0, atol=1e-6):
        raise InputError(f"{where}: the last row is {shown(value[3])}; expected [0, 0, 0, 1]")
    return m


def _without_scale(m: np.ndarray, where: str) -> tuple[np.ndarray, float]:
    """The motion [4, 4] without the uniform scale of its 3x3 part, and that scale; 1 within the tolerance."""
    if not np.isfinite(m).all():
        raise InputError(f"{where}: holds numbers that are not finite; expected a rigid pose")
    if np.abs(m).max() > 1e8:
        raise InputError(f"{where}: holds {np.abs(m).max():g}; expected coordinates within 1e8")
    scale = float(np.sqrt((m[:3, :3] ** 2).sum() / 3))
    if scale < 1e-6:
        raise InputError(f"{where}: its 3x3 part is zero and so no rotation; expected a rigid pose")
    scale = 1.0 if abs(scale - 1) <= TOLERANCE else scale
    rotation = m[:3, :3] / scale
    error = np.abs(rotation.T @ rotation - np.eye(3)).max()
    if error > TOLERANCE:
        raise InputError(f"{where}: its 3x3 part is no rotation (|R^T R - 1| is {error:.3g}); expected a rigid pose")
    if np.linalg.det(rotation) < 0:
        raise InputError(f"{where}: its 3x3 part is mirrored (determinant -1); expected a rotation, right-handed")
    u, _, vt = np.linalg.svd(rotation)
    m = m.copy()
    m[:3, :3] = u @ vt
    return m, scale


@contextmanager
def outside_allowed(allowed: bool) -> Iterator[None]:
    """Within it, `listed_file` may or may not find files outside the capture's folder."""
    token = _outside_allowed.set(allowed)
    try:
        yield
    finally:
        _outside_allowed.reset(token)


def name_key(name: str) -> str:
    """A listed name in the form that names are compared in: `/` for `\\`, composed Unicode, suffix in lower case."""
    stem, suffix = os.path.splitext(unicodedata.normalize("NFC", name.replace("\\", "/").removeprefix("./")))
    return stem + suffix.lower()


def listed_file(folder: Path, value: Any, where: str) -> Path | None:
    """Return a listed file inside the capture's folder; None if it does not exist.

    Where no file has the name as it stands, `\\` is read as `/`, each part is tried in the other Unicode forms (a Mac
    writes names decomposed), and the suffix in lower and upper case. A missing extension is added, as Blender's files
    need. Unless `outside_allowed`, raises InputError for a path that leaves the folder: an absolute one, `..`, or a
    symbolic link.
    """
    name = text(value, where)
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        raise InputError(f"{where}: {shown(name)} holds control characters; expected a path inside {folder}")
    try:
        path = folder / name
        found = next((candidate for candidate in _candidates(folder, name) if candidate.is_file()), path)
        exists, real = found.is_file(), found.resolve()
        inside = real.is_relative_to(folder.resolve()) and not Path(name).is_absolute()
    except (OSError, ValueError, RuntimeError) as error:  # too long, not permitted, a loop of links
        raise InputError(f"{where}: {shown(name)} is no usable path ({one_line(error)})") from error
    if not inside and not _outside_allowed.get():
        _refuse_outside(folder, found, name, where)
    return real if exists else None


def _candidates(folder: Path, name: str) -> Iterator[Path]:
    """Files that a name may mean, the literal one first."""
    for written in dict.fromkeys((name, name.replace("\\", "/"))):
        yield folder / written
        last = Path(written).name
        if not last:
            continue
        parent = _in_other_forms(folder / Path(written).parent)
        stem, suffix = os.path.splitext(last)
        endings = dict.fromkeys((suffix, suffix.lower(), suffix.upper(), *(suffix + added for added in EXTENSIONS)))
        for form, ending in itertools.product(_forms(stem), endings):
            yield parent / (form + ending)


def _in_other_forms(path: Path) -> Path:
    """`path`, each part in whichever Unicode form exists; as it stands from the first part that exists in none."""
    if path.exists() or path.parent == path:
        return path
    parent = _in_other_forms(path.parent)
    return next((parent / form for form in _forms(path.name) if (parent / form).exists()), parent / path.name)


def _forms(name: str) -> list[str]:
    return list(dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))))


def _refuse_outside(folder: Path, found: Path, name: str, where: str) -> None:
    inside = not Path(name).is_absolute() and Path(os.path.normpath(found)).is_relative_to(os.path.normpath(folder))
    parts = [part for part in (found, *found.parents) if part.is_relative_to(folder) and part != folder]
    link = next((part for part in reversed(parts) if part.is_symlink()), None) if inside else None
    why = f"leaves the capture's folder {folder}"
    if link is not None:
        why = f"leaves the capture's folder {folder}, because {link} is a link to {os.readlink(link)}"
    raise InputError(f"{where}: {shown(name)} {why}; expected a path inside it, or scene.allow_outside=true")
