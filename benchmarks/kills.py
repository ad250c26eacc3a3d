"""Kill runs of every task at random moments, resume them from other folders, and compare with unbroken runs.

`python -m benchmarks.kills [--kills N] [--seed S] [--json FILE]`

Jobs are those of tests/tiny_jobs.py. A process that has imported everything forks one child for each start and resume
and kills it (SIGKILL) at a random moment. Each run is killed 1 to 4 times, then resumed to its end. Its metrics.json
(without times and memory) and its pictures, videos, meshes and curves must equal those of an unbroken run, and no
temporary file may be left. Exits with 1 if anything differs or a resume fails.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import tiny_jobs  # noqa: E402 (of the tests)
from tiny_models import save_tiny_pipeline  # noqa: E402

from csd3d import files  # noqa: E402
from csd3d.report import models  # noqa: E402
from csd3d.run import load_plugins  # noqa: E402, F401 (imports what the children need)
from csd3d.world.dataset import write_capture  # noqa: E402
from csd3d.world.scene import Scene  # noqa: E402
from launch import main as launch  # noqa: E402

SUFFIXES = (".png", ".mp4", ".glb", ".obj", ".mtl", ".ply", ".jsonl")
LIMIT_S = 600.0  # of one process


@dataclass
class Killed:
    """One run: how often it was killed, and what was wrong at its end."""

    task: str
    kills: list[str] = field(default_factory=list)  # where each found it: no folder, before the first checkpoint, …
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Run the benchmark and print a table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models.SMALL_SIDE = 0  # nobody looks at the turntables
    with tempfile.TemporaryDirectory(prefix="csd3d-kills-") as place:
        runs, left_bytes = kill_runs(Path(place), args.kills, random.Random(args.seed))
    print(f"{'task':16} kills runs faults")
    for task in tiny_jobs.CASES:
        own = [run for run in runs if run.task == task]
        kills, faults = (sum(len(getattr(run, key)) for run in own) for key in ("kills", "faults"))
        print(f"{task:16} {kills:5} {len(own):4} {faults:6}")
    faults = [f"{run.task}: {fault}" for run in runs for fault in run.faults]
    print(*faults, f"{left_bytes} bytes left in TMPDIR", sep="\n")
    if args.json:
        rows = [vars(run) for run in runs]
        files.write_text(args.json, json.dumps({"runs": rows, "left_in_tmpdir": left_bytes}, indent=2) + "\n")
    return 1 if faults else 0


def kill_runs(place: Path, kills: int, chance: random.Random) -> tuple[list[Killed], int]:
    """Run every task unbroken, then kill runs in turn until there were `kills`; also the bytes left in TMPDIR."""
    priors = {kind: save_tiny_pipeline(place / kind, kind) for kind in ("edit", "text")}
    write_capture(place / "capture", Scene("cube", "yellow", azimuth_deg=20), train=5, test=2, size=32)
    (place / "tmp").mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(place / "tmp")
    whole, seconds, runs = {}, {}, []
    for task in tiny_jobs.CASES:
        config = tiny_jobs.write_job(place / task, task, priors, place / "capture")
        began = time.monotonic()
        code = process(start_of(config, place / task / "whole"), config.parent, place / "log.txt")
        if code != 0:
            raise SystemExit(f"{task}: the unbroken run ended with {code}: {(place / 'log.txt').read_text()[-2000:]}")
        whole[task], seconds[task] = results(place / task / "whole"), time.monotonic() - began
        print(f"{task}: unbroken in {seconds[task]:.1f} s", flush=True)
    while sum(len(run.kills) for run in runs) < kills:
        task = list(whole)[len(runs) % len(whole)]
        run = kill_one(place / task, task, f"run{len(runs)}", seconds[task], chance, place / "log.txt")
        run.faults += differences(whole[task], results(place / task / f"run{len(runs)}")) if not run.faults else []
        runs.append(run)
        print(f"{task}: {run.kills} {run.faults or 'equal'}", flush=True)
    return runs, sum(path.stat().st_size for path in (place / "tmp").rglob("*") if path.is_file())


def kill_one(home: Path, task: str, name: str, seconds: float, chance: random.Random, log: Path) -> Killed:
    """Start a run, kill it some times, each time resuming it from another folder, and let the last resume end."""
    run, folder = Killed(task), home / name
    for number in range(chance.randint(1, 4)):
        command, where = (["--resume", str(folder)], home.parent) if folder.exists() else (None, home)
        command = command or start_of(home / "config.yaml", folder)
        after = chance.uniform(0.0, seconds if number == 0 else 0.7 * seconds)
        if process([*command, "--device", "cpu"], where, log, after) is None:
            run.kills.append(state_of(folder))
    command, where = (["--resume", str(folder)], Path("/")) if folder.exists() else (None, home)
    code = process(command or start_of(home / "config.yaml", folder), where, log)
    if code != 0:
        run.faults.append(f"the last resume ended with {code}: {log.read_text()[-300:]!r}")
    return run


def start_of(config: Path, folder: Path) -> list[str]:
    return ["--config", str(config), "--output", str(folder)]


def process(command: list[str], where: Path, log: Path, kill_after: float | None = None) -> int | None:
    """Run the command line in a fork, in the folder `where`; return its exit code, None if it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            _redirect(log)
            os.chdir(where)
            code = _launched(command)
        os._exit(code)
    deadline = time.monotonic() + (LIMIT_S if kill_after is None else kill_after)
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _redirect(log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)


def _launched(command: list[str]) -> int:
    import traceback

    try:
        return launch(command)
    except BaseException:
        traceback.print_exc()
        raise


def state_of(folder: Path) -> str:
    """How far a killed run had come."""
    if not folder.exists():
        return "before the folder"
    if (folder / "metrics.json").exists():
        return "after the end"
    finished = [*folder.glob("report.html"), *folder.glob("result.*"), *folder.glob("videos/*"), *folder.glob("mesh/*")]
    if finished:
        return "results"
    return "steps" if any(folder.glob("checkpoints/*/checkpoint.json")) else "before a checkpoint"


def results(folder: Path) -> dict[str, object]:
    """The metrics without times and memory, the SHA-256 of every result, and the names of temporary files."""
    found: dict[str, object] = {}
    for path in files_below(folder):
        name = str(path.relative_to(folder))
        if path.suffix in SUFFIXES and not path.name.startswith("preview-"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        if files.LEFT_OVER.fullmatch(path.name) or path.name.startswith("tensors-"):
            found[f"{path.parent.relative_to(folder)}: kept"] = len([*path.parent.glob("tensors-*")])
    metrics = json.loads((folder / "metrics.json").read_text()) if (folder / "metrics.json").exists() else {}
    return found | dict(flat(metrics))


def flat(value: object, key: str = "metrics") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of nested metrics, without times and memory."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in ("seconds", "peak_memory_gib"):
                yield from flat(item, f"{key}.{name}")
    else:
        yield key, value


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def differences(whole: dict[str, object], other: dict[str, object]) -> list[str]:
    """The keys at which two runs differ."""
    return [f"{key} differs" for key in sorted({*whole, *other}) if whole.get(key) != other.get(key)]


if __name__ == "__main__":
    sys.exit(main())
