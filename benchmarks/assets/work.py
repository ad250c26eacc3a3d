"""Makes the assets of a set, prompt by prompt: each row, prompt and seed is a line of JSON, and is made once.

An asset is made in the run folder WORK/SET/PROMPT/ROW-SEED-…, with its log and images/views.png; a run that was stopped
goes on from its checkpoints, which are deleted when it is judged. No mesh and no video is made.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.assets.rows import Row, config_of
from benchmarks.lines import Line, LineShare, as_text, measured, rounded
from csd3d.engine.logs import logging_to
from csd3d.report.pictures import save_grid
from csd3d.report.text import view_rows
from csd3d.run import opened, opening
from csd3d.tasks.text_to_3d import TextTo3DConfig

VERSION = "assets-2"


@dataclass(frozen=True)
class Asked:
    """The assets of a row for one prompt and seed."""

    row: str
    keys: str  # JSON
    prompt: str
    seed: int

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two of them the same."""
        return {"version": VERSION, **self.given}

    @property
    def given(self) -> dict[str, Any]:
        """What is asked for."""
        return {"row": self.row, "keys": json.loads(self.keys), "prompt": self.prompt, "seed": self.seed}

    @property
    def folder(self) -> str:
        """The name of its run folder."""
        digest = hashlib.sha256(as_text(self.given).encode()).hexdigest()[:8]
        return f"{self.row.replace('/', '-')}-{self.seed}-{digest}"


@dataclass
class Share(LineShare):
    """The assets of one prompt, as a process of its own makes them."""

    KEYS: ClassVar[tuple[str, ...]] = ("version", "row", "keys", "prompt", "seed")

    prompt: str
    asked: Sequence[Asked]
    work: Path

    @property
    def name(self) -> str:
        return self.prompt

    @property
    def folder(self) -> Path:
        """Where its runs are."""
        return self.work / re.sub(r"\W+", "-", self.prompt)

    @property
    def file(self) -> Path:
        return self.folder / "lines.jsonl"

    def lines(self, missing: Sequence[Asked]) -> Iterator[Line]:
        for one in missing:
            folder = self.folder / one.folder
            yield rounded(measured(one.identity, lambda one=one, at=folder: made(one, at)))


def ask(rows: Mapping[str, Row], prompts: Sequence[str], seeds: Sequence[int], work: Path) -> list[Share]:
    """The shares of rows, a prompt each; the first seed of all rows comes before the second."""
    keys = {name: as_text(row.as_keys) for name, row in rows.items()}
    return [
        Share(prompt, [Asked(name, keys[name], prompt, seed) for seed in seeds for name in rows], work)
        for prompt in prompts
    ]


def made(one: Asked, folder: Path) -> Mapping[str, Any]:
    """Make the assets in a folder, or go on with them, and return their figures."""
    return make(config_of(json.loads(one.keys), one.prompt, one.seed), folder)


def make(config: TextTo3DConfig, folder: Path) -> dict[str, Any]:
    """Make a config's assets; the figures of its method, with the seconds of a core, and what is nearest to them."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    with opening(lambda: opened(config, "auto")) as job, logging_to(folder):
        job.folder = folder
        done = job.run_phases()
        found = job.measure(done)
        titles = {name: run.title for name, run in config.runs.items()}
        save_grid(folder / "images" / "views.png", view_rows(config, job.views, titles))
    (name,) = config.runs
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {
        **found["results"][name],
        "cpu_seconds": time.process_time() - began,
        "nearest": found["nearest"][name],
        "judge": found["judge"],
    }
