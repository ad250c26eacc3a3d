"""Edit a captured scene by an instruction: reconstruct, edit by each method, measure, export.

Each phase (reconstruct, then one a method) is a fit of a scene to pictures and checkpoints itself under its own name;
a resumed run finds finished phases finished and goes on in the one it was killed in.
"""

import copy
import dataclasses
import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from csd3d.datasets import Capture, SceneConfig, load_capture
from csd3d.editors.updates import UPDATERS, UpdateConfig, ViewEditor
from csd3d.engine.logs import Curves
from csd3d.engine.phase import Job, Phase, run_steps
from csd3d.evaluation.ground_truth import load_truth
from csd3d.evaluation.scene import evaluate_edit, evaluate_reconstruction
from csd3d.fields import FieldConfig
from csd3d.priors import DiffusersPrior, PriorConfig, load_prior
from csd3d.registry import register
from csd3d.rendering import RenderConfig
from csd3d.report.scene import ExportConfig, save_results, save_strip
from csd3d.representations.hashgrid import (
    FitConfig,
    Pictures,
    SceneModel,
    check_patches,
    fit_step,
    learning_rate,
    make_optimiser,
)

logger = logging.getLogger("csd3d")


@register("task", "edit_scene", title="Edit of a captured scene")
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

    @property
    def told(self) -> str:
        """What is asked for, in words."""
        return self.prompt

    def open(self, device: torch.device) -> "EditJob":
        """Opens everything that can be wrong before any work is done: the capture and the prior."""
        capture = load_capture(self.scene)
        check_patches(self.update.fit, capture)
        prior = load_prior(dataclasses.replace(self.prior, device=str(device)), require="edit")
        return EditJob(config=self, device=device, capture=capture, prior=prior)

    @property
    def phases(self) -> list[str]:
        """What a run goes through, in order."""
        return ["reconstruct", *self.methods, "evaluate", "video", "mesh", "report"]


@dataclass(kw_only=True)
class EditPhase(Phase):
    """The fit of a scene to pictures, which an edit replaces as it goes."""

    model: SceneModel
    optimiser: torch.optim.Adam
    images: Tensor
    samples_per_ray: float = 512.0

    PARTS = (*Phase.PARTS, "model", "optimiser")
    TENSORS = ("images",)
    COUNTERS = (*Phase.COUNTERS, "samples_per_ray")


@dataclass(kw_only=True)
class EditJob(Job):
    """A run of this task, on its capture."""

    capture: Capture
    prior: DiffusersPrior

    @property
    def wanted(self) -> list[str]:
        return ["reconstruct", *self.config.methods]

    def run_phases(self) -> dict[str, Phase]:
        """Reconstructs the scene, then edits it by each method."""
        source = reconstruct(self)
        done = {"reconstruct": source}
        editor = ViewEditor(self.prior, self.capture, self.config.prompt, self.config.update.keep_detail)
        # An edit starts from the finished reconstruction, or a resumed run could not start it from the same.
        for method in self.config.methods if source.finished else ():
            if self.may_run(method):
                done[method] = edit(self, editor, source.model, method)
        return done

    def measure(self, done: dict[str, Phase]) -> dict:
        """Reconstruction against the held-out photos; each edit against the truth, and its views against each other."""
        source, edited = split(done)
        self.truth = load_truth(self.capture, self.config.prompt)
        main, results = self.config.update.method, {}
        for method, phase in edited.items():
            figures = evaluate_edit(phase.model, source.model, phase.images, self.capture, self.truth)
            results[method] = figures | {"unet_evaluations": phase.unet_evaluations, "seconds": phase.seconds}
        seconds = {
            "reconstruct": source.seconds,
            "edit": edited[main].seconds if main in edited else 0.0,
            "compare": sum(phase.seconds for method, phase in edited.items() if method != main),
        }
        reconstruction = evaluate_reconstruction(source.model, self.capture)
        return {"seconds": seconds, "reconstruction": reconstruction, "results": results}

    def save(self, done: dict[str, Phase], metrics: dict) -> None:
        """Pictures, videos, mesh and report."""
        save_results(self, *split(done), self.truth, metrics)

    def new_phase(self, name: str, images: Tensor, fit: FitConfig, start: SceneModel | None = None) -> EditPhase:
        """A phase at its first step: a new scene, or a copy of `start`."""
        config, generator = self.config, self.generator(name)
        if start is None:
            box = (self.capture.aabb, generator, self.capture.unbounded)
            model = SceneModel(config.field, config.render, *box).to(self.device)
        else:
            model = copy.deepcopy(start)
        return EditPhase(generator, model=model, optimiser=make_optimiser(model, fit), images=images.clone())


def split(done: dict[str, Phase]) -> tuple[EditPhase, dict[str, EditPhase]]:
    """The reconstruction, and the edits by method."""
    return done["reconstruct"], {name: phase for name, phase in done.items() if name != "reconstruct"}


def reconstruct(job: Job) -> EditPhase:
    """Fits the scene to the capture as it is."""
    fit = job.config.reconstruct
    phase = job.new_phase("reconstruct", job.capture.images, fit)
    fit_phase(job, phase, "reconstruct", fit)
    return phase


def edit(job: EditJob, editor: ViewEditor, source: SceneModel, method: str) -> EditPhase:
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

    fit_phase(job, phase, method, config.fit, update, editor.prior.features)
    return phase


def fit_phase(job: EditJob, phase: EditPhase, name: str, fit: FitConfig, update=None, features=None) -> None:
    """Runs the steps that are left of a phase; `update(step, curves)` comes before each, and may replace pictures."""
    report: dict[str, float] = {}
    pictures = Pictures(phase.images, job.capture.cameras, job.capture.masks, job.capture.train)

    def advance(step: int, curves: Curves) -> dict[str, float]:
        pictures.images = phase.images  # a resumed phase has brought its own
        if update is not None:
            update(step, curves)
        for group in phase.optimiser.param_groups:
            group["lr"] = learning_rate(fit, step, fit.steps)
        phase.model.grid.update(step, phase.model.field, phase.generator)
        parts = (phase.model, phase.optimiser, pictures, fit, phase.generator, phase.samples_per_ray, features)
        report.update(fit_step(*parts))
        phase.samples_per_ray = report["samples_per_ray"]
        return report

    run_steps(job, phase, name, fit.steps, advance, lambda: f"psnr {report.get('psnr', 0):.1f} dB")
