"""Kill runs of every task at random moments, resume them from other folders, and compare with unbroken runs.

`python -m benchmarks.kills [--kills N] [--seed S] [--job NAME …] [--json FILE]`

Jobs are those of tests/tiny_jobs.py. A process that has imported everything forks one child for each start and resume.
The unbroken run of a job tells how long each of its phases takes, by its log: the opening, those that take steps, and
those that write results. Kills go to the phases that had fewest so far. When the child's log says that the phase has
begun, a random share of its time passes, and the child gets SIGKILL. A kill that came after the end is not counted.

Each run is killed up to 4 times, each time resumed from another folder, some times with its own folder moved, and then
resumed to its end. Its metrics.json (without times and memory) and its pictures, videos, meshes, poses and curves must
equal those of an unbroken run, and no temporary file may be left. Exits with 1 if anything differs or a resume fails.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import tiny_jobs  # noqa: E402 (of the tests)
from tiny_models import save_tiny_pipeline  # noqa: E402

from benchmarks.runs import provenance  # noqa: E402
from csd3d import files  # noqa: E402
from csd3d.report import models  # noqa: E402
from csd3d.run import load_plugins  # noqa: E402, F401 (imports what the children need)
from csd3d.world.dataset import write_capture  # noqa: E402
from csd3d.world.scene import Scene  # noqa: E402
from launch import main as launch  # noqa: E402

JOBS = tiny_jobs.CASES | tiny_jobs.MORE
SUFFIXES = (".png", ".mp4", ".glb", ".obj", ".mtl", ".ply", ".jsonl")
RESULTS = ("camera_path.json", "scene.json")  # those of the files in JSON that are results
ANNOUNCED = re.compile(r" csd3d: phase \d+ of \d+: ([\w+]+)")
BEFORE, AFTER = ("opening", "encode"), ("evaluate", "results", "video", "mesh", "report")  # all others take steps
MOST_KILLS = 4  # of one run
LIMIT_S = 600.0  # of one process


@dataclass
class Job:
    """One job and what its unbroken run showed."""

    name: str
    home: Path
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase, in order
    whole: dict[str, object] = field(default_factory=dict)  # its results
    pace: float = 0.8  # part of a phase's time in which kills come; halved when one comes too late
    runs: int = 0  # so far
    kills: Counter = field(default_factory=Counter)  # so far, by phase

    def dealt(self, count: int, chance: random.Random) -> list[str]:
        """Draw that many phases, of those with the fewest kills, in the order in which they run."""
        phases = chance.sample(list(self.seconds), len(self.seconds))
        return sorted(sorted(phases, key=self.kills.__getitem__)[:count], key=list(self.seconds).index)


@dataclass
class Killed:
    """One run: in which phases it was killed, and what was wrong at its end."""

    job: str
    kills: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Run the benchmark and print a table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", nargs="*", choices=JOBS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models.SMALL_SIDE = 0  # nobody looks at the turntables
    with tempfile.TemporaryDirectory(prefix="csd3d-kills-") as place:
        runs, left_bytes = kill_runs(Path(place), args.job or list(JOBS), args.kills, random.Random(args.seed))
    table = {name: summary([run for run in runs if run.job == name]) for name in args.job or JOBS}
    print(f"{'job':24} kills runs faults")
    for name, row in table.items():
        print(f"{name:24} {sum(row['kills'].values()):5} {row['runs']:4} {row['faults']:6}")
    faults = [f"{run.job}: {fault}" for run in runs for fault in run.faults]
    print(*faults, f"{left_bytes} bytes left in TMPDIR", sep="\n")
    if args.json:
        kinds = Counter(kind_of(phase) for run in runs for phase in run.kills)
        record = provenance("kills") | {"seed": args.seed, "kills": kinds.total(), "runs": len(runs)}
        record |= {"kills_by_kind": kinds, "jobs": table, "faults": faults, "bytes_left_in_tmpdir": left_bytes}
        files.write_text(args.json, json.dumps(record, indent=1) + "\n")
    return 1 if faults else 0


def summary(runs: list[Killed]) -> dict[str, object]:
    """Kills by phase, runs and faults of one job."""
    kills = Counter(phase for run in runs for phase in run.kills)
    return {"kills": dict(sorted(kills.items())), "runs": len(runs), "faults": sum(len(run.faults) for run in runs)}


def kill_runs(place: Path, names: list[str], kills: int, chance: random.Random) -> tuple[list[Killed], int]:
    """Run every job unbroken, then kill runs in turn until there were `kills`; also the bytes left in TMPDIR."""
    priors = {kind: save_tiny_pipeline(place / kind, kind) for kind in ("edit", "text")}
    write_capture(place / "capture", Scene("cube", "yellow", azimuth_deg=20), train=5, test=2, size=32)
    (place / "tmp").mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(place / "tmp")
    jobs, runs, log = [], [], place / "log.txt"
    for name in names:
        job = Job(name, place / name)
        config = tiny_jobs.write_job(job.home, name, priors, place / "capture")
        watch = Watch(job.home / "whole")
        if (code := process(start_of(config, watch.folder), job.home, log, watch)) != 0:
            raise SystemExit(f"{name}: the unbroken run ended with {code}: {log.read_text()[-2000:]}")
        job.whole, job.seconds = results(watch.folder), watch.seconds()
        jobs.append(job)
        print(f"{name}: unbroken, seconds", {key: round(s, 1) for key, s in job.seconds.items()}, flush=True)
    while (done := sum(len(run.kills) for run in runs)) < kills:
        job = min(jobs, key=lambda each: each.runs / len(each.seconds))
        runs.append(kill_one(job, f"run{len(runs)}", min(MOST_KILLS, kills - done), chance, log))
        print(f"{done:4} {job.name}: {runs[-1].kills} {runs[-1].faults or 'equal'}", flush=True)
    return runs, sum(path.stat().st_size for path in files_below(place / "tmp"))


def kill_one(job: Job, name: str, kills: int, chance: random.Random, log: Path) -> Killed:
    """Start a run, kill it some times, each time resuming it from another folder, and let the last resume end."""
    run, folder, order = Killed(job.name), job.home / name, list(job.seconds)
    for phase in job.dealt(kills, chance):
        if run.kills and order.index(run.kills[-1]) > order.index(phase):
            continue  # the kill before came late, when this phase was over
        watch = Watch(folder, until=(phase, chance.uniform(0.0, job.pace) * job.seconds[phase]))
        others = (job.home.parent, log.parent / "tmp", Path("/"))
        code = process(command_of(job, folder), chance.choice(others) if folder.exists() else job.home, log, watch)
        if watch.ended:  # the kill came too late, or the process failed, which the last resume shows too
            job.pace /= 2
            break
        run.kills.append(watch.phase)
        if folder.exists() and chance.random() < 0.3:
            folder = folder.rename(folder.with_name(f"{folder.name}-moved"))
    job.kills.update(run.kills)
    job.runs += 1
    where = Path("/") if folder.exists() else job.home  # the config names its inputs relative to its own folder
    code = process(command_of(job, folder), where, log, Watch(folder))
    if code != 0:
        run.faults.append(f"the last resume ended with {code}: {log.read_text()[-300:]!r}")
    run.faults += differences(job.whole, results(folder)) if not run.faults else []
    return run


def kind_of(phase: str) -> str:
    """Whether a phase comes before the steps, takes steps, or writes results."""
    return "before the steps" if phase in BEFORE else "results" if phase in AFTER else "steps"


def command_of(job: Job, folder: Path) -> list[str]:
    """The command that continues a run, or starts it if it has no folder yet."""
    return ["--resume", str(folder)] if folder.exists() else start_of(job.home / "config.yaml", folder)


def start_of(config: Path, folder: Path) -> list[str]:
    return ["--config", str(config), "--output", str(folder)]


class Watch:
    """Follows one process by what it appends to the log of its run, and says when to kill it."""

    def __init__(self, folder: Path, until: tuple[str, float] | None = None) -> None:
        self.folder, self.until = folder, until
        self.log = folder / "log.txt"
        self.skip = self.log.stat().st_size if self.log.exists() else 0
        self.seen = [("opening", time.monotonic())]
        self.ended = False

    @property
    def phase(self) -> str:
        return self.seen[-1][0]

    def look(self) -> bool:
        """Read the log; return whether it is time for the kill."""
        told = self.log.read_bytes()[self.skip :].decode(errors="replace") if self.log.exists() else ""
        for name in ANNOUNCED.findall(told)[len(self.seen) - 1 :]:
            self.seen.append((name, time.monotonic()))
        self.ended = " csd3d: done after " in told
        begun = [at for name, at in self.seen if self.until and name == self.until[0]]
        return bool(begun) and time.monotonic() - begun[0] >= self.until[1]

    def seconds(self) -> dict[str, float]:
        """How long each phase took, once the process has ended."""
        ends = [at for _, at in self.seen[1:]] + [time.monotonic()]
        return {name: end - at for (name, at), end in zip(self.seen, ends, strict=True)}


def process(command: list[str], where: Path, log: Path, watch: Watch) -> int | None:
    """Run the command line in a fork, in the folder `where`; return its exit code, None if it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            _redirect(log)
            os.chdir(where)
            code = _launched([*command, "--device", "cpu"])
        os._exit(code)
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and not watch.look():
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            watch.look()
            watch.ended = True
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    watch.look()
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


def results(folder: Path) -> dict[str, object]:
    """The metrics without times and memory, the SHA-256 of every result, and the names of temporary files."""
    found: dict[str, object] = {}
    for path in files_below(folder):
        name = str(path.relative_to(folder))
        if (path.suffix in SUFFIXES and not path.name.startswith("preview-")) or path.name in RESULTS:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        if files.LEFT_OVER.fullmatch(path.name) or path.name.startswith("tensors-"):
            found[f"{path.parent.relative_to(folder)}: kept"] = len([*path.parent.glob("tensors-*")])
    metrics = json.loads((folder / "metrics.json").read_text()) if (folder / "metrics.json").exists() else {}
    return found | dict(flat(metrics))


def flat(value: object, key: str = "metrics") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of nested metrics, without times and memory."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in ("seconds", "peak_memory_gib", "peak_gpu_memory_gib"):
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
