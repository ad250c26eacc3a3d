"""The field, a step and a view of the shipped scene at several commits, in one run.

Each commit's tree is unpacked and its kernels are built, once, below the system's temporary folder. A child process a
commit fits the scene for the same number of steps; then they take turns, on one thread, by the processor's time.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.field import FIT_STEPS, field_flops, peak_run, processor_seconds
from csd3d.fields import FieldConfig

ROOT = Path(__file__).parent.parent
CHILD = Path(__file__).with_name("commit_child.py")
BASELINE = "c559e0b"  # before the rebuild
COMMITS = (BASELINE, "f5edf1d")  # the second: before the fused field
RUNS = ("field", "step", "view")
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}


def tree(commit: str) -> Path:
    """The tree of a commit with its kernels built; CalledProcessError without the history or a compiler."""
    folder = Path(tempfile.gettempdir()) / f"csd3d-commit-{commit}"
    if not (folder / "built").exists():
        folder.mkdir(exist_ok=True)
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", str(folder)], input=archive, check=True)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=folder, check=True, capture_output=True)
        (folder / "built").touch()
    return folder


class Child:
    """A process in a tree, which times what it is asked to."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", CHILD.read_text(), str(FIT_STEPS)]  # -c: the tree's csd3d is imported
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=folder, env=os.environ | ONE_THREAD, text=True, **pipes)

    def read(self) -> float:
        """The next answer."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args[0]} in {self.process} ended: its tree cannot be timed")
        return float(line)

    def seconds(self, run: str) -> float:
        """Processor time of one run."""
        self.process.stdin.write(f"{run}\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def compare(rounds: int, commits: tuple[str, ...] = COMMITS) -> dict[str, dict[str, float]]:
    """By commit and "today": milliseconds of a step and a view, the field's share of the fp32 peak."""
    folders = {commit: tree(commit) for commit in commits} | {"today": ROOT}
    children = {name: Child(folder) for name, folder in folders.items()}
    try:
        samples = {name: child.read() for name, child in children.items()}
        best = {name: dict.fromkeys(RUNS, float("inf")) for name in children}
        peak, flops = peak_run()
        limit = 0.0
        for turn in range(rounds + 1):
            for run in RUNS:
                for name, child in children.items():
                    seconds = child.seconds(run)
                    if turn:  # the first warms up
                        best[name][run] = min(best[name][run], seconds)
            limit = max(limit, flops / processor_seconds({"peak": peak}, 1)["peak"])
    finally:
        for child in children.values():
            child.close()
    work = field_flops(FieldConfig())
    return {
        name: {
            "step_ms": seconds["step"] * 1e3,
            "view_ms": seconds["view"] * 1e3,
            "field_share_of_peak_fp32": work * samples[name] / seconds["field"] / limit,
            "field_ns_per_sample": seconds["field"] / samples[name] * 1e9,
        }
        for name, seconds in best.items()
    }
