"""Text to 3D: radiance fields distilled from a text-to-image prior, through renders at random cameras.

The particles of a step are the V views of one asset, the N assets at one camera, or all views of all assets (`share`).
Each method is a phase with its own checkpoints; all start alike.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch

from csd3d.distillation.step import DistillConfig
from csd3d.engine.logs import Curves
from csd3d.engine.phase import Job, Phase, run_steps
from csd3d.errors import at_key
from csd3d.evaluation.objects import evaluate_objects
from csd3d.evaluation.text import (
    EvaluateConfig,
    check_judge,
    check_judged,
    check_shown,
    evaluate,
    held_out,
    held_out_views,
    plain_backdrop,
)
from csd3d.guidance.asset_noise import SurfaceNoise
from csd3d.guidance.assets import AssetPhase, asset_step, check_noise, new_phase, noise_of, shown_side
from csd3d.guidance.front import FrontView
from csd3d.guidance.methods import (
    ALIASES,
    MOVED,
    Guide,
    MethodRun,
    Networks,
    distill_by_model,
    method_runs,
    open_prior,
    settle_distill,
)
from csd3d.guidance.no_effect import alone, changed_in_vain
from csd3d.guidance.views import PromptConfig, ViewsConfig, check_camera, view_of
from csd3d.identity import Defining
from csd3d.metrics.inception import FID, open_fid
from csd3d.priors import Prior, PriorConfig
from csd3d.registry import register
from csd3d.report.models import ExportConfig
from csd3d.report.pictures import save_strip
from csd3d.report.text import save_assets, slug
from csd3d.representations.base import check_opens
from csd3d.representations.batch import AssetConfig, Assets, LossConfig, ShadingConfig, check_memory, ignored
from csd3d.representations.descent import OptimConfig, averaged
from csd3d.representations.sketch import SketchConfig
from csd3d.schema import Amount, ByName, Chosen, OneOf, Within, incidental

SHARES = ("auto", "views", "assets", "all")
OneMethod = Annotated[Chosen, OneOf("method", settings="methods", also=ALIASES)]


@register("task", "text_to_3d", title="Text to 3D")
@dataclass
class TextTo3DConfig:
    """The job of `configs/csd-text-to-3d.yaml`."""

    task: str = "text_to_3d"
    name: str = incidental("text-to-3d")  # name of the run's folder in outputs/
    prompt: str = ""  # what to make, such as "a blue duck"
    seed: int = 0  # seed of everything random
    plugins: list[str] = incidental(default_factory=list)  # modules, or files that end in .py, that register things
    methods: Annotated[dict[str, Any], ByName("method")] = incidental(default_factory=dict)  # settings by method name
    method: OneMethod = field(default_factory=lambda: Chosen("csd"))  # the main method: csd, NAME or NAME+csd
    compare: list[OneMethod] = incidental(default_factory=list)  # other methods to run, from the same start
    particles: Annotated[int, Within(1, 1024)] = 1  # number of assets
    views_per_step: Annotated[int, Within(1, 1024)] = 4  # views of each asset in a step
    share: str = "auto"  # what shares scores: views of an asset, assets at a camera, all; auto: views if one asset
    # pixels along a side of the views that the prior sees; null: the model's own size
    guidance_size: Annotated[int, Within(8, 4096)] | None = None
    prior: PriorConfig = field(default_factory=PriorConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    asset: AssetConfig = field(default_factory=AssetConfig)
    sketch: SketchConfig = field(default_factory=SketchConfig)
    shading: ShadingConfig = field(default_factory=ShadingConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=lambda: distill_by_model(steps=600))
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = incidental(default_factory=EvaluateConfig)
    export: ExportConfig = incidental(default_factory=ExportConfig)
    save_seconds: Amount = incidental(30.0)  # seconds between checkpoints, more where saving takes long

    MOVED: ClassVar[dict[str, str]] = MOVED | {
        f"asset.{key}": f"asset.representation.{key}" for key in ("field", "render")
    }

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError('prompt is empty: say what to make, such as "a blue duck"')
        if self.share not in SHARES:
            raise ValueError(f"share is {self.share!r}: choose one of {', '.join(SHARES)}")
        for key in ("particles", "views_per_step"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a whole number of at least 1")
        for key in ("random_background", "textured_background"):
            if self.prompts.backdrops and getattr(self.asset, key):
                raise ValueError(f"asset.{key} must be 0, as prompts.backdrops draws backgrounds too")
        self.distill = settle_distill(self.distill, [one.name for one in (self.method, *self.compare)])
        self.runs  # noqa: B018 (raises where a method does not go with the rest)
        late = {key: needed for key, needed in self._steps_needed().items() if needed > self.distill.steps}
        if late:
            named = ", ".join(f"{key} needs {needed}" for key, needed in late.items())
            raise ValueError(f"distill.steps is {self.distill.steps}, but {named}; change these keys too")

    def _steps_needed(self) -> dict[str, int]:
        """How many steps it takes to come to the last one that each schedule names, by its key."""
        keys = ("resolution", "levels") if self.asset.max_levels else ("resolution",)
        found = {f"asset.{key}": getattr(self.asset, key)[-1][0] + 1 for key in keys}
        ramps = {f"losses.{key}": value for key, value in vars(self.losses).items() if isinstance(value, tuple)}
        found |= {key: math.ceil(ramp[2]) for key, ramp in ramps.items()}  # it may end with the run
        if self.shading.lambertian or self.shading.textureless:
            found["shading.start"] = self.shading.start + 1
        return found

    @property
    def runs(self) -> dict[str, MethodRun]:
        """The methods by name, the main one first."""
        return method_runs([self.method, *self.compare], self.methods, self.distill)

    @property
    def finished_background(self) -> tuple[float, ...] | None:
        """The colour behind finished assets; None: that of `asset.background`."""
        return next(iter(self.prompts.backdrops.values()), None)

    @property
    def told(self) -> str:
        """The prompt."""
        return self.prompt

    @property
    def has_truth(self) -> bool:
        """Whether what the world knows of the prompt may be what the assets should be."""
        return True

    def open(self, device: torch.device) -> "AssetJob":
        """Open the prior and the networks; what is wrong with them raises InputError before any work."""
        check_memory(self.asset, self.particles, self.views_per_step, device)
        check_judged(self)
        if self.guidance_size is not None:
            check_shown(self, self.guidance_size, device)
        with at_key("evaluate.clip"):
            check_judge(self.evaluate.clip)
        with at_key("evaluate.fid_against"):
            fid = open_fid(self.evaluate.fid_against, device)
        background = self.finished_background or self.asset.background
        check_opens(self.asset.representation.thing, self.asset.box, background=background)
        prior, networks = open_prior(self.prior, device, self.runs, self.prompts.texts(self.prompt))
        check_camera(self.prompts, prior, self.prior.model)
        side = shown_side(self, prior)
        with at_key("guidance_size"):
            prior.check_size(side, side)
        encodes = any(not getattr(run.method, "pictures", False) for run in self.runs.values())
        check_shown(self, side, device, prior.codec.graph_bytes(side, side) if encodes else 0)
        check_noise(self, prior, device)
        return AssetJob(config=self, device=device, prior=prior, networks=networks, fid=fid)

    @property
    def phases(self) -> list[str]:
        """The phases of a run, in order."""
        return [*self.runs, "evaluate", "video", "mesh", "report"]

    @property
    def costs(self) -> dict[str, float]:
        """About what each phase costs, in steps of one asset."""
        made = {name: float(self.particles * run.distill.steps) for name, run in self.runs.items()}
        frames = self.particles * len(made) * self.export.video_frames
        return {**made, "evaluate": frames / 10, "video": frames / 4, "mesh": 40.0 * self.particles, "report": 4.0}

    @property
    def ignored(self) -> list[str]:
        """A warning for each key that the representation or the methods do not take."""
        runs, views, count = self.runs, self.views_per_step, self.particles
        together = {"views": views, "assets": count, "all": views * count}[self.shared]
        given = f"particles is {count}, views_per_step {views}, share {self.shared}; raise "
        more = {"views": "views_per_step", "assets": "particles"}.get(self.share, "particles or views_per_step")
        found = [*ignored(self.asset, self.losses, self.shading), *changed_in_vain(runs, self.distill)]
        return [*found, *alone(runs, together, given + more)]

    @property
    def shared(self) -> str:
        """What shares scores: views, assets or all."""
        return self.share if self.share != "auto" else "views" if self.particles == 1 else "assets"

    def say(self, prompt: str, azimuth_deg: float, elevation_deg: float) -> str:
        """Return the prompt with the words for a view."""
        return self.prompts.text(prompt, view_of(azimuth_deg, elevation_deg, self.prompts))


@dataclass(kw_only=True)
class AssetJob(Job):
    """A run of this task."""

    prior: Prior
    networks: dict[str, Networks]  # by the name of the method that has them
    fid: FID | None = None  # of all held-out views of a method's assets
    front: FrontView | None = None  # a picture that the assets are held to

    @property
    def wanted(self) -> list[str]:
        return list(self.config.runs)

    def identity_of(self, name: str) -> Defining:
        """The job's identity and the settings of this phase's method."""
        return self.identity | self.own_identity(name, self.config.runs[name].method)

    def run_phases(self) -> dict[str, Phase]:
        """Make the assets by each method; the first even after a stop, so that there is something to show."""
        made: dict[str, Phase] = {}
        for name, run in self.config.runs.items():
            if not made or self.may_run(name):
                made[name] = distil(self, run)
        return made

    def measure(self, done: dict[str, Phase]) -> dict:
        """Measure how near each method's assets are to right objects, and how well held-out views fit the prompt."""
        self.assets = {name: averaged(phase.model, phase.average) for name, phase in done.items()}
        self.views = held_out_views(self.config, self.assets)
        figures, self.nearest = evaluate_objects(self, self.views)
        nearest = {name: found.names for name, found in self.nearest.items()}
        by_clip, judge = evaluate(self, self.views)
        for name, phase in done.items():
            figures[name] |= by_clip[name] | phase.figures
            if self.front is not None:
                figures[name] |= self.front.figures(self.assets[name], plain_backdrop(self.config))
        main = done[self.wanted[0]].seconds
        seconds = {"distil": main, "compare": sum(phase.seconds for phase in done.values()) - main}
        return {"judge": judge, "seconds": seconds, "results": figures, "nearest": nearest}

    def save(self, done: dict[str, Phase], metrics: dict) -> None:
        """Write pictures, videos, meshes and the report."""
        titles = {name: self.config.runs[name].title for name in self.assets}
        metrics["mesh"] = save_assets(self, self.assets, self.views, self.nearest, titles, metrics)


def distil(job: AssetJob, run: MethodRun) -> AssetPhase:
    """Make the assets by one method."""
    name, prior = run.name, job.prior
    guide = Guide(prior, run, job.networks.get(name), job.generator(f"{name}/lora"))
    phase = new_phase(job, name, guide.networks)
    noise = noise_of(job, run)
    if isinstance(noise, SurfaceNoise):
        phase.noise = noise.to(job.device)
    report: dict[str, float] = {}

    def advance(step: int, curves: Curves) -> dict[str, float]:
        report.update(asset_step(job.config, phase, guide, step, noise, job.front))
        if step % 50 == 0:
            preview(job, phase.model, name)
        return report

    run_steps(job, phase, name, run.distill.steps, advance, lambda: f"t {report.get('t', 0):.0f}")
    preview(job, phase.model, name)
    return phase


@torch.no_grad()
def preview(job: Job, model: Assets, name: str) -> None:
    """Write images/preview-METHOD.png: every asset from four sides."""
    cameras = held_out(job.config, 4, 96)
    strip = [m.render_views(cameras, torch.arange(4)).rgb.clamp(0, 1) for m in model.models]
    save_strip(job.folder / "images" / f"preview-{slug(name)}.png", torch.cat(strip))
