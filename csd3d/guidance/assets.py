"""Distilling the assets of a text: the start of a method's run, and one step of it.

A step renders views of every asset at random cameras, asks the method for their directions, and descends.

Symbols: N assets, V views of each in a step.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from csd3d.engine.phase import Job, Phase
from csd3d.evaluation.text import PLAIN
from csd3d.guidance.asset_noise import CameraNoise, SurfaceNoise, asset_noise, noise_bytes
from csd3d.guidance.front import FrontView
from csd3d.guidance.methods import Guide, MethodRun, Networks
from csd3d.guidance.views import Views, away_views, sample_views, view_of
from csd3d.memory import check_fits
from csd3d.priors import Prior
from csd3d.representations.backdrops import textured
from csd3d.representations.batch import Assets, AssetViews, draw_shading, milestone, regularisers, scheduled
from csd3d.representations.descent import Average, asset_optimiser
from csd3d.representations.fit import descend
from csd3d.representations.sketch import sketch_cameras, start_as_sketch

if TYPE_CHECKING:
    from csd3d.tasks.text_to_3d import TextTo3DConfig


@dataclass(kw_only=True)
class AssetPhase(Phase):
    """The assets as one method makes them."""

    model: Assets
    optimiser: torch.optim.Adam
    average: Average | None = None
    networks: Networks | None = None
    noise: SurfaceNoise | None = None

    PARTS = (*Phase.PARTS, "model", "optimiser", "average", "networks", "noise")


def shown_side(config: "TextTo3DConfig", prior: Prior) -> int:
    """Side in pixels of the views that the prior sees."""
    return config.guidance_size or prior.defaults.working_size


def new_phase(job: Job, name: str, networks: Networks | None = None) -> AssetPhase:
    """Return a phase at its first step; its assets depend on the seed alone, so that methods start alike."""
    config = job.config
    model = Assets(config.asset, config.particles, job.generator("start"), config.finished_background).to(job.device)
    if config.sketch.shapes:
        sketch(job, model)
    optimiser = asset_optimiser(model, config.optim)
    average = Average(model, config.optim.ema) if config.optim.ema else None
    return AssetPhase(job.generator(name), model=model, optimiser=optimiser, average=average, networks=networks)


def sketch(job: Job, model: Assets) -> None:
    """Make the assets the config's sketch, which a run that is resumed does again, to the same end."""
    config = job.config
    distance, fov = sum(config.views.distance) / 2, sum(config.views.fov_deg) / 2
    cameras = sketch_cameras(config.sketch, distance, fov).to(job.device)
    backdrop = torch.tensor(config.finished_background or PLAIN.get(config.asset.background) or PLAIN["white"])
    for k, one in enumerate(model.models):
        start_as_sketch(one, config.sketch, cameras, backdrop, job.generator(f"sketch/{k}"))


def asset_step(
    config: "TextTo3DConfig",
    phase: AssetPhase,
    guide: Guide,
    step: int,
    noise: CameraNoise | SurfaceNoise | None,
    front: FrontView | None = None,
) -> dict[str, float]:
    """Render views, get directions from the method, and descend; a step that is not finite changes nothing."""
    model, generator = phase.model, phase.generator
    model.prepare(step, milestone(config.asset.levels, step), generator)
    views = sample_views(config.views, config.views_per_step, milestone(config.asset.resolution, step), generator)
    backdrop = draw_backdrop(config, generator)
    shown = render_step(config, model, views, step, generator, backdrop)
    z = guide.encode(shown.at_side(shown_side(config, guide.prior)))
    context = step_context(config, views, backdrop)
    if noise is not None:
        noise.renew(generator)
        context["camera_noise"] = noise(views, shown, z.shape[-2:])
    guidance, report = guide.loss(z, lambda: shown.images, step, generator, **context)
    penalty, losses = regularisers(shown, config.losses, step)
    if front is not None:
        colour = torch.tensor(config.prompts.backdrops[backdrop]) if backdrop else torch.rand(3, generator=generator)
        error, found = front.loss(model, views.cameras.height, colour, generator)
        penalty, losses = penalty + error, losses | found
    share = config.optim.share(step, config.distill.steps)
    finite = descend(model, phase.optimiser, guidance / len(z) + penalty, share, config.optim.clip)
    if finite and phase.average is not None:
        phase.average.update()
    opacity = torch.cat([r.opacity for r in shown.rendered]).mean().item()
    return report | losses | {"opacity": opacity, "skipped": float(not finite)}


def draw_backdrop(config: "TextTo3DConfig", generator: torch.Generator) -> str | None:
    """Draw the name of the step's backdrop; None if the config has no backdrops."""
    names = list(config.prompts.backdrops)
    return names[int(torch.randint(len(names), (), generator=generator))] if names else None


def render_step(
    config: "TextTo3DConfig",
    model: Assets,
    views: Views,
    step: int,
    generator: torch.Generator,
    backdrop: str | None,
) -> AssetViews:
    """Render the step's views before its backdrop, or a random background, with random shading."""
    pixels = len(views.cameras) * views.cameras.height * views.cameras.width
    jitter = torch.rand(config.particles, pixels, generator=generator)
    shading = draw_shading(config.shading, config.losses, step, generator)
    u, colour = torch.rand((), generator=generator).item(), torch.rand(3, generator=generator)
    plain = colour if u < config.asset.random_background else None
    plain = torch.tensor(config.prompts.backdrops[backdrop]) if backdrop else plain
    distortion = bool(scheduled(config.losses.distortion, step))
    share = config.asset.textured_background
    if not share or torch.rand((), generator=generator).item() >= share:
        return model.render(views.cameras, jitter, shading, plain, distortion)
    behind = textured(config.particles * len(views.cameras), views.cameras.height, generator)
    return model.render(views.cameras, jitter, shading, torch.zeros(3), distortion).before(behind)


def step_context(config: "TextTo3DConfig", views: Views, backdrop: str | None = None) -> dict[str, Any]:
    """Return the fields of `Step` for the particles [N·V], asset-major: prompts, groups that share scores, cameras.

    away: the prompts of the two views that Perp-Neg pushes each particle away from, with their weights.
    """
    count, repeat = len(views.places), config.particles

    def said(words: list[str]) -> list[str]:
        return [config.prompts.text(config.prompt, word, backdrop) for word in words] * repeat

    others = [away_views(*place, config.prompts.overhead_deg) for place in views.places]
    weights = torch.tensor([weight for _, weight in others]).repeat(repeat, 1)
    index = torch.arange(repeat * count)
    return {
        "prompts": said([view_of(*place, config.prompts) for place in views.places]),
        "away": [(said([words[k] for words, _ in others]), weights[:, k]) for k in range(2)],
        "groups": {"views": index // count, "assets": index % count, "all": 0 * index}[config.shared],
        "pose": views.pose.repeat(repeat, 1),
        "view": views.view.repeat(repeat, 1) if config.prompts.camera else None,
        "guides_view": config.prompts.guide_camera,
    }


def noise_of(job: Job, run: MethodRun) -> CameraNoise | SurfaceNoise | None:
    """The noise of the job's assets by a method; None where each step draws its own."""
    config, generator = job.config, job.generator("camera noise")
    seen = noise_views(config, job.prior)
    return asset_noise(run, config.particles, *seen, config.asset.extent, generator)


def noise_views(config: "TextTo3DConfig", prior: Prior) -> tuple[tuple[int, int, int], float]:
    """The shape of the latents and the field of view, in degrees, that noise of assets is made for."""
    return prior.latent_shape(*[shown_side(config, prior)] * 2), sum(config.views.fov_deg) / 2


def check_noise(config: "TextTo3DConfig", prior: Prior, device: torch.device) -> None:
    """Raise InputError if the noise of a method's assets does not fit in memory."""
    shape, fov = noise_views(config, prior)
    for name, run in config.runs.items():
        needed = noise_bytes(run, config.particles, config.views_per_step, shape, fov)
        given = f"guidance_size {shown_side(config, prior)} with {config.particles} × {config.views_per_step} views"
        if run.distill.noise == "camera":  # its maps stay in this machine's memory
            lower = "lower guidance_size or particles, or raise views.fov_deg"
            check_fits(needed, f"{given} of {fov:g} degrees: the noise of {name}", lower)
        else:
            lower = "lower guidance_size, views_per_step or particles"
            check_fits(needed, f"{given}: the noise of {name}", lower, device)
