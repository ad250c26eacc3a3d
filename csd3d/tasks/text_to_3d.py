"""Text to 3D: radiance fields distilled from a text-to-image prior, through renders at random cameras.

Particles of a step are the V views of one asset, or the N assets at the same cameras, or both (`share`). Each method is
a phase of its own, from the same start, with checkpoints under its name.
"""

import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from csd3d.distillation import DistillConfig, SVGDConfig
from csd3d.distillation.distill import Extras
from csd3d.distillation.methods import check_methods, method_config
from csd3d.distillation.noise import draw_noise_map, world_noise
from csd3d.engine.logs import Curves
from csd3d.engine.phase import Job, Phase, run_steps
from csd3d.priors import Prior, PriorConfig, load_prior
from csd3d.registry import register
from csd3d.report.models import ExportConfig
from csd3d.report.pictures import save_strip
from csd3d.report.text import EvaluateConfig, evaluate, held_out, held_out_views, save_results
from csd3d.representations.batch import (
    AssetConfig,
    Assets,
    AssetViews,
    LossConfig,
    ShadingConfig,
    averaged,
    check_memory,
    draw_shading,
    milestone,
    regularisers,
    scheduled,
)
from csd3d.representations.fit import gradients_finite
from csd3d.tasks.text_guide import (
    Guide,
    GuideConfig,
    Networks,
    branch_texts,
    check_features,
    embed_all,
    expand_methods,
    open_networks,
)
from csd3d.tasks.text_to_image import slug
from csd3d.tasks.views import PromptConfig, Views, ViewsConfig, away_views, sample_views, view_of

SHARES = ("auto", "views", "assets", "all")


@dataclass
class OptimConfig:
    """Adam: the learning rate, of which `final` is left at the last step (exponentially), and the background's share.

    `clip` bounds the norm of the gradients (0: not), `ema` is the decay of averaged weights (0: none); warm-up steps.
    """

    learning_rate: float = 1e-2
    final: float = 1.0
    background: float = 0.1
    clip: float = 0.0
    ema: float = 0.0
    warmup: int = 10

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not 0 <= self.ema < 1:
            raise ValueError(f"learning_rate is {self.learning_rate:g}, ema {self.ema:g}: above 0, and in [0, 1)")
        if not 0 < self.final <= 1:
            raise ValueError(f"final is {self.final:g}: give the share of learning_rate left at the end, in (0, 1]")

    def share(self, step: int, steps: int) -> float:
        """Of the learning rate, at `step` of `steps`: linear warm-up times exponential decay to `final`."""
        return min(1.0, (step + 1) / max(self.warmup, 1)) * self.final ** (step / max(steps - 1, 1))


@register("task", "text_to_3d", title="Text to 3D")
@dataclass
class TextTo3DConfig:
    """The job of `configs/csd-text-to-3d.yaml`."""

    task: str = "text_to_3d"
    name: str = "text-to-3d"
    prompt: str = ""
    seed: int = 0
    method: str = "csd"
    compare: list[str] = field(default_factory=list)
    particles: int = 1  # assets
    views_per_step: int = 4
    share: str = "auto"  # who share scores: "views" of an asset, "assets" at a camera, "all"; auto: views if alone
    guidance_size: int = 128  # pixels of what the prior is shown
    prior: PriorConfig = field(default_factory=PriorConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    asset: AssetConfig = field(default_factory=AssetConfig)
    shading: ShadingConfig = field(default_factory=ShadingConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=lambda: DistillConfig(steps=600, svgd=SVGDConfig()))
    guide: GuideConfig = field(default_factory=GuideConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    save_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError('prompt is empty: say what to make, such as "a blue duck"')
        if self.share not in SHARES:
            raise ValueError(f"share is {self.share!r}: choose one of {', '.join(SHARES)}")
        for key in ("particles", "views_per_step"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a whole number of at least 1")
        if self.prompts.backdrops and self.asset.random_background:
            raise ValueError("asset.random_background draws what prompts.backdrops draw too: set it to 0")
        check_methods(self.methods, self.distill)
        for key, last in self._last_steps().items():
            if last >= self.distill.steps:
                raise ValueError(f"{key} names step {last}: distill.steps has {self.distill.steps}, counted from 0")

    def _last_steps(self) -> dict[str, int]:
        """The last step that each schedule names, by its key."""
        found = {f"asset.{key}": getattr(self.asset, key)[-1][0] for key in ("resolution", "levels")}
        ramps = {f"losses.{key}": value for key, value in vars(self.losses).items() if isinstance(value, tuple)}
        found |= {key: int(ramp[2]) - 1 for key, ramp in ramps.items()}  # it may end with the run
        if self.shading.lambertian or self.shading.textureless:
            found["shading.start"] = self.shading.start
        return found

    @property
    def methods(self) -> list[str]:
        """The methods run, the main one first."""
        return expand_methods([self.method, *self.compare])

    @property
    def told(self) -> str:
        """What is asked for, in words."""
        return self.prompt

    def open(self, device: torch.device) -> "AssetJob":
        """Opens everything that can be wrong before any work is done: memory, the prior, what the methods need."""
        check_memory(self.particles, self.views_per_step, max(side for _, side in self.asset.resolution))
        prior = load_prior(dataclasses.replace(self.prior, device=str(device)), require="text")
        check_features(prior, self.distill)
        texts = branch_texts(self.prompts.texts(self.prompt), self.guide.words)
        embed_all(prior, texts, self.methods, self.distill)
        return AssetJob(config=self, device=device, networks=open_networks(prior, self.methods, self.guide))

    @property
    def phases(self) -> list[str]:
        """What a run goes through, in order."""
        return [*self.methods, "evaluate", "video", "mesh", "report"]

    def say(self, prompt: str, azimuth_deg: float, elevation_deg: float) -> str:
        """The prompt as said of a view."""
        return self.prompts.text(prompt, view_of(azimuth_deg, elevation_deg, self.prompts))


@dataclass(kw_only=True)
class AssetPhase(Phase):
    """The assets as one method makes them."""

    model: Assets
    optimiser: torch.optim.Adam
    average: AveragedModel | None = None
    score: object | None = None
    score_optimiser: torch.optim.Optimizer | None = None

    PARTS = (*Phase.PARTS, "model", "optimiser", "average", "score", "score_optimiser")


@dataclass(kw_only=True)
class AssetJob(Job):
    """A run of this task."""

    networks: Networks

    @property
    def wanted(self) -> list[str]:
        return self.config.methods

    def run_phases(self) -> dict[str, Phase]:
        """Makes the assets by each method, the first in any case: there must be something to show."""
        made: dict[str, Phase] = {}
        for name in self.wanted:
            if not made or self.may_run(name):
                made[name] = distil(self, self.networks, name)
        return made

    def measure(self, done: dict[str, Phase]) -> dict:
        """How well held-out views of each method's assets fit the prompt."""
        self.assets = {name: averaged(phase.model, phase.average) for name, phase in done.items()}
        self.views = held_out_views(self.config, self.assets)
        figures, judge = evaluate(self, self.views)
        for name, phase in done.items():
            figures[name] |= {"unet_evaluations": phase.unet_evaluations, "seconds": phase.seconds}
        main = done[self.wanted[0]].seconds
        seconds = {"distil": main, "compare": sum(phase.seconds for phase in done.values()) - main}
        return {"judge": judge, "seconds": seconds, "results": figures}

    def save(self, done: dict[str, Phase], metrics: dict) -> None:
        """Pictures, videos, meshes and report."""
        metrics["mesh"] = save_results(self, self.assets, self.views, metrics)


def distil(job: Job, networks: Networks, name: str) -> AssetPhase:
    """Makes the assets by one method."""
    config, prior = job.config, networks.prior
    distill = method_config(name, config.distill)
    guide = Guide(name, networks, distill, config.guide, job.generator(f"{name}/lora"))
    phase = new_phase(job, guide, name)
    noise_map = camera_noise_map(job, prior) if distill.noise == "camera" else None
    report: dict[str, float] = {}

    def advance(step: int, curves: Curves) -> dict[str, float]:
        before = prior.unet_evaluations
        report.update(asset_step(config, phase, guide, step, noise_map))
        phase.unet_evaluations += prior.unet_evaluations - before
        if step % 50 == 0:
            preview(job, phase.model, name)
        return report

    run_steps(job, phase, name, distill.steps, advance, lambda: f"t {report.get('t', 0):.0f}")
    preview(job, phase.model, name)
    return phase


def new_phase(job: Job, guide: Guide, name: str) -> AssetPhase:
    """A phase at its first step; the start depends on the seed alone, so that methods begin alike."""
    config = job.config
    finished = next(iter(config.prompts.backdrops.values()), None)
    model = Assets(config.asset, config.particles, job.generator("start"), finished).to(job.device)
    background = {id(p) for m in model.models for p in m.background.parameters()}
    rate = config.optim.learning_rate
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in background], "lr": rate},
        {"params": [p for p in model.parameters() if id(p) in background], "lr": rate * config.optim.background},
    ]
    optimiser = torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.99), eps=1e-15)
    ema = config.optim.ema
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
    parts = {"model": model, "optimiser": optimiser, "average": average}
    return AssetPhase(job.generator(name), **parts, score=guide.score, score_optimiser=guide.optimiser)


def asset_step(
    config: TextTo3DConfig, phase: AssetPhase, guide: Guide, step: int, noise_map: Tensor | None
) -> dict[str, float]:
    """One step: render, ask for directions, push them back; a step that is not finite changes nothing."""
    model, generator = phase.model, phase.generator
    model.set_levels(milestone(config.asset.levels, step))
    model.update_grids(step, generator)
    views = sample_views(config.views, config.views_per_step, milestone(config.asset.resolution, step), generator)
    backdrop = draw_backdrop(config, generator)
    shown = render_step(config, model, views, step, generator, backdrop)
    side = config.guidance_size
    z = guide.prior.encode(F.interpolate(shown.images, (side, side), mode="bilinear", align_corners=False))
    extras = step_extras(config, guide, views, z, noise_map)
    cameras = views.cameras.camera_to_world.flatten(1).repeat(config.particles, 1)
    texts = view_texts(config, views, backdrop)
    guidance, report = guide.loss(z, lambda: shown.images, texts, step, generator, extras, cameras)
    penalty, losses = regularisers(shown, config.losses, step)
    finite = descend(config.optim, phase, guidance / len(z) + penalty, config.optim.share(step, config.distill.steps))
    opacity = torch.cat([r.opacity for r in shown.rendered]).mean().item()
    return report | losses | {"opacity": opacity, "skipped": float(not finite)}


def draw_backdrop(config: TextTo3DConfig, generator: torch.Generator) -> str | None:
    """The name of the step's backdrop, None where there are none."""
    names = list(config.prompts.backdrops)
    return names[int(torch.randint(len(names), (), generator=generator))] if names else None


def render_step(
    config: TextTo3DConfig, model: Assets, views: Views, step: int, generator: torch.Generator, backdrop: str | None
) -> AssetViews:
    """The step's renders before its backdrop; how they are lit, and before what without one, is drawn here."""
    pixels = len(views.cameras) * views.cameras.height * views.cameras.width
    jitter = torch.rand(config.particles, pixels, generator=generator)
    shading = draw_shading(config.shading, config.losses, step, generator)
    u, colour = torch.rand((), generator=generator).item(), torch.rand(3, generator=generator)
    plain = colour if u < config.asset.random_background else None
    plain = torch.tensor(config.prompts.backdrops[backdrop]) if backdrop else plain
    return model.render(views.cameras, jitter, shading, plain, bool(scheduled(config.losses.distortion, step)))


def descend(config: OptimConfig, phase: AssetPhase, loss: Tensor, share: float) -> bool:
    """Backward, clip, one step of Adam at a share of its rate, average; False where the gradients are not finite."""
    phase.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if not gradients_finite(phase.model):
        return False
    if config.clip:
        torch.nn.utils.clip_grad_norm_(phase.model.parameters(), config.clip)
    rates = [group["lr"] for group in phase.optimiser.param_groups]
    for group, rate in zip(phase.optimiser.param_groups, rates, strict=True):
        group["lr"] = rate * share
    phase.optimiser.step()
    for group, rate in zip(phase.optimiser.param_groups, rates, strict=True):
        group["lr"] = rate
    if phase.average is not None:
        phase.average.update_parameters(phase.model)
    return True


def view_texts(config: TextTo3DConfig, views: Views, backdrop: str | None = None) -> dict[str, list[str]]:
    """Every branch's prompts [N·V], each view told what it is and before what, and what it is not."""
    places = list(zip(views.azimuth_deg.tolist(), views.elevation_deg.tolist(), strict=True))
    own = [view_of(*place, config.prompts) for place in places]
    away = [away_views(*place, config.prompts.overhead_deg)[0] for place in places]
    said = [
        [config.prompts.text(config.prompt, view, backdrop) for view in views] * config.particles
        for views in (own, *zip(*away, strict=True))
    ]
    return branch_texts(said[0], config.guide.words, said[1:])


def step_extras(config: TextTo3DConfig, guide: Guide, views: Views, z: Tensor, noise_map: Tensor | None) -> Extras:
    """Perp-Neg's weights, who shares with whom, and FSD's noise, for particles in asset-major order."""
    count, repeat = len(views.azimuth_deg), config.particles
    places = zip(views.azimuth_deg.tolist(), views.elevation_deg.tolist(), strict=True)
    weights = [away_views(*place, config.prompts.overhead_deg)[1] for place in places]
    away = torch.tensor(weights).repeat(repeat, 1).to(z)
    share = config.share if config.share != "auto" else "views" if repeat == 1 else "assets"
    index = torch.arange(repeat * count)
    groups = {"views": index // count, "assets": index % count, "all": 0 * index}[share]
    noise = None
    if noise_map is not None:
        noise = world_noise(noise_map, views.azimuth_deg, views.elevation_deg, z.shape[-2:]).repeat(repeat, 1, 1, 1)
    return Extras(camera_noise=noise, away=away if guide.distill.perp_neg else None, groups=groups)


def camera_noise_map(job: Job, prior: Prior) -> Tensor:
    """FSD's sphere of noise, the same for a whole run."""
    config = job.config
    channels, *size = prior.latent_shape(config.guidance_size, config.guidance_size)
    fov = sum(config.views.fov_deg) / 2
    return draw_noise_map(channels, tuple(size), fov, job.generator("camera noise"))


@torch.no_grad()
def preview(job: Job, model: Assets, name: str) -> None:
    """images/preview-METHOD.png: every asset from the front, half right, the side and behind."""
    cameras = held_out(job.config, 4, 96)
    strip = [m.render_views(cameras, torch.arange(4)).rgb.clamp(0, 1) for m in model.models]
    save_strip(job.folder / "images" / f"preview-{slug(name)}.png", torch.cat(strip))
