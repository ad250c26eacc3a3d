"""Loops that may be killed at any step: state, checkpoints, curves, progress and stopping."""

import functools
import math
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from csd3d import fingerprint
from csd3d.engine.checkpoint import OTHERWISE, check_checkpoint, has_checkpoint, load_checkpoint, save_checkpoint
from csd3d.engine.environment import another_version
from csd3d.engine.logs import Curves, as_clock, last_step, logger, progress
from csd3d.engine.outlook import Outlook
from csd3d.engine.run_folder import check_kinds
from csd3d.engine.state import check_alike, pack, restore, snapshot, unpack
from csd3d.errors import InputError, at_key
from csd3d.identity import Defining, defining_values
from csd3d.interrupt import StopRequest

MAX_SKIPPED = 5  # steps in a row that were not finite, before a phase gives up
MOST_COUNTED = 2**53
Advance = Callable[[int, Curves], dict[str, float]]  # does a step and returns values to log; "skipped" > 0: not finite


@dataclass(kw_only=True)
class Job:
    """A run of a task. Subclasses hold what the task has opened."""

    config: Any  # with `seed` and `save_seconds`
    device: torch.device
    prior: Any = None  # counts its `unet_evaluations`, if there is one
    folder: Path = field(default_factory=Path)  # set before it runs, as is `stop`
    stop: StopRequest = field(default_factory=StopRequest)
    contents: dict[str, str] = field(default_factory=dict)  # fingerprints of inputs, by their paths in the config
    warned: Sequence[str] = ()  # what its log begins with and its report shows; at first, of its opening
    asked_device: str = ""  # "auto" where the device was left to csd3d
    phase: str = ""  # the one that runs

    @property
    def identity(self) -> Defining:
        """The values that a checkpoint of this run depends on, with the content of files in place of their paths."""
        return defining_values(self.config, self.content_of)

    def own_identity(self, name: str, thing: Any) -> Defining:
        """The same for one part of the config, such as an editor; its keys begin with `name`."""
        return defining_values(thing, self.content_of).below(name)

    def content_of(self, path: str) -> str:
        """The fingerprint of the input at `path`, as it was when first asked for."""
        if path not in self.contents:
            files = getattr(self.prior, "files", None) if path == self.config.prior.model else None
            self.contents[path] = fingerprint.of_files(files) if files else fingerprint.of_path(path)
        return self.contents[path]

    def identity_of(self, name: str) -> Defining:
        """The values that the checkpoint of one phase depends on; tasks add the settings of that phase alone."""
        return self.identity

    def check_checkpoints(self, names: Iterable[str]) -> None:
        """Raise InputError where a phase has a checkpoint that is damaged or of another run, or cannot have one."""
        for name in names:
            check_kinds(self.folder, (f"checkpoints/{name}", f"curves/{name}"), (f"curves/{name}/curves.jsonl",))
            if has_checkpoint(folder := self.folder / "checkpoints" / name):
                check_checkpoint(folder, identity=self.identity_of(name))

    def may_run(self, name: str) -> bool:
        """Whether to run or show a phase: after a stop request only if it has a checkpoint."""
        return not self.stop.requested or has_checkpoint(self.folder / "checkpoints" / name)

    @functools.cached_property
    def outlook(self) -> Outlook:
        """How long the rest of the run will take, from `config.costs`; without them every phase costs the same."""
        config = self.config
        return Outlook(getattr(config, "costs", None) or dict.fromkeys(getattr(config, "phases", ()), 1.0))

    def announce(self, name: str, note: str = "", share: float = 1.0) -> None:
        """Log that a phase begins, its number among `config.phases`, and how long the rest of the run will take.

        share: of the phase, what is left to do.
        """
        self.phase, phases = name, list(getattr(self.config, "phases", ()))
        place = f"phase {phases.index(name) + 1} of {len(phases)}: " if name in phases else ""
        left = self.outlook.begin(name, share)
        rest = "" if left is None else f"; about {as_clock(left)} left in all"
        logger.info("%s%s%s%s", place, name, note, rest)

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator for one purpose, seeded by the run's seed and the purpose."""
        return seeded_generator(self.config.seed, purpose)


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """Return a random generator for one purpose of a run with this seed."""
    # one hash of both, as torch seeds a CPU generator with 32 bits only
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}".encode()))


@dataclass
class Phase:
    """The state of one loop, all of which its checkpoint holds.

    Subclasses add fields and name them in PARTS (what has a state_dict), TENSORS or COUNTERS. A counter may be added in
    a release: older checkpoints lack it, and it has its value at the start then.
    """

    generator: torch.Generator
    steps: int | None = None  # the total, set once it runs; not in the checkpoint
    step: int = 0
    seconds: float = 0.0
    unet_evaluations: int = 0
    skipped: int = 0
    kernel_mean: float | None = None  # mean kernel value between different particles at the first step they share in

    PARTS: ClassVar[tuple[str, ...]] = ("generator",)
    TENSORS: ClassVar[tuple[str, ...]] = ()
    COUNTERS: ClassVar[dict[str, tuple[type, ...]]] = {  # each from 0 on
        "step": (int,),
        "seconds": (float, int),
        "unet_evaluations": (int,),
        "skipped": (int,),
        "kernel_mean": (float, int, type(None)),
    }

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.steps

    def note(self, report: Mapping[str, float]) -> None:
        """Keep what the figures need of a step's report."""
        if self.kernel_mean is None and report.get("together") and math.isfinite(report["kernel_mean"]):
            self.kernel_mean = report["kernel_mean"]

    @property
    def figures(self) -> dict[str, float]:
        """What metrics.json says of the phase itself."""
        shared = {} if self.kernel_mean is None else {"kernel_mean": self.kernel_mean}
        return {**shared, "unet_evaluations": self.unet_evaluations, "seconds": self.seconds}

    def save(self, folder: Path, name: str, identity: dict) -> None:
        """Write checkpoint `name`, whole or not at all."""
        plain = {key: getattr(self, key) for key in (*self.COUNTERS, *self.TENSORS)}
        save_checkpoint(folder, name, *pack(snapshot(**self._parts()) | plain), identity=identity)

    def load(self, folder: Path, name: str, identity: dict) -> None:
        """Restore checkpoint `name`, if there is one; InputError where its state is none that a run could have."""
        if not has_checkpoint(folder / name):
            return
        tensors, state = load_checkpoint(folder / name, identity=identity)
        with at_key(str(folder / name)):
            tree = unpack(tensors, state)
            if isinstance(tree, dict):
                self._check_known(tree, folder.parent)
                tree = {key: getattr(self, key) for key in self.COUNTERS if key != "step"} | tree
            if wrong := self._wrong(tree):
                raise InputError(f"damaged ({wrong}); {OTHERWISE}")
            restore(tree, **self._parts())
        for key in (*self.COUNTERS, *self.TENSORS):
            setattr(self, key, tree[key])

    def _check_known(self, tree: Mapping[Any, Any], run_folder: Path) -> None:
        """Raise InputError where a saved tree has something that only another release keeps, and would be lost."""
        unknown = [key for key in tree if key not in (*self.COUNTERS, *self.TENSORS, *self.PARTS)]
        if unknown:
            by = another_version(run_folder) or "another version of csd3d"
            what = f"it holds {unknown[0]!r:.40}, which this csd3d does not keep"
            raise InputError(f"{what}: the run was made by {by}; resume with that version")

    def _wrong(self, tree: Any) -> str | None:
        """What is wrong with the counters and tensors of a saved tree; None if nothing is."""
        if not isinstance(tree, dict):
            return f"its state is a {type(tree).__name__}"
        most = {"step": MOST_COUNTED if self.steps is None else self.steps, "skipped": tree.get("step")}
        for key, kinds in self.COUNTERS.items():
            value, limit = tree.get(key), most.get(key, MOST_COUNTED)
            if key not in tree or type(value) not in kinds or not (value is None or 0 <= value <= limit):
                what = "a number" if float in kinds else "a whole number"
                return f"{key} is {value!r:.40}, expected {what} from 0{f' to {limit}' if key in most else ''}"
        for key in self.TENSORS:
            own, saved = getattr(self, key), tree.get(key)
            try:
                check_alike(saved, own, key)
            except ValueError as error:
                return str(error)
            if saved.shape != own.shape:
                return f"{key}: is of shape {tuple(saved.shape)}, expected {tuple(own.shape)}"
        return None

    def _parts(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in self.PARTS if getattr(self, key) is not None}


def run_steps(job: Job, phase: Phase, name: str, steps: int, advance: Advance, describe: Callable[[], str]) -> None:
    """Run a phase from its checkpoint, or its start, to its last step, and write checkpoints on the way.

    After a stop request a phase with a checkpoint takes no step, and one without takes a single step, so that there is
    something to show. Raises InputError after five steps in a row that were not finite.
    """
    folder = job.folder / "checkpoints"
    phase.steps = steps
    phase.load(folder, name, job.identity_of(name))
    if not phase.step and (reached := last_step(job.folder, name)) is not None:
        logger.warning("%s: its curves go up to step %d, but it has no checkpoint: it starts afresh", name, reached)
    left_alone = phase.finished or (job.stop.requested and phase.step > 0)
    note = f", {phase.step} of {steps} steps done before" if phase.step else ""
    job.announce(name, note, 0.0 if left_alone else 1 - phase.step / max(steps, 1))
    if left_alone:
        return
    in_a_row, save = 0, _saver(job, phase, folder, name)
    with Curves(job.folder, name, phase.step) as curves:
        for step in progress(range(phase.step, steps), name, total=steps, done=phase.step, describe=describe):
            before = job.prior.unet_evaluations if job.prior else 0
            report = advance(step, curves)
            phase.unet_evaluations += job.prior.unet_evaluations - before if job.prior else 0
            phase.note(report)
            in_a_row = in_a_row + 1 if report["skipped"] else 0
            phase.skipped += int(report["skipped"])
            phase.step = step + 1
            if step % 10 == 0:
                curves.add(step, report)
            if in_a_row == MAX_SKIPPED:
                raise InputError(_not_finite(folder / name, name, step))
            save(now=job.stop.requested)
            if job.stop.requested:
                return
        save(now=True)


def all_finished(phases: Mapping[str, Phase], wanted: Iterable[str]) -> bool:
    """Whether every wanted phase is there and finished."""
    return all(name in phases and phases[name].finished for name in wanted)


def _saver(job: Job, phase: Phase, folder: Path, name: str) -> Callable[..., None]:
    """Return a function that saves the phase `now` or every config.save_seconds; saving is not in its seconds.

    Where a save takes long, as of a large capture, the next one waits: saves take at most 5 % of the time.
    """
    clock, took = time.monotonic(), 0.0

    def save(now: bool) -> None:
        nonlocal clock, took
        elapsed = time.monotonic() - clock
        if now or elapsed > max(job.config.save_seconds, 19 * took):
            phase.seconds += elapsed
            began = time.monotonic()
            phase.save(folder, name, job.identity_of(name))
            clock = time.monotonic()
            took = clock - began

    return save


def _not_finite(checkpoint: Path, name: str, step: int) -> str:
    """The message when a phase gives up."""
    last = f"the last good checkpoint is {checkpoint}" if has_checkpoint(checkpoint) else "there is no checkpoint yet"
    failure = f"{MAX_SKIPPED} steps in a row up to {step} had no finite loss or gradient"
    return f"{name}: {failure}; lower its learning_rate ({last})"


def peak_memory_gib() -> float:
    """Return the peak resident memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def forget_peak(device: torch.device) -> None:
    """Let the peak of a card's memory begin anew, with this job."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return metrics.json's figures of memory: of this process, and what torch took of the card, where one is used."""
    found = {"peak_memory_gib": peak_memory_gib()}
    if device.type == "cuda":
        found["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found
