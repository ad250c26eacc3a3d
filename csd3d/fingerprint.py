"""Fingerprints of inputs: SHA-256 of what files hold, never of where they are.

A checkpoint's identity has them in place of paths, so that a run continues with its data moved, and is refused with
other data under the same name.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csd3d.errors import InputError
from csd3d.files import cache_folder, write_text

PREFIX = "sha256:"
LARGE = 64 << 20  # bytes; the hash of a larger file is remembered until its size or time changes
REMEMBERED = 500  # most files that are remembered
IGNORED = ("Thumbs.db", "desktop.ini")  # what file managers leave in folders; hidden files are ignored too


def of_path(path: str) -> str:
    """The fingerprint of a file, or of all files of a folder; text that names neither (a hub name) is returned as is.

    Raises InputError for what cannot be read.
    """
    place = Path(os.path.expanduser(path))
    if path and os.path.isfile(place):
        return of_files({"": place})
    return of_files(_files_in(place)) if path and os.path.isdir(place) else path


def of_files(files: Mapping[str, Path]) -> str:
    """The fingerprint of files by the names that they go under; their folders have no part in it."""
    found = hashlib.sha256()
    for name, path in sorted(files.items()):
        found.update(f"{len(name)} {name} {of_file(path)}\n".encode("utf-8", "surrogateescape"))
    return PREFIX + found.hexdigest()


def of_file(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits; InputError if it is no regular file or cannot be read."""
    try:
        place = path.resolve(strict=True)
        if not place.is_file():
            raise InputError(f"{path}: no regular file; expected one that can be read twice")
        if place.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", place.name):
            return place.name  # the hub's cache names large files by their SHA-256
        state = place.stat()
        return _sha256(str(place), state.st_size, state.st_mtime_ns)
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None


def of_value(value: Any, without: Collection[str] = ()) -> str:
    """The fingerprint of nested dataclasses, sequences, arrays and plain values; of a Path that of its file's content.

    without: the fields that do not count, at any depth, as "Class.field".
    """
    found = hashlib.sha256()
    _add(found.update, value, without)
    return PREFIX + found.hexdigest()


def _add(update: Callable[[bytes], None], value: Any, without: Collection[str]) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, Path):
        update(of_file(value).encode())
    elif isinstance(value, np.ndarray):
        update(f"{value.dtype} {value.shape} ".encode() + np.ascontiguousarray(value).tobytes())
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if f"{type(value).__name__}.{field.name}" not in without:
                update(f"{field.name}=".encode())
                _add(update, getattr(value, field.name), without)
    elif isinstance(value, (list, tuple)):
        update(f"[{len(value)} ".encode())
        for item in value:
            _add(update, item, without)
    elif isinstance(value, np.generic):
        update(f"{value.item()!r} ".encode())
    elif value is None or isinstance(value, (bool, int, float, str)):
        update(f"{value!r} ".encode())
    else:
        raise TypeError(f"a fingerprint is of plain values, arrays and files, not of a {type(value).__name__}")


def _files_in(folder: Path) -> dict[str, Path]:
    """All files below a folder by relative name; without hidden ones, and without csd3d's runs, which may be there."""
    found = {}
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_unreadable):
        if len(Path(root).relative_to(folder).parts) > 16:
            raise InputError(f"{root}: nested too deeply, or a circle of links")
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_run(Path(root, name))]
        for name in names:
            if not name.startswith(".") and name not in IGNORED:
                found[os.path.relpath(os.path.join(root, name), folder)] = Path(root, name)
    return found


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "cmd.txt").is_file()


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error.strerror})")


# --------------------------------------------------------------------------------------------------- remembered hashes


@functools.lru_cache(maxsize=4096)
def _sha256(path: str, size: int, changed_ns: int) -> str:
    """The hash of a file of this size and time of change, which the caller has looked up."""
    if size >= LARGE and (known := _remembered().get(path)) and known[:2] == [size, changed_ns]:
        return known[2]
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if size >= LARGE:
        kept = dict(list(_remembered().items())[1 - REMEMBERED :]) | {path: [size, changed_ns, found]}
        with contextlib.suppress(OSError):  # it only saves time
            write_text(_memory(), json.dumps(kept))
    return found


def _memory() -> Path:
    return cache_folder("fingerprints.json")


def _remembered() -> dict[str, list]:
    """{path: [size, time of change in ns, SHA-256]}; empty if the file is missing or damaged."""
    try:
        known = json.loads(_memory().read_text())
        right = isinstance(known, dict) and all(
            isinstance(v, list) and [type(x) for x in v] == [int, int, str] for v in known.values()
        )
        return known if right else {}
    except (OSError, ValueError, RecursionError, RuntimeError):
        return {}
