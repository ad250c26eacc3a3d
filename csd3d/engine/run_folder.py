"""The run folder: made in one step, held by one process at a time, and what is told when it cannot be written.

outputs/<name>/<timestamp>/
  config.yaml  cmd.txt  environment.json      # besides these the log, checkpoints and results
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shlex
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from csd3d.engine.checkpoint import remove_remains
from csd3d.engine.environment import environment
from csd3d.engine.logs import logger
from csd3d.errors import InputError
from csd3d.files import never_made_again, remove_partial, write_whole

NEW_RUN = ".new-run-"  # begins the name of a run folder that is being made
OLD_S = 3600.0  # age of one that no process makes any more
FOLDERS = ("checkpoints", "curves", "images", "videos", "mesh")  # what a run folder has, once they are made
FILES = ("log.txt", "metrics.json", "report.html", "scene.json")
IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY}
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


# -------------------------------------------------------------------------------------------------------------- making


def create_run_folder(
    name: str, config_yaml: str, *, output: Path | None = None, argv: Sequence[str] = (), root: Path = Path("outputs")
) -> Path:
    """Make the run folder (`output`, else `root/name/timestamp`) with config.yaml, cmd.txt and environment.json.

    It is assembled under a temporary name and renamed, so that a run folder always has its config.

    Raises:
        InputError: it cannot be written, or `output` is not empty.
    """
    if output is None and (Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name):
        raise InputError(f"name: {name!r} is no folder below {root}/; for a run folder elsewhere there is --output")
    target = output if output is not None else root / name / time.strftime("%Y%m%d-%H%M%S")
    if _is_current(target):  # renaming onto it would delete it
        raise _cannot_be_made(target, "it is the current one")
    files = {
        "config.yaml": config_yaml,
        "cmd.txt": shlex.join(argv) + "\n",
        "environment.json": json.dumps(environment(), indent=2) + "\n",
        "log.txt": "",
    }
    temporary = None
    try:
        os.makedirs(target.parent, exist_ok=True)
        _remove_unfinished(target.parent)
        temporary = Path(tempfile.mkdtemp(prefix=NEW_RUN, dir=target.parent))
        temporary.chmod(0o755)
        for file, text in files.items():
            (temporary / file).write_text(text, encoding="utf-8")
        return _move(temporary, target, may_renumber=output is None)
    except OSError as error:
        raise _cannot_be_made(target, error.strerror or str(error)) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_output(output: Path | None) -> None:
    """Raise InputError, before a model is loaded, if `create_run_folder` could not make `output`."""
    if output is None:
        return
    above = next((folder for folder in output.absolute().parents if os.path.lexists(folder)), Path("/"))
    why = None if os.path.isdir(above) else f"{above} is no folder"
    if os.path.isdir(output):
        with contextlib.suppress(OSError):  # told by `create_run_folder`
            why = "it is not empty" if any(os.scandir(output)) else None
    elif os.path.lexists(output):
        why = "it is no folder"
    if why is not None:
        raise _cannot_be_made(output, why)


def _is_current(target: Path) -> bool:
    try:
        return target.resolve() == Path.cwd()
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        why = getattr(error, "strerror", None) or "its links lead in a circle"
        raise _cannot_be_made(target, why) from None


def _remove_unfinished(parent: Path) -> None:
    """Delete run folders that a killed process has left before they had their name."""
    for left in parent.glob(f"{NEW_RUN}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > OLD_S:
                shutil.rmtree(left)


def _move(temporary: Path, target: Path, may_renumber: bool) -> Path:
    """Rename to a free name or onto an empty folder; runs started in the same second get -2, -3, …"""
    for number in itertools.count(1):
        place = target if number == 1 else target.with_name(f"{target.name}-{number}")
        try:
            return temporary.rename(place)
        except OSError:
            if not (may_renumber and os.path.exists(place)):
                raise
    raise AssertionError("unreachable")


def _cannot_be_made(target: Path, why: str) -> InputError:
    """The error for a place that cannot become a run folder."""
    what = "choose another with --output"
    if os.path.isdir(target) and os.access(target, os.R_OK) and any(target.iterdir()):
        why, what = "it is not empty", f"{what}, or continue that run with --resume"
    return InputError(f"{target}: cannot be made the run folder ({why}; {what})")


# ------------------------------------------------------------------------------------------------------------- holding


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Callable[[str], None]]:
    """Hold a run folder while it is worked in; raises InputError if another process does.

    Yields a function that replaces the text of config.yaml and keeps the lock. The lock is the operating system's, on
    config.yaml, so it ends with its process however that ends. What killed writers have left is deleted, unless
    `check_kinds` refuses the folder. An error of the file system becomes an InputError that says what to do.
    """
    with contextlib.ExitStack() as stack:
        try:
            config = stack.enter_context(open(folder / "config.yaml", "rb"))
            fcntl.flock(config, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(config.fileno()), os.stat(folder / "config.yaml")):
                raise BlockingIOError  # the process before has just replaced it
        except BlockingIOError:
            raise InputError(
                f"{folder}: another process works in this run folder; wait until it ends, or stop it first"
            ) from None
        except FileNotFoundError:
            raise InputError(_deleted(folder)) from None
        except OSError as error:  # a file system without locks
            logger.warning("%s: cannot be locked (%s): start no second run in it", folder, error.strerror)
        stack.enter_context(never_made_again(folder))
        try:
            check_kinds(folder)
            for path in (*remove_partial(folder), *remove_remains(folder / "checkpoints")):
                logger.info("deleted %s, which a process left that was killed", path)
            with _quiet_threads():
                yield lambda text: stack.enter_context(_replace_config(folder / "config.yaml", text))
            if _is_gone(folder):
                raise InputError(_deleted(folder))
        except InputError as error:
            raise (InputError(_deleted(folder)) if _is_gone(folder) else error) from None
        except OSError as error:
            raise InputError(told(folder, error)) from error
        except Exception as error:
            if not _is_gone(folder):
                raise
            raise InputError(_deleted(folder)) from error


def check_kinds(folder: Path, folders: Iterable[str] = FOLDERS, files: Iterable[str] = FILES) -> None:
    """Raise InputError where a name that a run writes is taken by something else, or a folder cannot be read.

    A log that is a link or a pipe is refused: lines would be written to another place, or waited for without end.
    """
    for place in (folder / name for name in folders):
        if os.path.lexists(place) and not os.path.isdir(place):
            raise InputError(f"{place}: must be a folder, as the run writes in it; move what is there away")
        if os.path.isdir(place) and not os.access(place, os.R_OK | os.X_OK):
            raise InputError(f"{place}: cannot be read (no permission); make it readable")
    for place in (folder / name for name in files):
        if os.path.isdir(place):
            raise InputError(f"{place}: must be a file, as the run writes it, and is a folder; move that away")
        if place.name == "log.txt" and os.path.lexists(place) and not stat.S_ISREG(place.lstat().st_mode):
            raise InputError(f"{place}: must be a regular file, no link and no pipe; move what is there away")


@contextlib.contextmanager
def _replace_config(path: Path, text: str) -> Iterator[None]:
    """Write config.yaml whole, locked before it has its name, and hold the lock while open."""
    with contextlib.ExitStack() as stack:

        def write(partial: Path) -> None:
            file = stack.enter_context(open(partial, "w", encoding="utf-8"))
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(text)
            file.flush()

        write_whole(path, write, sync=True)
        yield


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Keep threads from printing tracebacks of errors of the file system.

    TensorBoard writes in a thread, which dies of a full disk; the main thread is told at its next write.
    """
    before = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before


def told(folder: Path, error: OSError) -> str:
    """Say in one line why a run could not write into its folder; raises errors again that are about something else."""
    if _is_gone(folder):
        return _deleted(folder)
    named = os.path.abspath(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
    inside = named is not None and Path(named).is_relative_to(os.path.abspath(folder))
    if not inside and error.errno not in DISK_ERRORS:
        raise error
    place = named if inside else f"{folder} or {tempfile.gettempdir()}" if named is None else named
    what = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
    what = "move away what is in its way" if error.errno in IN_THE_WAY else what
    finished = "what was finished is there"
    return f"{place}: cannot be written ({error.strerror or error}); {finished}: {what}, then --resume {folder}"


def _is_gone(folder: Path) -> bool:
    return not (folder / "config.yaml").exists()


def _deleted(folder: Path) -> str:
    return f"{folder}: the run folder was deleted, or its config.yaml was, while the run worked in it; start it afresh"
