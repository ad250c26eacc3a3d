"""Temporary folders that may hold gigabytes, and which a killed process leaves behind.

Beside each is a lock file, which is made and locked before the folder. The system frees the lock when the process
ends in any way: a folder whose lock is free is left over, and is removed when the next folder of its kind is made.
"""

import contextlib
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing left over is looked for
    fcntl = None

PREFIX = "csd3d-"  # of folders in TMPDIR
LOCK = ".csd3d-lock"  # at the end of a lock file's name; before it, the folder's


class TemporaryFolder:
    """A new folder `path`, which `close`, or the end of the process, removes with all that it holds.

    In TMPDIR, readable by the user alone, or, if `beside` is given, hidden in the folder of that path, with the usual
    permissions, so that it can be renamed to it. Removes what killed processes left there. Raises OSError where nothing
    can be written. Use it as a context manager, or keep it and call `close`.
    """

    def __init__(self, kind: str, beside: Path | None = None) -> None:
        if beside is None:
            parent, start, mode = Path(tempfile.gettempdir()), f"{PREFIX}{kind}-", 0o700
            left_over = f"{PREFIX}*"
        else:
            parent, mode = beside.absolute().parent, 0o777
            start = _start(kind, beside)
            left_over = f".*.{kind}-*"
        remove_abandoned(parent, left_over)
        lock_file, lock = _new_lock(parent, start)
        self.path = Path(str(lock_file).removesuffix(LOCK))
        try:
            self.path.mkdir(mode)
        except BaseException:
            lock.close()
            lock_file.unlink()
            raise
        self.close = weakref.finalize(self, _remove, self.path, lock_file, lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_) -> None:
        self.close()


def _start(kind: str, beside: Path) -> str:
    """How the names of such folders begin; the whole of a long name would be too long with what is added."""
    return f".{beside.name[:40]}.{kind}-"


def is_being_made(kind: str, path: Path) -> bool:
    """Whether a living process has a `TemporaryFolder` of this kind beside `path`, for it or for one of its name."""
    for name in os.listdir(path.parent) if fcntl and path.parent.is_dir() else ():
        if name.startswith(_start(kind, path)) and name.endswith(LOCK):
            with contextlib.suppress(OSError), open(path.with_name(name), "r+b") as lock:
                if not _try_to_lock(lock):
                    return True
    return False


def _new_lock(parent: Path, start: str) -> tuple[Path, IO[bytes]]:
    """A new lock file that this process holds."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=start, suffix=LOCK, dir=parent)
        lock = open(descriptor, "r+b")  # noqa: SIM115
        try:
            # another process may have taken it for left over before it was locked
            if _try_to_lock(lock) and os.path.exists(name):
                return Path(name), lock
        except OSError:  # a file system without locks, on which nothing is taken for left over
            return Path(name), lock
        lock.close()


def _remove(folder: Path, lock_file: Path, lock: IO[bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()
    with contextlib.suppress(OSError):
        lock_file.unlink()


def remove_abandoned(parent: Path, pattern: str = f"{PREFIX}*") -> list[Path]:
    """Remove and return the folders `pattern` in `parent` whose owners are gone; others' are left alone."""
    removed = []
    for file in parent.glob(pattern + LOCK) if fcntl else ():
        folder = file.with_name(file.name.removesuffix(LOCK))
        # OSError: another user's, removed meanwhile, or on a file system without locks
        with contextlib.suppress(OSError), file.open("r+b") as lock:
            if _try_to_lock(lock):
                shutil.rmtree(folder, ignore_errors=True)
                if not folder.exists():  # else the next one tries again
                    file.unlink()  # while it is locked, so that a process that has just made it notices
                    removed.append(folder)
    return removed


def _try_to_lock(file: IO[bytes]) -> bool:
    """Whether the file is now locked by this process, not by another one; OSError where there are no locks."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
