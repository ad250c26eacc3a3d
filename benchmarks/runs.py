"""Shared by the benchmarks: runs that are not repeated once finished, and tables of their figures."""

import json
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from csd3d import run as jobs
from csd3d.engine.run_folder import environment
from csd3d.files import write_text
from csd3d.interrupt import StopRequest


def finished_run(config: Path, keys: list[str], folder: Path, seed: int) -> dict:
    """Return metrics.json of the run in `folder`, after starting or resuming it if it is not finished."""
    metrics = folder / "metrics.json"
    if metrics.exists() and json.loads(metrics.read_text())["finished"]:
        return json.loads(metrics.read_text())
    stop = StopRequest()
    if folder.exists():
        jobs.resume(folder, [], "auto", stop=stop)
    else:
        jobs.start(config, keys, folder, seed, "auto", stop=stop)
    return json.loads(metrics.read_text())


def write_results(path: Path, runs: list[dict], figures: Iterable[str], overrides: list[str], **others) -> None:
    """Write the runs so far, and the methods' mean figures over them, as JSON."""
    methods = dict.fromkeys(name for run in runs for name in run["results"])
    means = {method: {figure: mean(runs, method, figure) for figure in figures} for method in methods}
    result = {"environment": environment(), "overrides": overrides, "mean": means, **others, "runs": runs}
    write_text(path, json.dumps(result, indent=2) + "\n")


def provenance(benchmark: str) -> dict:
    """Return the command of a benchmark, the date, and the environment with processor and commit."""
    command = f"python -m benchmarks.{benchmark} {shlex.join(sys.argv[1:])}".strip()
    return {"command": command, "date": time.strftime("%Y-%m-%d"), "environment": environment()}


def mean(runs: list[dict], method: str, figure: str) -> float | None:
    """Return the mean of a figure of one method, over the runs that have it."""
    values = [run["results"][method].get(figure) for run in runs if method in run["results"]]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def mean_table(runs: list[dict], figures: dict[str, tuple[str, int]]) -> list[str]:
    """Markdown lines: a row a method, the mean over all runs of `figures` (key -> label, decimals)."""
    lines = [f"| mean of {len(runs)} runs | {' | '.join(label for label, _ in figures.values())} |"]
    lines += ["|" + "---|" * (len(figures) + 1)]
    for method in dict.fromkeys(name for run in runs for name in run["results"]):
        cells = [cell(mean(runs, method, figure), digits) for figure, (_, digits) in figures.items()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def cell(value: float | None, digits: int) -> str:
    """Format a figure for a table."""
    return "–" if value is None else f"{value:.{digits}f}"
