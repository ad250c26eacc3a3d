"""Shared by the benchmarks: where a result comes from, and how a figure is written."""

import shlex
import sys
import time

from csd3d.engine.environment import environment


def provenance(benchmark: str) -> dict:
    """Return the command of a benchmark, the date, and the environment with processor and commit."""
    command = f"python -m benchmarks.{benchmark} {shlex.join(sys.argv[1:])}".strip()
    return {"command": command, "date": time.strftime("%Y-%m-%d"), "environment": environment()}


def cell(value: float | None, digits: int) -> str:
    """Format a figure for a table."""
    return "–" if value is None else f"{value:.{digits}f}"
