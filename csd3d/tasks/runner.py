"""Runs an opened job: phases, metrics, files.

A task is a registered config. Its `open` opens everything before any work is done:

    @register("task", "edit_scene")
    @dataclass
    class EditSceneConfig:
        phases: list[str]                       # in order, for the banner
        def open(self, device) -> TaskJob: ...  # raises InputError for anything wrong with the input
"""

import json
import time
from pathlib import Path
from typing import Protocol

from csd3d.engine.phase import Job, Phase, all_finished, peak_memory
from csd3d.files import write_text
from csd3d.priors.loading import EXACT


class TaskJob(Protocol):
    """What the runner needs of a `Job` of some task."""

    config: object
    folder: Path
    wanted: list[str]  # the names of its phases

    def run_phases(self) -> dict[str, Phase]:
        """Run the phases, each from its checkpoint; after a stop request return those that have something to show."""

    def measure(self, done: dict[str, Phase]) -> dict:
        """Return the task's part of metrics.json: "results", "seconds" of its phases, and more."""

    def save(self, done: dict[str, Phase], metrics: dict) -> None:
        """Write pictures, videos, meshes and the report; may add to `metrics`."""


def run(job: TaskJob | Job) -> None:
    """Do the whole job in its folder; after a stop request, finish with what there is."""
    job.check_checkpoints(job.wanted)
    done = job.run_phases()
    worked = time.monotonic()
    job.announce("evaluate")
    config = job.config
    metrics = {"task": config.task, "prompt": config.told, "finished": all_finished(done, job.wanted)}
    if getattr(getattr(config, "prior", None), "model", "").endswith(EXACT):
        metrics["prior"] = job.prior.family  # so that no table takes its figures for a network's
    metrics |= job.measure(done)
    measured = time.monotonic()
    phases = metrics["seconds"] | {"evaluate": measured - worked}
    write_metrics(job, dict(metrics), phases)  # what was measured is kept even if a file cannot be written
    job.save(done, metrics)
    write_metrics(job, metrics, phases | {"export": time.monotonic() - measured})


def write_metrics(job: TaskJob | Job, metrics: dict, seconds: dict[str, float]) -> None:
    """Write metrics.json whole, with the seconds of each part, their sum, and the memory so far."""
    metrics["seconds"] = seconds | {"total": sum(seconds.values())}
    metrics |= peak_memory(job.device)
    write_text(job.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n", sync=True)
