"""Does the runs of a sweep through submitit: on this machine, a few at a time, or on a SLURM cluster."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csd3d.devices import FORMS, choose_device, is_device
from csd3d.errors import InputError, one_line
from csd3d.sweep.grid import Run, Sweep

if TYPE_CHECKING:
    from submitit import Executor, Job
    from submitit.helpers import DelayedSubmission

INSTALL = 'pip install -c constraints.txt -e ".[sweep]"'
ROOT = Path(__file__).parents[2]
MONTH_MIN = 30 * 24 * 60  # a limit is needed
POLL_S = 1.0


@dataclass
class Task:
    """One run as submitit calls it, in a process of its own: started, or resumed where its folder is there."""

    config: str
    overrides: list[str]
    folder: str
    device: str

    def __call__(self) -> str:
        """Return "", or the one line of bad input."""
        from csd3d import run as jobs
        from csd3d.interrupt import StopRequest

        try:
            if (Path(self.folder) / "config.yaml").is_file():
                jobs.resume(Path(self.folder), [], self.device, stop=StopRequest())
            else:
                jobs.start(Path(self.config), self.overrides, Path(self.folder), None, self.device, stop=StopRequest())
        except InputError as error:
            return one_line(error, 500)
        return ""

    def checkpoint(self) -> "DelayedSubmission":
        """What SLURM does after a timeout or preemption: the same again, which resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def finished(folder: Path) -> bool:
    """Whether a run is done."""
    try:
        return bool(json.loads((folder / "metrics.json").read_text())["finished"])
    except (OSError, ValueError, KeyError):
        return False


def do_runs(
    sweep: Sweep, folder: Path, on: str, jobs: int, retries: int, device: str, tell: Callable[[str], None]
) -> dict[str, str]:
    """Do all runs that are not finished, in `folder`/NAME; return the errors of those that failed, by name.

    Raises InputError where submitit or SLURM is not there.
    """
    executor_of = executors(folder / "logs", on, sweep.slurm, jobs)
    make_folder(folder)
    waiting = [run for run in sweep.runs if not finished(folder / run.name)]
    tell(f"{len(sweep.runs)} runs, {len(sweep.runs) - len(waiting)} finished before; {folder}")
    at_once = jobs if on == "local" else len(waiting)
    running: dict[int, tuple[Job[str], Run]] = {}
    left, errors = {run.name: retries for run in waiting}, {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                slot = next(i for i in range(at_once) if i not in running)
                run = waiting.pop(0)
                task = Task(str(sweep.config.absolute()), run.overrides, str((folder / run.name).absolute()), device)
                running[slot] = executor_of(slot).submit(task), run
                tell(f"{run.name} started: {run.values}")
            time.sleep(POLL_S)
            for slot, (job, run) in [(slot, pair) for slot, pair in running.items() if pair[0].done()]:
                del running[slot]
                problem, killed = outcome(job)
                if killed and left[run.name]:
                    left[run.name] -= 1
                    waiting.append(run)
                    tell(f"{run.name} was killed, and is resumed")
                    continue
                if problem:
                    errors[run.name] = problem
                tell(f"{run.name} {'failed: ' + problem if problem else 'done'}")
    finally:
        if on == "local":  # jobs of a cluster go on
            for job, _ in running.values():
                job.cancel()
    return errors


def check_device(name: str, on: str) -> None:
    """Raise InputError for what is no device; on this machine also for one that is not there."""
    if not is_device(name):
        raise InputError(f"--device: {name!r} is none of {FORMS}")
    if on == "local":
        choose_device(name, "--device")


def make_folder(folder: Path) -> None:
    """Make the folder of a sweep; InputError where it cannot be, or where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be made the folder of the sweep ({error.strerror}); choose another with --output"
        ) from None


def outcome(job: "Job[str]") -> tuple[str, bool]:
    """The error of a job that has ended, "" if there is none; and whether it was killed, so that trying again helps."""
    try:
        return job.result(), False
    except Exception as error:  # of any kind: submitit's if there is no result
        # a traceback from inside the run ends with its reason; a killed process leaves none
        stderr = (job.stderr() or "").strip().splitlines()
        reason = stderr[-1] if stderr and "Error" in stderr[-1] else ""
        return reason or one_line(error) or type(error).__name__, type(error).__name__ == "UncompletedJobError"


def executors(logs: Path, on: str, slurm: dict[str, Any], jobs: int) -> "Callable[[int], Executor]":
    """A function that gives the executor for a place among the jobs that run at once: locally each has a GPU.

    The logs of a local job are files of `logs` that begin with its number; SLURM makes a folder of each.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError(f"csd3d sweep needs the package submitit ({error}): {INSTALL}") from None
    path = os.environ.get("PYTHONPATH", "")
    if str(ROOT) not in path.split(os.pathsep):  # the jobs' processes import csd3d from where this one has it
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), path)))
    if on == "slurm":
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise InputError("--on slurm: sbatch and srun are not there; run this on a login node, or --on local")
        executor = submitit.AutoExecutor(folder=str(logs / "%j"), cluster="slurm")
        try:
            executor.update_parameters(**slurm)
        except (NameError, TypeError, ValueError) as error:
            raise InputError(f"slurm: {one_line(error)}") from None
        return lambda _slot: executor
    import torch

    class LocalExecutor(submitit.LocalExecutor):
        """Starts jobs whose controllers write into the logs: after Ctrl+C each would show its traceback."""

        def _submit_command(self, command: str) -> "Job[Any]":
            with stderr_into(logs / "controllers.err"):
                return super()._submit_command(command)

    def local(slot: int) -> "Executor":
        executor = LocalExecutor(folder=str(logs))  # with %j submitit makes a folder of that very name too
        cards = torch.cuda.device_count()
        gpu = {"gpus_per_node": 1, "visible_gpus": [slot % cards]} if cards else {}
        executor.update_parameters(timeout_min=MONTH_MIN, **gpu)
        return executor

    return local


@contextmanager
def stderr_into(path: Path) -> Iterator[None]:
    """Processes that are started meanwhile write their stderr at the end of a file."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with path.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
