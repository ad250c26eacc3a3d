"""The run folder, its log, progress bars and curves.

outputs/<name>/<timestamp>/
  config.yaml  cmd.txt  log.txt  environment.json
  curves/<phase>/{curves.jsonl, events.*}     # phases: reconstruct, csd_edit, in2n, ...; each counts its own steps
"""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from csd3d.errors import InputError
from csd3d.files import write_text

Item = TypeVar("Item")
PACKAGES = (
    "csd3d",
    "torch",
    "numpy",
    "diffusers",
    "transformers",
    "safetensors",
    "nerfacc",
    "kornia",
    "trimesh",
    "xatlas",
    "omegaconf",
)
logger = logging.getLogger("csd3d")
file_only = logging.getLogger("csd3d.file")  # to log.txt only: progress, for which the console has a bar


# ---------------------------------------------------------------------------------------------------------- run folder


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
    if target.resolve() == Path.cwd():  # renaming onto it would delete it
        raise InputError(
            f"{target}: cannot be made the run folder (it is the current one); choose another with --output"
        )
    files = {
        "config.yaml": config_yaml,
        "cmd.txt": shlex.join(argv) + "\n",
        "environment.json": json.dumps(environment(), indent=2) + "\n",
        "log.txt": "",
    }
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new-run-", dir=target.parent))
        temporary.chmod(0o755)
        for file, text in files.items():
            (temporary / file).write_text(text, encoding="utf-8")
        return _move(temporary, target, may_renumber=output is None)
    except OSError as error:
        raise InputError(f"{target}: cannot be made the run folder ({_why_not(target, error)})") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, target: Path, may_renumber: bool) -> Path:
    """Rename to a free name or onto an empty folder; runs started in the same second get -2, -3, …"""
    for number in itertools.count(1):
        place = target if number == 1 else target.with_name(f"{target.name}-{number}")
        try:
            return temporary.rename(place)
        except OSError:
            if not (may_renumber and place.exists()):
                raise
    raise AssertionError("unreachable")


def _why_not(target: Path, error: OSError) -> str:
    if target.is_dir() and os.access(target, os.R_OK) and any(target.iterdir()):
        return "it is not empty; choose another with --output, or continue that run with --resume"
    return f"{error.strerror or error}; choose another with --output"


def environment() -> dict[str, Any]:
    """Return versions, processor, threads, accelerator and git commit, as needed to repeat a run."""
    import torch

    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git": _git_commit(Path(__file__).parent),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit(folder: Path) -> str | None:
    """Return the commit csd3d runs from, with `-dirty` if tracked files were changed; None outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=10, check=True, start_new_session=True
        ).stdout.strip()  # a session of its own: Ctrl+C is for this process alone
    except (OSError, subprocess.SubprocessError):
        return None


# ------------------------------------------------------------------------------------------------------------- logging


@functools.cache
def console():
    """Return the console (stderr) that log lines and progress bars share, so that they do not overwrite each other."""
    from rich.console import Console

    return Console(stderr=True)


def quiet() -> bool:
    """Whether this is CI (CI=true), where the console shows only warnings and one line a loop; log.txt is complete."""
    return os.environ.get("CI", "").lower() in ("1", "true")


@contextlib.contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Sends our loggers, and Python's warnings, to folder/log.txt and the console while open.

    What ends the run meanwhile goes to log.txt too, with its traceback.
    """
    from rich.logging import RichHandler

    to_file = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_console = RichHandler(
        logging.WARNING if quiet() else logging.INFO, console(), show_path=False, log_time_format="[%X]"
    )
    to_console.addFilter(lambda record: record.name != file_only.name)
    loggers = [logging.getLogger(name) for name in ("csd3d", "custom_kernels", "py.warnings")]
    levels = [each.level for each in loggers]
    logging.captureWarnings(True)
    try:
        for each in loggers:
            each.setLevel(logging.INFO)
            each.addHandler(to_file)
            each.addHandler(to_console)
        yield
    except BaseException as error:
        file_only.error("the run ended by %s", type(error).__name__, exc_info=error)
        raise
    finally:
        logging.captureWarnings(False)
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
            each.removeHandler(to_file)
            each.removeHandler(to_console)
        to_file.close()


# ------------------------------------------------------------------------------------------------------------ progress


def progress(
    items: Iterable[Item],
    title: str,
    *,
    total: int | None = None,
    done: int = 0,
    describe: Callable[[], str] = str,
    interval: float = 10.0,
) -> Iterator[Item]:
    """Yield `items` under a progress bar with ETA; without a terminal print a line every `interval` seconds.

    The lines also go to log.txt.

    Args:
        total: number of items including `done`; default len(items) + done.
        done: number of items that a resumed loop has done before.
        describe: returns the text behind a line: `lambda: f"loss {loss:.4f}"`.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items) + done
    bar = console().is_terminal and not quiet()
    show = file_only.info if bar else _show
    lines = _progress_lines(items, title, total, done, describe, 60.0 if quiet() else interval, show)
    return _progress_bar(lines, title, total, done, describe) if bar else lines


def _progress_bar(
    items: Iterable[Item], title: str, total: int | None, done: int, describe: Callable[[], str]
) -> Iterator[Item]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    text = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[detail]}", markup=False)
    columns = text[0], BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), text[1]
    with Progress(*columns, console=console()) as bar:
        task = bar.add_task(title, total=total, completed=done, detail="")
        for item in items:
            yield item
            bar.update(task, advance=1, detail=describe())


def _progress_lines(
    items: Iterable[Item],
    title: str,
    total: int | None,
    done: int,
    describe: Callable[[], str],
    interval: float,
    show: Callable[[str], None],
) -> Iterator[Item]:
    start = last = time.monotonic()
    count, shown, first = 0, -1, None

    def line(now: float) -> str:
        # without the first step, which also pays for set-up
        pace = (now - first) / (count - 1) if first is not None and count >= 3 else None
        remaining = pace * (total - done - count) if pace is not None and total is not None else None
        return _line(title, done + count, total, now - start, remaining, describe())

    for item in items:
        yield item
        count += 1
        now = time.monotonic()
        first = now if first is None else first
        if now - last >= interval:
            last, shown = now, count
            show(line(now))
    if shown != count:
        show(line(time.monotonic()))


def _line(title: str, position: int, total: int | None, elapsed: float, remaining: float | None, detail: str) -> str:
    parts = [f"{title}: {position}" + (f"/{total}" if total is not None else ""), f"{_clock(elapsed)} elapsed"]
    if remaining:
        parts.append(f"ETA {_clock(remaining)}")
    return ", ".join([*parts, detail] if detail else parts)


def _show(line: str) -> None:
    console().print(line, markup=False, highlight=False, soft_wrap=True)
    file_only.info("%s", line)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


# -------------------------------------------------------------------------------------------------------------- curves


class Curves:
    """Scalars over the steps of one phase, written to TensorBoard and to curves.jsonl, which the report draws.

    A phase that resumes at step `first` removes what an earlier process wrote for the steps from `first` on.
    """

    def __init__(self, run_folder: Path, phase: str, first: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_folder / "curves" / phase
        folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in _rows(folder / "curves.jsonl") if row["step"] < first]
        write_text(folder / "curves.jsonl", "".join(json.dumps(row) + "\n" for row in kept), sync=True)
        for old in folder.glob("events.*"):  # rewritten from curves.jsonl: a killed process had not flushed all events
            old.unlink()
        self._lines = (folder / "curves.jsonl").open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(folder), purge_step=0, flush_secs=10)  # purge: for an open TensorBoard
        for row in kept:
            self._write_events(
                row["step"], {tag: math.nan if v is None else v for tag, v in row.items() if tag != "step"}
            )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write {tag: value} at a step; values that are not finite become null, as JSON has no NaN."""
        values = {tag: float(value) for tag, value in values.items()}
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._lines.write(json.dumps({"step": step, **finite}) + "\n")
        self._lines.flush()
        self._write_events(step, values)

    def _write_events(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self._lines.close()
        self._writer.close()

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_curves(run_folder: Path) -> dict[str, dict[str, list[tuple[int, float | None]]]]:
    """Return {phase: {tag: [(step, value), ...]}} of everything that a run has written so far."""
    curves: dict[str, dict[str, list[tuple[int, float | None]]]] = {}
    for path in sorted(run_folder.glob("curves/*/curves.jsonl")):
        series = curves.setdefault(path.parent.name, {})
        for row in _rows(path):
            step = row.pop("step")
            for tag, value in row.items():
                series.setdefault(tag, []).append((step, value))
    return curves


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines; a kill may have cut the last one."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows
