"""Atomic writing of files, and reading of untrusted JSON."""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from csd3d.errors import InputError, one_line

PARTIAL = ".partial"  # in the name of a file that is not yet whole
LEFT_OVER = re.compile(r"\..+\.partial(\.\w+)?|\..+\.whole\.mp4|.+\.partial\.mp4")
DAY = 24 * 3600  # seconds
MAX_JSON_BYTES = 32 * 2**20  # a capture of 30 000 frames; takes up to 700 MiB when parsed


def natural_key(name: str) -> list:
    """A sort key for names that compares the numbers in them by value: r_2 before r_10."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


_run_folder: ContextVar[str | None] = ContextVar("run_folder", default=None)


@contextlib.contextmanager
def never_made_again(folder: Path) -> Iterator[None]:
    """While open, `make_folder` and the writers raise FileNotFoundError below `folder` once somebody has deleted it.

    Otherwise a run whose folder is deleted would leave a part of one, without its config.
    """
    token = _run_folder.set(os.path.abspath(folder))
    try:
        yield
    finally:
        _run_folder.reset(token)


def make_folder(folder: Path) -> None:
    """Make a folder with those above it, unless it is there."""
    root, place = _run_folder.get(), os.path.abspath(folder)
    if root and (place == root or place.startswith(root + os.sep)) and not os.path.isdir(root):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), root)
    folder.mkdir(parents=True, exist_ok=True)


def write_whole(path: Path, write: Callable[[Path], object], sync: bool = False) -> None:
    """Call `write` with a temporary path beside `path`, then rename the file to `path`; creates the folder.

    After a crash `path` is the old file or the new one, never a part; if `write` fails nothing is left. The temporary
    name has the suffix of `path`.  sync: the file reaches the disk before it is renamed, and its folder after.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.stem}{PARTIAL}{path.suffix}")
    try:
        write(partial)
        if sync:
            sync_to_disk(partial)
        os.replace(partial, path)
    except OSError as error:
        # a write to a full disk does not name its file, and the temporary name says nothing to a reader
        error.filename = str(path) if error.filename in (None, str(partial)) else error.filename
        raise
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone, and the error before says more
            partial.unlink()
    if sync:
        sync_to_disk(path.parent)


@contextlib.contextmanager
def whole_folder(folder: Path, size: int) -> Iterator[Path]:
    """A temporary folder to write in, renamed to `folder` at the end, unless another process has made that meanwhile.

    After an error nothing is left; what a killed process left beside it is removed after a day. Raises OSError, also
    where fewer than `size` bytes are free.
    """
    make_folder(folder.parent)
    if (free := shutil.disk_usage(folder.parent).free) < size:
        why = f"{free >> 20} MiB are free there, {-(-size >> 20)} MiB are needed"
        raise OSError(errno.ENOSPC, why, str(folder.parent))
    for left in folder.parent.glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > DAY:
                shutil.rmtree(left)
    partial = Path(tempfile.mkdtemp(suffix=PARTIAL, prefix=".", dir=folder.parent))
    try:
        yield partial
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cache_folder(name: str) -> Path:
    """Where csd3d keeps what it has computed once for all runs, and can compute again; it may not exist.

    As the XDG base directory specification says, an XDG_CACHE_HOME that is no absolute path is ignored.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    return Path(root if os.path.isabs(root) else os.path.expanduser("~/.cache")) / "csd3d" / name


def write_bytes(path: Path, data: bytes, sync: bool = False) -> None:
    """Write a file by `write_whole`."""
    write_whole(path, lambda partial: partial.write_bytes(data), sync)


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Write a UTF-8 text file by `write_whole`."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"), sync)


def remove_partial(folder: Path) -> list[Path]:
    """Delete what killed writers have left anywhere in a folder in which nobody writes now; return the files."""
    left = [path for path in folder.rglob("*") if path.is_file() and LEFT_OVER.fullmatch(path.name)]
    for path in left:
        with contextlib.suppress(OSError):  # nothing depends on it
            path.unlink()
    return left


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, what: str, most_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file of UTF-8, with or without a byte order mark.

    what: what the file should be, for messages ("a capture's JSON"). Raises InputError, one line that begins with the
    path, for a file that is missing, larger than `most_bytes`, nested too deeply, not JSON, or not an object, and for
    an object with the same key twice.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise InputError(f"{path}: not a file; expected {what}")
        if size > most_bytes:
            raise InputError(f"{path}: {size} bytes; {what} is at most {most_bytes}")
        value = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; expected {what}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply to be {what}") from error
    except InputError:
        raise
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and numbers of thousands of digits
        raise InputError(f"{path}: not readable as JSON ({one_line(error)}); expected {what}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object, holds a {type(value).__name__}; expected {what}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {key[:80]!r} stands twice in one object")
    return value
