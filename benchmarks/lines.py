"""Benchmarks whose results are lines of JSON: each is made once, and found again by its identity.

A share of the work has a file of lines of its own and is done by a process of its own, so that a benchmark goes on
where it was stopped. The identity of a line is a mapping that is part of it, such as its row, input and seed.
"""

import argparse
import json
import logging
import math
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from benchmarks.runs import cell
from benchmarks.statistics import Interval, bootstrap
from csd3d.errors import InputError, error_line, one_line
from csd3d.files import write_text
from csd3d.sweep.work import executors, outcome

logger = logging.getLogger("csd3d")
Line = dict[str, Any]
Lines = Sequence[Line]


def as_text(keys: Mapping[str, Any]) -> str:
    """Keys as one line of JSON, which is YAML too."""
    return json.dumps(keys, sort_keys=True)


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `change`, at any depth; null or a value in `change` replaces a mapping."""
    found = dict(base)
    for key, value in change.items():
        inner = found.get(key)
        found[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return found


def rounded(figures: Mapping[str, Any]) -> Line:
    """Figures with six digits, so that files stay small."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in figures.items()}


def measured(line: Line, figures: Callable[[], Mapping[str, Any]]) -> Line:
    """The line with its figures; if making them raises, or one is NaN or inf, with the error and no figures."""
    try:
        found = figures()
        odd = [key for key, value in found.items() if isinstance(value, float) and not math.isfinite(value)]
        if odd:  # it would spoil every mean, and NaN is no JSON
            raise ValueError(f"figures that are not finite: {', '.join(odd)}")
        return line | found
    except Exception as error:  # of any editor or method, also those of plugins
        logger.debug("%s", traceback.format_exc())
        return line | {"error": f"{type(error).__name__}: {one_line(error, 300)}"}


def exit_code(command: Callable[[], int | None]) -> int:
    """Do a benchmark's command: its own code, 0 for None; 2 for bad input, told in a line; 130 after Ctrl+C."""
    try:
        return command() or 0
    except InputError as error:
        print(error_line(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Aborted. The same command goes on with what is left.", file=sys.stderr)
        return 130


# ---------------------------------------------------------------------------------------------------------- doing them


class Asked(Protocol):
    """One line that is asked for."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What makes two lines of a share the same; its keys are `LineShare.KEYS`."""


class LineShare(ABC):
    """The lines that one process makes. Call it again to go on where it was stopped."""

    KEYS: ClassVar[tuple[str, ...]]
    asked: Sequence[Asked]

    @property
    @abstractmethod
    def file(self) -> Path:
        """Where the lines go."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The share in a word or two."""

    @abstractmethod
    def lines(self, missing: Sequence[Any]) -> Iterator[Line]:
        """Make the lines that are asked for and missing."""

    def __call__(self) -> str:
        """Make what is not made yet, and what raised once more; return "", for csd3d.sweep.work."""
        torch.set_num_threads(1)
        done = {key for key, line in self.done().items() if "error" not in line}
        missing = [one for one in self.asked if as_text(one.identity) not in done]
        if missing:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            written = self.file.read_bytes() if self.file.exists() else b""
            cut_off = written and not written.endswith(b"\n")
            with self.file.open("a") as file:
                file.write("\n" if cut_off else "")
                for line in self.lines(missing):
                    file.write(json.dumps(line) + "\n")
                    file.flush()
        return ""

    def done(self) -> dict[str, Line]:
        """The last line of each identity so far, by that as text; one that was cut off does not count."""
        found = {}
        for text in self.file.read_bytes().splitlines() if self.file.exists() else ():
            try:
                line = json.loads(text)
                found[as_text({key: line[key] for key in self.KEYS})] = line
            except (ValueError, KeyError, TypeError):
                continue
        return found


def at_least_one(text: str) -> int:
    """A number of processes, as argparse's `type`: with none, nothing would ever be done."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number, 1 or more")
    return int(text)


def do_shares(shares: Sequence[LineShare], logs: Path, jobs: int, about: str) -> list[Line]:
    """Do shares, `jobs` at a time, each in a process; return the lines that they ask for."""
    waiting, running = list(shares), {}
    start = executors(logs, "local", {}, jobs)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                slot = next(i for i in range(jobs) if i not in running)
                running[slot] = start(slot).submit(waiting[0]), waiting.pop(0)
            time.sleep(1)
            for slot, (job, share) in [(slot, pair) for slot, pair in running.items() if pair[0].done()]:
                del running[slot]
                problem, _ = outcome(job)
                print(f"{about}, {share.name}: {problem or 'done'}", flush=True)
    finally:
        for job, _ in running.values():  # after Ctrl+C they would go on, beside those of the next command
            job.cancel()
    wanted = [{as_text(one.identity) for one in share.asked} for share in shares]
    return [
        line for share, keys in zip(shares, wanted, strict=True) for key, line in share.done().items() if key in keys
    ]


def read_lines(path: Path, place: Sequence[str], version: str) -> list[Line]:
    """The lines of a file, none if it is not there.

    InputError, which names the line, unless each is an object of this `version` with the keys `place`, and none stands
    there twice: they would be counted twice, and figures of two versions do not compare.
    """
    found, seen = [], {}
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        where = f"{path}: line {number}"
        try:
            line = json.loads(text)
        except ValueError as error:
            raise InputError(f"{where}: no whole line of JSON ({one_line(error)}); mend or delete it") from None
        missing = [key for key in ("version", *place) if not isinstance(line, dict) or key not in line]
        if missing:
            raise InputError(f"{where}: has no {', '.join(missing)}; mend or delete it")
        if line["version"] != version:
            told = f"of version {line['version']!r:.40}, but this is {version}"
            raise InputError(f"{where}: {told}; move the lines of other versions to another file")
        first = seen.setdefault(as_text({key: line[key] for key in place}), number)
        if first != number:
            raise InputError(f"{where}: has the same {', '.join(place)} as line {first}; delete one")
        found.append(line)
    return found


def keep_lines(path: Path, lines: Iterable[Line], place: Sequence[str], version: str) -> None:
    """Add lines to a file; they replace those with the same values at the keys `place`. As `read_lines`."""
    lines = list(lines)
    own = {as_text({key: line[key] for key in place}) for line in lines}
    kept = [line for line in read_lines(path, place, version) if as_text({key: line[key] for key in place}) not in own]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept + lines))


# -------------------------------------------------------------------------------------------------------------- tables


def having(lines: Lines, row: str, key: str) -> list[Line]:
    """The lines of a row that have a figure."""
    return [line for line in lines if line["row"] == row and line.get(key) is not None]


def paired(lines: Lines, a: str, b: str, key: str, place: Sequence[str]) -> list[tuple[Line, Line]]:
    """The lines of rows a and b with the same values at the keys `place`, where both have the figure."""
    other = {tuple(line[one] for one in place): line for line in having(lines, b, key)}
    own = [(line, tuple(line[one] for one in place)) for line in having(lines, a, key)]
    return [(line, other[at]) for line, at in own if at in other]


def difference(pairs: Sequence[tuple[Line, Line]], key: str, cluster: str, digits: int = 2) -> str:
    """The mean difference of a figure with its interval, bold where that is clear of 0; a dash without pairs."""
    if not pairs:
        return "–"
    found = bootstrap([a[key] - b[key] for a, b in pairs], [a[cluster] for a, _ in pairs])
    text = f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} … {found.high:+.{digits}f})"
    return f"**{text}**" if found.clear_of_zero else text


def spread(found: Interval, digits: int = 2) -> str:
    """A mean with its interval."""
    return f"{found.mean:.{digits}f} ({found.low:.{digits}f} … {found.high:.{digits}f})"


def mean(lines: Lines, key: str, digits: int) -> str:
    """The mean of a figure over the lines that have it."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return cell(sum(values) / len(values) if values else None, digits)
