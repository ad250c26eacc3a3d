"""Edit a captured scene by an instruction: reconstruct it, edit it by each editor, measure, export.

Each phase (reconstruct, then one for each editor) fits a scene to pictures and has checkpoints under its own name. A
resumed run skips finished phases and continues the one it was killed in.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any, ClassVar

import torch

from csd3d import registry
from csd3d.config import to_yaml
from csd3d.datasets import Capture, SceneConfig, load_capture
from csd3d.editors.fitting import FitPhase, fit_phase, new_phase
from csd3d.editors.scene import SceneEdit, SceneSource, try_out
from csd3d.engine.logs import Curves
from csd3d.engine.phase import Job, Phase
from csd3d.errors import InputError
from csd3d.evaluation.ground_truth import Truth, load_truth
from csd3d.evaluation.scene import evaluate_edit, evaluate_reconstruction, render_judged, source_surface
from csd3d.export import Placement, capture_placement, write_scene_json
from csd3d.identity import Defining
from csd3d.priors import Prior, PriorConfig, load_prior
from csd3d.priors.queries import check_image_scale
from csd3d.registry import register
from csd3d.report.camera_path import looks_at_one_point, video_cameras, write_camera_path
from csd3d.report.charts import charts
from csd3d.report.models import ExportConfig, save_mesh, seen_box
from csd3d.report.page import ReportData, write_report
from csd3d.report.pictures import save_grid, save_strip
from csd3d.report.scene import (
    METRIC_NOTE,
    TRUTH_NOTE,
    Edited,
    SceneResults,
    facts,
    save_pictures,
    save_videos,
    view_rows,
)
from csd3d.report.used import environment_of, used
from csd3d.representations.base import SceneModel, check_opens, ignored_keys, open_scene
from csd3d.representations.fit import FitConfig, check_patches, check_rays
from csd3d.schema import Amount, ByName, Chosen, OneOf, Within, by_name, choose, incidental

SMALLEST = 11  # pixels of a side: the window of SSIM
EDITOR = OneOf("scene_editor", settings="editors")
EDITOR_KEYS = ("editor", "editors", "compare")  # of these, a phase depends on the settings of its own editor alone


def _edit_fit() -> FitConfig:
    rates = {"learning_rate": 5e-3, "final_learning_rate": 5e-4}
    return FitConfig(steps=600, rays=2048, **rates, patches=2, perceptual_weight=0.05)


@register("task", "edit_scene", title="Edit of a captured scene")
@dataclass
class EditSceneConfig:
    """The job of `configs/csd-edit-scene.yaml`."""

    task: str = "edit_scene"
    name: str = incidental("edit-scene")  # name of the run's folder in outputs/
    prompt: str = ""  # the instruction, such as "paint it blue"
    seed: int = 0  # seed of everything random
    plugins: list[str] = incidental(default_factory=list)  # modules, or files that end in .py, that register things
    scene: SceneConfig = field(default_factory=SceneConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    representation: Annotated[Chosen, OneOf("representation")] = field(  # how the scene is represented
        default_factory=lambda: choose("representation", "hashgrid")
    )
    reconstruct: FitConfig = field(default_factory=FitConfig)
    fit: FitConfig = field(default_factory=_edit_fit)
    # shorter side in pixels of the views that the model sees and edits; null: the model's own size
    working_size: Annotated[int, Within(8, 4096)] | None = None
    keep_detail: bool = True  # restore in edited views what the VAE lost of their photos, where nothing was changed
    # settings by editor name
    editors: Annotated[dict[str, Any], ByName("scene_editor")] = incidental(default_factory=dict)
    # the main editor, whose scene is exported as a mesh
    editor: Annotated[Chosen, EDITOR] = field(default_factory=lambda: choose("scene_editor", "csd_edit"))
    # other editors to run for comparison; "NAME+word" runs NAME once more, with other settings
    compare: list[Annotated[Chosen, EDITOR]] = incidental(default_factory=list)
    export: ExportConfig = incidental(default_factory=ExportConfig)
    save_seconds: Amount = incidental(30.0)  # seconds between checkpoints, more where saving takes long

    MOVED: ClassVar[dict[str, str]] = {
        "field": "representation.field",
        "render": "representation.render",
        "update.method": "editor",
        "update.keep_detail": "keep_detail",
        "update.fit": "fit",
        **{
            f"{place}.edit.{key}": f"editors.csd_edit.{key}"
            for place in ("update.csd_edit", "editors.csd_edit", "editor")
            for key in ("text_scale", "image_scale", "baseline")
        },
        "update.csd_edit": "editors.csd_edit",
        "update.in2n": "editors.in2n",
    }

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError('prompt is empty: say what to change, such as "paint it blue"')
        self.chosen  # noqa: B018 (raises where one is named twice)

    @property
    def chosen(self) -> dict[str, Chosen]:
        """The editors to run by name, the main one first."""
        return by_name((self.editor, *self.compare))

    @property
    def methods(self) -> list[str]:
        """The names of the editors, the main one first."""
        return list(self.chosen)

    @property
    def told(self) -> str:
        """The instruction."""
        return self.prompt

    @property
    def phases(self) -> list[str]:
        """The phases of a run, in order."""
        return ["reconstruct", *self.methods, "evaluate", "video", "mesh", "report"]

    @property
    def costs(self) -> dict[str, float]:
        """About what each phase costs, in thousands of fitted samples; an editor's own work three times its fit."""
        fits = [each.steps * each.samples / 1000 for each in (self.reconstruct, self.fit)]
        shown = 55 * (1 + len(self.methods))  # a rendered frame costs about as much as 55 000 fitted samples
        parts = {
            "evaluate": 12 * shown,
            "video": (18 + self.export.video_frames) * shown,
            "mesh": 5000.0,
            "report": 1000.0,
        }
        return {"reconstruct": fits[0], **dict.fromkeys(self.methods, 4 * fits[1]), **parts}

    @property
    def ignored(self) -> list[str]:
        """A warning for each key that the representation does not support."""
        fits = [name for name in ("reconstruct", "fit") if getattr(self, name).distortion_weight]
        return ignored_keys(self.representation, {f"{name}.distortion_weight": "distortion" for name in fits})

    def open(self, device: torch.device) -> "EditJob":
        """Open the capture and the prior; what is wrong with them raises InputError before any work."""
        for key in ("reconstruct", "fit"):
            check_rays(getattr(self, key), self.representation.thing, key, device)
        capture = load_capture(self.scene)
        sides = capture.images.shape[1:3] if capture.places is None else capture.places[:, 2:].flatten().tolist()
        if min(sides) < SMALLEST:
            large = f"a picture has a side of {min(sides)} pixels; expected at least {SMALLEST}"
            raise InputError(f"scene.downscale: {self.scene.downscale:g}: {large}")
        for key in ("reconstruct", "fit"):
            check_patches(getattr(self, key), tuple(capture.images.shape[1:3]), key)
        check_opens(self.representation.thing, capture.aabb, capture.unbounded)
        prior = load_prior(dataclasses.replace(self.prior, device=str(device)), require="edit")
        for name, chosen in self.chosen.items():
            check_image_scale(prior, getattr(chosen.thing, "image_scale", None), f"editors.{name}.image_scale")
        prior.embed_ahead(["", self.prompt])
        source = self.source(prior, capture)
        for name, chosen in self.chosen.items():
            if check := getattr(chosen.thing, "check", None):
                check(source, f"editors.{name}")
        try_out(source)
        truth = load_truth(capture, self.prompt)
        contents = {self.scene.path: capture.fingerprint}
        return EditJob(config=self, device=device, capture=capture, prior=prior, truth=truth, contents=contents)

    def source(self, prior: Prior, capture: Capture) -> SceneSource:
        """What all editors of a run share."""
        return SceneSource(prior, capture, self.prompt, self.keep_detail, self.working_size)


@dataclass(kw_only=True)
class EditJob(Job):
    """A run of this task, on its capture."""

    capture: Capture
    prior: Prior
    truth: Truth | None = None

    @property
    def wanted(self) -> list[str]:
        return ["reconstruct", *self.config.methods]

    def identity_of(self, name: str) -> Defining:
        """The job's identity with the settings of this phase's editor, and of no other editor."""
        values = self.identity.without(EDITOR_KEYS)
        return values | (self.own_identity("editor", self.config.chosen[name]) if name in self.config.chosen else {})

    @property
    def placement(self) -> Placement:
        """Where meshes go: into the capture's own coordinates."""
        capture = self.capture
        return capture_placement(capture.transform.numpy(), capture.scale, capture.aabb.numpy())

    def run_phases(self) -> dict[str, Phase]:
        """Reconstruct the scene, then edit it by each editor."""
        placement, aabb = self.placement, self.capture.aabb.numpy()
        write_scene_json(self.folder / "scene.json", placement, aabb)
        source = reconstruct(self)
        done = {"reconstruct": source}
        # an edit must start from the finished reconstruction, so that a resumed run starts it from the same
        if source.finished:
            self.capture = self.capture.completed(lambda i: source.model.render_views(self.capture.cameras, i).rgb)
        photos = self.config.source(self.prior, self.capture)
        for name in self.config.methods if source.finished else ():
            if self.may_run(name):
                done[name] = edit(self, photos, source.model, name)
        return done

    def measure(self, done: dict[str, Phase]) -> dict:
        """Measure the reconstruction on held-out photos, edits against the truth and for agreement between views."""
        source, edited = split(done)
        main, results = self.config.editor.name, {}
        surface = source_surface(source.model, self.capture) if edited and self.truth is None else None
        self.rendered = {name: render_judged(phase.model, self.capture, name) for name, phase in done.items()}
        for name, phase in edited.items():
            figures = evaluate_edit(self.rendered[name], surface, phase.images, self.capture, self.truth)
            results[name] = figures | phase.figures
        seconds = {
            "reconstruct": source.seconds,
            "edit": edited[main].seconds if main in edited else 0.0,
            "compare": sum(phase.seconds for name, phase in edited.items() if name != main),
        }
        reconstruction = evaluate_reconstruction(self.rendered["reconstruct"], self.capture)
        return {"seconds": seconds, "reconstruction": reconstruction, "results": results}

    def save(self, done: dict[str, Phase], metrics: dict) -> None:
        """Write pictures, videos, the mesh and the report."""
        config, folder, capture = self.config, self.folder, self.capture
        source, phases = split(done)
        seen = self.rendered
        edited = {name: Edited(title(name), phase.model, phase.images, seen[name]) for name, phase in phases.items()}
        results = SceneResults(capture, source.model, seen["reconstruct"], edited, config.editor.name, self.truth)
        self.announce("video")
        cameras = video_cameras(capture, config.export.video_frames)
        save_pictures(folder / "images", results)
        write_camera_path(folder / "videos" / "camera_path.json", cameras, capture, config.export.video_fps)
        videos, before = save_videos(folder / "videos", results, cameras, config.export)
        self.announce("mesh")
        box, photos = capture.aabb, capture.cameras[capture.train]
        if capture.unbounded and config.export.mesh.crop == "none":
            box = box + (box - box.roll(3)) / 2  # twice as large
        elif capture.unbounded and config.export.mesh.crop == "auto" and not looks_at_one_point(photos):
            box = seen_box(results.final, photos, box)
        placed = {"placement": self.placement, "eyes": photos.positions}
        note, turntable, _ = save_mesh(self, results.final, cameras, box, capture.folder.name, **placed)
        self.announce("report")
        rows = view_rows(results, metrics)
        save_grid(folder / "images" / "views.png", rows)
        report = ReportData(
            prompt=config.prompt,
            scene=str(capture.folder.name),
            used=used(self),
            warned=self.warned,
            finished=metrics["finished"],
            before=before,
            after=results.final.render_views(cameras, torch.tensor([0])).rgb[0].clamp(0, 1),
            facts=facts(metrics, results.main),
            view_names=[capture.names[int(i)] for i in results.shown],
            rows=rows,
            methods={name: shown.title for name, shown in edited.items()},
            results=metrics["results"],
            metric_notes=("" if self.truth is None else TRUTH_NOTE) + METRIC_NOTE,
            videos=videos,
            turntable=turntable,
            mesh_note=note,
            curves=charts(folder, (("PSNR of the fit, dB", "psnr"), ("Loss", "loss"))),
            config=to_yaml(config),
            environment=environment_of(folder, self.device),
        )
        write_report(folder / "report.html", report)


def split(done: dict[str, Phase]) -> tuple[FitPhase, dict[str, FitPhase]]:
    """Return the reconstruction, and the edits by editor."""
    return done["reconstruct"], {name: phase for name, phase in done.items() if name != "reconstruct"}


def title(name: str) -> str:
    """Return the title of the editor "NAME" or "NAME+word"."""
    base, plus, word = name.partition("+")
    return registry.title("scene_editor", base) + (f" ({word})" if plus else "")


def reconstruct(job: EditJob) -> FitPhase:
    """Fit the scene to the capture."""
    config, capture, generator = job.config, job.capture, job.generator("reconstruct")
    parts = (capture.aabb, generator, capture.unbounded)
    known = {"points": capture.points, "cameras": capture.cameras[capture.train], "splats": capture.splats}
    model = open_scene(config.representation.thing, *parts, hints=known).to(job.device)
    phase = new_phase(generator, model, capture.images, config.reconstruct)
    fit_phase(job, "reconstruct", phase, capture, config.reconstruct)
    return phase


def means(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each value over the reports that have it."""
    values = {key: [report[key] for report in reports if key in report] for key in dict.fromkeys(chain(*reports))}
    return {key: sum(found) / len(found) for key, found in values.items()}


def edit(job: EditJob, source: SceneSource, start: SceneModel, name: str) -> FitPhase:
    """Edit the scene by one editor, starting from the reconstruction `start`."""
    config, editor = job.config, job.config.chosen[name].thing
    phase = new_phase(job.generator(name), copy.deepcopy(start), job.capture.images, config.fit)
    state = SceneEdit(source, phase.model, phase.images, phase.generator, config.seed, config.fit.steps)

    def update(step: int, curves: Curves) -> None:
        inner: list[dict[str, float]] = []
        state.images = phase.images  # a resumed phase has loaded others
        editor.update(state, step, inner.append)
        if inner:
            phase.note(inner[0])
            curves.add(step, {f"edit/{key}": value for key, value in means(inner).items()})
            save_strip(job.folder / "images" / f"preview-{name}.png", phase.images[job.capture.train[:8]])

    fit_phase(job, name, phase, job.capture, config.fit, update, job.prior.features)
    return phase
