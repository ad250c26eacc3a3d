"""Temporary folders of decoded videos, which hold gigabytes and which a killed process leaves behind.

The owner of a folder holds a lock on a file in it. The system frees the lock when the process ends in any way, so
that a folder whose lock is free is left over, and is removed when the next video is opened.
"""

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing left over is looked for
    fcntl = None

PREFIX = "csd3d-video-"
LOCK = "lock"


class FrameCache:
    """A temporary folder `path` below TMPDIR, removed by `close` or when the process ends.

    Removes what killed processes left there. Raises OSError if TMPDIR cannot be written.
    """

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        remove_abandoned(parent)
        # `remove_abandoned` finds it only under its second name, when it is locked
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
        self.path = parent / made.name.removeprefix(".")
        try:
            lock = (made / LOCK).open("wb")
            _try_to_lock(lock)
            made.rename(self.path)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        self.close = weakref.finalize(self, _remove, self.path, lock)


def _remove(folder: Path, lock: IO[bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove and return the folders in `parent` whose owners are gone; those of other users are left alone."""
    removed = []
    for folder in parent.glob(f"{PREFIX}*") if fcntl else ():
        try:
            lock = (folder / LOCK).open("r+b")
        except OSError:  # another user's, or removed meanwhile
            continue
        with lock:
            if _try_to_lock(lock):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


def free_bytes(folder: Path) -> int:
    """The bytes that may still be written in a folder."""
    return shutil.disk_usage(folder).free


def _try_to_lock(file: IO[bytes]) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
