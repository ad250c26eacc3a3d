"""Edit a captured scene by an instruction: reconstruct, edit by each method, measure, export.

Each phase (reconstruct, then one a method) is a fit of a scene to pictures and checkpoints itself under its own name;
a resumed run finds finished phases finished and goes on in the one it was killed in.
"""

import copy
import dataclasses
import json
import logging
import resource
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from csd3d.checkpoint import (
    has_checkpoint,
    load_checkpoint,
    pack,
    restore,
    save_checkpoint,
    snapshot,
    unpack,
    write_atomically,
)
from csd3d.config import defining_values
from csd3d.errors import InputError
from csd3d.export import MeshConfig
from csd3d.fields import FieldConfig
from csd3d.interrupt import StopRequest
from csd3d.logs import Curves, progress
from csd3d.priors import PriorConfig, load_prior
from csd3d.rendering import RenderConfig
from csd3d.scenes import Capture, SceneConfig, load_capture
from csd3d.tasks.evaluate import evaluate_edit, evaluate_reconstruction
from csd3d.tasks.results import save_results, save_strip
from csd3d.tasks.scene_model import (
    FitConfig,
    Pictures,
    SceneModel,
    check_patches,
    fit_step,
    learning_rate,
    make_optimiser,
)
from csd3d.tasks.truth import Truth, load_truth
from csd3d.tasks.updates import UPDATERS, UpdateConfig, ViewEditor

logger = logging.getLogger("csd3d")
MAX_SKIPPED = 5  # steps in a row that were not finite, before a phase gives up
IGNORED = ("name", "compare", "export", "save_seconds", "prior.device", "prior.micro_batch")


@dataclass
class ExportConfig:
    """What is written at the end: the mesh, and an orbit video before | after."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    video_frames: int = 72
    video_fps: int = 24
    video_elevation_deg: float = 25.0


@dataclass
class EditSceneConfig:
    """The job of `configs/csd-edit-scene.yaml`."""

    task: str = "edit_scene"
    name: str = "edit-scene"
    prompt: str = ""
    seed: int = 0
    scene: SceneConfig = field(default_factory=SceneConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    field: FieldConfig = field(default_factory=FieldConfig)
    render: RenderConfig = dataclasses.field(default_factory=RenderConfig)
    reconstruct: FitConfig = dataclasses.field(default_factory=FitConfig)
    update: UpdateConfig = dataclasses.field(default_factory=UpdateConfig)
    compare: list[str] = dataclasses.field(default_factory=list)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    save_seconds: float = 30.0  # between checkpoints

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError('prompt is empty: say what to change, such as "paint it blue"')
        for method in self.compare:
            if method not in UPDATERS:
                raise ValueError(f"compare names {method!r}: choose among {', '.join(UPDATERS)}")

    @property
    def methods(self) -> list[str]:
        """The methods run, the main one first."""
        return list(dict.fromkeys([self.update.method, *self.compare]))


@dataclass
class Phase:
    """The state of one fit: everything that its checkpoint holds."""

    model: SceneModel
    optimiser: torch.optim.Adam
    generator: torch.Generator
    images: Tensor
    step: int = 0
    seconds: float = 0.0
    unet_evaluations: int = 0
    skipped: int = 0
    samples_per_ray: float = 512.0

    COUNTERS = ("step", "seconds", "unet_evaluations", "skipped", "samples_per_ray")

    def save(self, folder: Path, name: str, identity: dict) -> None:
        """Writes checkpoint `name`, whole or not at all."""
        parts = {"model": self.model, "optimiser": self.optimiser, "generator": self.generator}
        counters = {key: getattr(self, key) for key in self.COUNTERS}
        save_checkpoint(folder, name, *pack(snapshot(**parts) | counters | {"images": self.images}), identity=identity)

    def load(self, folder: Path, name: str, identity: dict) -> None:
        """Restores checkpoint `name`, if there is one."""
        if not has_checkpoint(folder / name):
            return
        tree = unpack(*load_checkpoint(folder / name, identity=identity))
        restore(tree, model=self.model, optimiser=self.optimiser, generator=self.generator)
        self.images = tree["images"]
        for key in self.COUNTERS:
            setattr(self, key, tree[key])


@dataclass
class Job:
    """A run of this task: its config, its folder, the capture, and who may ask it to stop."""

    config: EditSceneConfig
    folder: Path
    capture: Capture
    stop: StopRequest
    device: torch.device

    @property
    def identity(self) -> dict:
        """What a checkpoint of this run depends on."""
        return defining_values(self.config, ignore=IGNORED)

    def generator(self, purpose: str) -> torch.Generator:
        """A generator of its own for each purpose, from the run's seed."""
        # torch seeds a CPU generator with 32 bits only, so both go into one hash
        return torch.Generator().manual_seed(zlib.crc32(f"{self.config.seed}/{purpose}".encode()))

    def new_phase(self, name: str, images: Tensor, fit: FitConfig, start: SceneModel | None = None) -> Phase:
        """A phase at its first step: a new scene, or a copy of `start`."""
        config, generator = self.config, self.generator(name)
        if start is None:
            model = SceneModel(config.field, config.render, self.capture, generator).to(self.device)
        else:
            model = copy.deepcopy(start)
        return Phase(model, make_optimiser(model, fit), generator, images.clone())


def run(config: EditSceneConfig, folder: Path, device: torch.device, stop: StopRequest) -> None:
    """Does the whole job in `folder`, from wherever its checkpoints say it stands; when stopped, with what there is."""
    job, prior = prepare(config, folder, device, stop)
    source = reconstruct(job)
    editor = ViewEditor(prior, job.capture, config.prompt, config.update.keep_detail)
    edited = {}
    # An edit starts from the finished reconstruction, or a resumed run could not start it from the same.
    for method in config.methods if source.step == config.reconstruct.steps else ():
        edited[method] = edit(job, editor, source.model, method)
        if stop.requested:
            break
    started = time.monotonic()
    truth = load_truth(job.capture, config.prompt)
    metrics = measure(job, source, edited, truth)
    evaluated = time.monotonic()
    save_results(job, source, edited, truth, metrics)
    metrics["seconds"] |= {"evaluate": evaluated - started, "export": time.monotonic() - evaluated}
    metrics["seconds"]["total"] = sum(metrics["seconds"].values())
    metrics["peak_memory_gib"] = peak_memory_gib()
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def measure(job: Job, source: Phase, edited: dict[str, Phase], truth: Truth | None) -> dict:
    """metrics.json, but for what is known only after the export."""
    main = job.config.update.method
    results = {}
    for method, phase in edited.items():
        figures = evaluate_edit(phase.model, source.model, phase.images, job.capture, truth)
        results[method] = figures | {"unet_evaluations": phase.unet_evaluations, "seconds": phase.seconds}
    return {
        "task": job.config.task,
        "prompt": job.config.prompt,
        "finished": not job.stop.requested,
        "seconds": {
            "reconstruct": source.seconds,
            "edit": edited[main].seconds if main in edited else 0.0,
            "compare": sum(phase.seconds for method, phase in edited.items() if method != main),
        },
        "reconstruction": evaluate_reconstruction(source.model, job.capture),
        "results": results,
    }


def prepare(config: EditSceneConfig, folder: Path, device: torch.device, stop: StopRequest) -> tuple[Job, object]:
    """Opens everything that can be wrong before any work is done: the capture and the prior."""
    capture = load_capture(config.scene)
    check_patches(config.update.fit, capture)
    prior = load_prior(dataclasses.replace(config.prior, device=str(device)), require="edit")
    return Job(config, folder, capture, stop, device), prior


def reconstruct(job: Job) -> Phase:
    """Fits the scene to the capture as it is."""
    fit = job.config.reconstruct
    phase = job.new_phase("reconstruct", job.capture.images, fit)
    fit_phase(job, phase, "reconstruct", fit, fit.steps)
    return phase


def edit(job: Job, editor: ViewEditor, source: SceneModel, method: str) -> Phase:
    """Edits the scene by one method, starting from the reconstruction."""
    config = job.config.update
    phase = job.new_phase(method, job.capture.images, config.fit, source)
    updater = UPDATERS[method]

    def update(step: int, curves: Curves) -> None:
        before = editor.prior.unet_evaluations
        inner = []
        arguments = (editor, phase.model, phase.images, step, config, phase.generator)
        updater(*arguments, lambda report: inner.append(report))
        phase.unet_evaluations += editor.prior.unet_evaluations - before
        if inner:
            keys = inner[0].keys()
            curves.add(step, {f"edit/{key}": sum(r[key] for r in inner) / len(inner) for key in keys})
            preview = job.folder / "images" / f"preview-{method}.png"
            save_strip(preview, phase.images[job.capture.train[:8]])

    fit_phase(job, phase, method, config.fit, config.fit.steps, update, editor.prior.features)
    return phase


def fit_phase(job: Job, phase: Phase, name: str, fit: FitConfig, steps: int, update=None, features=None) -> None:
    """Runs the steps that are left of a phase; `update(step, curves)` comes before each, and may replace pictures."""
    folder, identity = job.folder / "checkpoints", job.identity
    phase.load(folder, name, identity)
    if phase.step == steps:
        return
    pictures = Pictures(phase.images, job.capture.cameras, job.capture.masks, job.capture.train)
    clock = saved = time.monotonic()
    report: dict[str, float] = {}
    in_a_row = 0

    def describe() -> str:
        return f"psnr {report.get('psnr', 0):.1f} dB"

    def save() -> None:
        nonlocal clock, saved
        now = time.monotonic()
        phase.seconds += now - clock
        phase.save(folder, name, identity)
        clock = saved = time.monotonic()

    with Curves(job.folder, name, phase.step) as curves:
        remaining = range(phase.step, steps)
        for step in progress(remaining, name, total=steps, done=phase.step, describe=describe):
            if update is not None:
                update(step, curves)
            for group in phase.optimiser.param_groups:
                group["lr"] = learning_rate(fit, step, steps)
            phase.model.grid.update(step, phase.model.field, phase.generator)
            report = fit_step(
                phase.model, phase.optimiser, pictures, fit, phase.generator, phase.samples_per_ray, features
            )
            phase.samples_per_ray = report["samples_per_ray"]
            in_a_row = in_a_row + 1 if report["skipped"] else 0
            phase.skipped += int(report["skipped"])
            phase.step = step + 1
            if step % 10 == 0:
                curves.add(step, report)
            if in_a_row == MAX_SKIPPED:
                raise InputError(not_finite(folder / name, name, step))
            if job.stop.requested or time.monotonic() - saved > job.config.save_seconds:
                save()
            if job.stop.requested:
                return
        save()


def not_finite(checkpoint: Path, name: str, step: int) -> str:
    """What to say when a phase gives up."""
    last = f"the last good checkpoint is {checkpoint}" if has_checkpoint(checkpoint) else "there is no checkpoint yet"
    failure = f"{MAX_SKIPPED} steps in a row up to {step} had no finite loss or gradient"
    return f"{name}: {failure}; lower its learning_rate ({last})"


def peak_memory_gib() -> float:
    """The most memory this process has had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
