"""The log of a run, progress bars, and curves.

outputs/<name>/<timestamp>/
  log.txt
  curves/<phase>/{curves.jsonl, events.*}     # phases: reconstruct, csd_edit, in2n, ...; each counts its own steps
"""

import contextlib
import functools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from csd3d.files import make_folder, write_text

Item = TypeVar("Item")
logger = logging.getLogger("csd3d")
file_only = logging.getLogger("csd3d.file")  # to log.txt only: progress, for which the console has a bar


# ------------------------------------------------------------------------------------------------------------- logging


@functools.cache
def console():
    """Return the console (stderr) that log lines and progress bars share, so that they do not overwrite each other."""
    from rich.console import Console

    return Console(stderr=True)


def quiet() -> bool:
    """Whether this is CI (CI=true), where the console shows only warnings and one line a loop; log.txt is complete."""
    return os.environ.get("CI", "").lower() in ("1", "true")


class LogFile(logging.FileHandler):
    """Appends to a log file; a full disk must not end the run here, nor print a traceback for each line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="replace")

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Sends our loggers, and Python's warnings, to folder/log.txt and the console while open.

    What ends the run meanwhile goes to log.txt too, with its traceback.
    """
    from rich.logging import RichHandler

    to_file = LogFile(folder / "log.txt")
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
    parts = [f"{title}: {position}" + (f"/{total}" if total is not None else ""), f"{as_clock(elapsed)} elapsed"]
    if remaining:
        parts.append(f"ETA {as_clock(remaining)}")
    return ", ".join([*parts, detail] if detail else parts)


def _show(line: str) -> None:
    console().print(line, markup=False, highlight=False, soft_wrap=True)
    file_only.info("%s", line)


def as_clock(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any: 1:05 or 2:00:10."""
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
        make_folder(folder)
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


def last_step(run_folder: Path, phase: str) -> int | None:
    """Return the last step in the curves of a phase, None without any."""
    return max((row["step"] for row in _rows(run_folder / "curves" / phase / "curves.jsonl")), default=None)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the lines that are rows of a curve; a kill may have cut the last one, or a hand damaged any."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int and all(map(_is_value, row.values())):
                rows.append(row)
    return rows


def _is_value(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 1e300)
