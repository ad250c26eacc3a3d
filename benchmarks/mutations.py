"""Damage every kind of input at random, and count what csd3d makes of it.

`python -m benchmarks.mutations [--count N] [--kind NAME …] [--seed S] [--keep DIR] [--json FILE]`

The kinds are those of benchmarks/mutation_inputs.py. Each input is opened in a fork of this process whose address space
may grow by 1 GiB. Right are two outcomes: it is opened, or refused by an InputError of one line. Anything else (another
exception, a crash, over 20 s of processor time) is a fault; of each sort of fault the first input is kept in DIR, with
no more mutations than it needs. Exits with 1 if there was a fault.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.mutating import Mutation, draw, mutate
from benchmarks.mutation_inputs import Sort, make_inputs
from benchmarks.runs import provenance
from csd3d.errors import InputError
from csd3d.files import write_text
from csd3d.report import models

MEMORY = 1 << 30  # bytes by which the address space may grow
LIMIT_S = 20.0  # of processor time, so that a busy machine makes no faults
WAIT_S = 180  # on the clock
BATCH = 25  # inputs of one fork


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
        check_whole(sorts, Path(place) / "work")
        for name, sort in sorts.items():
            count, began = max(1, round(args.count * sort.weight / total)), time.monotonic()
            found[name] = run_sort(name, sort, count, args.seed, Path(place) / "work", args.keep)
            print(f"{name:11}", dict(found[name].counts), f"{time.monotonic() - began:.0f} s", flush=True)
            for fault, (smallest, *_) in found[name].faults.items():
                print(f"  {fault}\n    {smallest}", flush=True)
    if args.json:
        kinds = {name: tally.counts | {"faults": list(tally.faults)} for name, tally in found.items()}
        sums = sum((tally.counts for tally in found.values()), Counter())
        limits = {"memory_bytes": MEMORY, "seconds": LIMIT_S}
        record = provenance("mutations") | {"seed": args.seed, "limits": limits, "inputs": sums.total(), "all": sums}
        write_text(args.json, json.dumps(record | {"kinds": kinds}, indent=1) + "\n")
    return 1 if any(tally.faults for tally in found.values()) else 0


# -------------------------------------------------------------------------------------------------------------- trying


def check_whole(sorts: dict[str, Sort], work: Path) -> None:
    """Make sure that undamaged inputs open, one of each folder and suffix."""
    for name, sort in sorts.items():
        files = {(Path(file).parent, Path(file).suffix): file for file in sort.targets}.values()
        for file in files:
            if (outcome := _forked(sort, [(file, [])], work)[0]) != "success":
                raise SystemExit(f"{name}: {file}: undamaged, and yet {outcome}")


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
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _too_slow)
    signal.alarm(WAIT_S)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
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
        signal.setitimer(signal.ITIMER_PROF, 0.0)


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
