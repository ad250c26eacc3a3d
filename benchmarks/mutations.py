"""Damage every kind of input at random, and count what csd3d makes of it.

`python -m benchmarks.mutations [--count N] [--kind NAME …] [--seed S] [--keep DIR] [--json FILE]`

Kinds: config, capture, picture, video, checkpoint, prior, world, run (a finished run, exported). Each input is opened
in a fork of this process whose address space may grow by 1 GiB. Right are two outcomes: it is opened, or refused by an
InputError of one line. Anything else (another exception, a crash, over 20 s) is a fault; of each sort of fault the
first input is kept in DIR, with no more mutations than it needs. Exits with 1 if there was a fault.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import tiny_jobs  # noqa: E402 (of the tests)
from tiny_models import save_tiny_pipeline  # noqa: E402

from benchmarks.mutating import Mutation, draw, mutate  # noqa: E402
from csd3d import run as jobs  # noqa: E402
from csd3d.datasets import SceneConfig, load_capture  # noqa: E402
from csd3d.engine.checkpoint import load_checkpoint, pack, save_checkpoint, unpack  # noqa: E402
from csd3d.errors import InputError  # noqa: E402
from csd3d.files import write_text  # noqa: E402
from csd3d.interrupt import StopRequest  # noqa: E402
from csd3d.media import encode, open_video, read_image  # noqa: E402
from csd3d.priors import PriorConfig, load_prior  # noqa: E402
from csd3d.report import models  # noqa: E402
from csd3d.world.dataset import read_scene, true_answers, write_capture  # noqa: E402
from csd3d.world.render import camera_row, render  # noqa: E402
from csd3d.world.scene import Scene  # noqa: E402

MEMORY = 1 << 30  # bytes by which the address space may grow
LIMIT_S = 20
BATCH = 25  # inputs of one fork


@dataclass
class Sort:
    """The inputs of one kind: a folder that is copied, the files in it that are damaged, and how it is opened."""

    folder: Path
    targets: list[str]
    use: Callable[[Path, str], object]  # (folder, the damaged file)
    weight: int = 1


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    counts: Counter = field(default_factory=Counter)
    faults: dict[str, list[str]] = field(default_factory=dict)  # description: [file and mutations of the smallest]


def main() -> int:
    """Run the benchmark and print a table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--kind", nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("outputs/mutations"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models.SMALL_SIDE = 0
    with tempfile.TemporaryDirectory(prefix="csd3d-mutations-") as place:
        sorts = make_inputs(Path(place))
        sorts = {name: sorts[name] for name in args.kind or sorts}
        total, found = sum(sort.weight for sort in sorts.values()), {}
        for name, sort in sorts.items():
            count = max(1, round(args.count * sort.weight / total))
            found[name] = run_sort(name, sort, count, args.seed, Path(place) / "work", args.keep)
            print(f"{name:11}", dict(found[name].counts), flush=True)
            for fault, (smallest, *_) in found[name].faults.items():
                print(f"  {fault}\n    {smallest}", flush=True)
    if args.json:
        rows = {name: {"counts": tally.counts, "faults": tally.faults} for name, tally in found.items()}
        write_text(args.json, json.dumps(rows, indent=2) + "\n")
    return 1 if any(tally.faults for tally in found.values()) else 0


# -------------------------------------------------------------------------------------------------------------- inputs


def make_inputs(place: Path) -> dict[str, Sort]:
    """Write a whole input of every kind."""
    capture, prior = place / "capture", place / "prior"
    write_capture(capture, Scene("cube", "yellow", azimuth_deg=20), train=5, test=2, size=32)
    save_tiny_pipeline(prior, "edit")
    pictures = _pictures(place / "pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)
    (place / "videos").mkdir()
    encode(place / "videos" / "a.mp4", pixels, 24)
    tree = {"step": 7, "adam": {0: {"exp_avg": torch.ones(3)}}, "betas": (0.9, 0.999)}
    save_checkpoint(place / "checkpoint", "last", *pack(tree), identity={"seed": 0})
    job = tiny_jobs.write_job(place / "job", "edit_image", {"edit": prior}, capture)
    keys = [f"image={place}/job/photo.png", f"prior.model={place}/prior"]
    with contextlib.redirect_stderr(io.StringIO()):
        jobs.start(job, keys, place / "run", None, "cpu", stop=StopRequest())
    configs = shutil.copytree(ROOT / "configs", place / "configs", ignore=shutil.ignore_patterns("paper", "real"))
    (place / "world").mkdir()
    shutil.copy(capture / "world.json", place / "world")
    return {
        "config": Sort(configs, _names(configs, "*.yaml"), lambda folder, file: _read_config(folder / file), 8),
        "capture": Sort(capture, ["transforms.json"] * 9 + ["images/000.png"], _load_capture, 6),
        "picture": Sort(pictures, _names(pictures, "*"), lambda folder, file: read_image(folder / file), 8),
        "video": Sort(place / "videos", ["a.mp4"], _read_video, 1),
        "checkpoint": Sort(place / "checkpoint", _names(place / "checkpoint", "last/*"), _load_checkpoint, 5),
        "prior": Sort(prior, _names(prior, "**/*.*"), _load_prior, 2),
        "world": Sort(place / "world", ["world.json"], _read_world, 4),
        "run": Sort(place / "run", RUN_FILES, _export, 1),
    }


RUN_FILES = ["config.yaml", "environment.json", "cmd.txt", "log.txt", "metrics.json", "curves/csd_edit/curves.jsonl"]


def _names(folder: Path, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob(pattern) if path.is_file())


def _pictures(folder: Path) -> Path:
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (12, 17, 4), dtype=np.uint8)
    rgb = Image.fromarray(pixels[..., :3])
    Image.fromarray(pixels).save(folder / "alpha.png")
    rgb.convert("P").save(folder / "palette.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(folder / "grey16.png")
    for suffix in ("jpg", "webp", "tif", "bmp"):
        rgb.save(folder / f"rgb.{suffix}")
    rgb.save(folder / "lzw.tiff", compression="tiff_lzw")
    return folder


def _read_config(path: Path) -> object:
    return jobs.read(path, [])


def _load_capture(folder: Path, _file: str) -> object:
    return load_capture(SceneConfig(path=str(folder)))


def _read_video(folder: Path, file: str) -> None:
    with open_video(folder / file) as video:
        for number in range(min(video.count, 50)):
            video.frames([number])


def _load_checkpoint(folder: Path, _file: str) -> object:
    return unpack(*load_checkpoint(folder / "last", identity={"seed": 0}))


def _load_prior(folder: Path, _file: str) -> None:
    prior = load_prior(PriorConfig(str(folder), device="cpu"), require="edit")
    prior.condition(["", "a red it"])


def _read_world(folder: Path, _file: str) -> None:
    scene = read_scene(folder)
    if scene is not None:
        for answer in (scene, *true_answers(scene, "paint it blue")[:1]):
            render([answer], np.stack([camera_row(20.0, 30.0, 4.0, 40.0, 16)]), 16, 16)


def _export(folder: Path, _file: str) -> None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        jobs.export(folder, [], "cpu", stop=StopRequest())


# -------------------------------------------------------------------------------------------------------------- trying


def run_sort(name: str, sort: Sort, count: int, seed: int, work: Path, keep: Path) -> Tally:
    """Try `count` damaged inputs of one kind, in forks of a few each; keep the smallest of each sort of fault."""
    tally, done = Tally(), 0
    while done < count:
        outcomes, size = _batch(name, sort, range(done, min(done + BATCH, count)), seed, work)
        done += size
        for number, outcome in outcomes:
            told = outcome if outcome in ("success", "InputError") else "fault"
            tally.counts[told] += 1
            if told == "fault":
                _keep_smallest(name, sort, number, seed, outcome, tally, work, keep)
    return tally


def case(sort: Sort, number: int, name: str, seed: int) -> tuple[str, list[Mutation]]:
    """The damaged file and the mutations of one input, which depend on its number alone."""
    chance = random.Random(f"{seed}/{name}/{number}")
    return chance.choice(sort.targets), draw(chance)


def _batch(name: str, sort: Sort, numbers: range, seed: int, work: Path) -> tuple[list[tuple[int, str]], int]:
    """Try inputs in one fork, up to the first that kills it."""
    cases = [(number, *case(sort, number, name, seed)) for number in numbers]
    outcomes = _forked(sort, [(file, mutations) for _, file, mutations in cases], work)
    return list(zip(numbers, outcomes, strict=False)), len(outcomes)


def _forked(sort: Sort, cases: list[tuple[str, list[Mutation]]], work: Path) -> list[str]:
    """The outcome of each case, up to the first that kills the fork."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        with contextlib.suppress(BaseException):
            _limit_memory()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            for file, mutations in cases:
                os.write(send, (json.dumps(_attempt(sort, file, mutations, work)) + "\n").encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as lines:
        outcomes = [json.loads(line) for line in lines]
    _, status = os.waitpid(pid, 0)
    if len(outcomes) < len(cases):
        outcomes.append(f"the process ended with {os.waitstatus_to_exitcode(status)}")
    return outcomes


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class TooSlow(BaseException):
    """Raised by the alarm."""


def _attempt(sort: Sort, file: str, mutations: list[Mutation], work: Path) -> str:
    """Damage a copy, open it, and describe what happened: success, InputError, or the error with its place."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(sort.folder, work)
    (work / file).write_bytes(mutate((work / file).read_bytes(), mutations, file))
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(LIMIT_S)
    try:
        sort.use(work, file)
        return "success"
    except InputError as error:
        lines = getattr(error, "lines", [str(error)])
        return (
            "InputError" if all("\n" not in line and len(line) < 2000 for line in lines) else f"lines: {error!r:.300}"
        )
    except BaseException as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/csd3d/" in frame.filename]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
        return f"{type(error).__name__} at {place}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    finally:
        signal.alarm(0)


def _too_slow(*_: object) -> None:
    raise TooSlow


def _keep_smallest(
    name: str, sort: Sort, number: int, seed: int, outcome: str, tally: Tally, work: Path, keep: Path
) -> None:
    """Drop mutations while the fault stays, and keep the file if it is the first of its sort."""
    file, mutations = case(sort, number, name, seed)
    sort_of_fault = outcome.partition(": ")[0]
    if sort_of_fault in tally.faults:
        tally.faults[sort_of_fault].append(f"{file} {number}")
        return
    for one in list(mutations):
        fewer = [other for other in mutations if other is not one]
        if fewer and _forked(sort, [(file, fewer)], work)[0].partition(": ")[0] == sort_of_fault:
            mutations = fewer
    kept = keep / f"{name}-{number}-{Path(file).name}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(mutate((sort.folder / file).read_bytes(), mutations, file))
    tally.faults[sort_of_fault] = [f"{outcome}; {file}, kept as {kept}"]


if __name__ == "__main__":
    sys.exit(main())
