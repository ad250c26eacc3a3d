"""Pictures distilled from a text-to-image prior: the particles of one prompt, or of an illusion, by one method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csd3d.distillation.noise import GIVEN, draw_noise
from csd3d.engine.logs import Curves
from csd3d.engine.phase import Job, Phase, run_steps
from csd3d.guidance.methods import Guide, MethodRun, Networks
from csd3d.guidance.transforms import seen_by
from csd3d.representations.pictures import PictureParticles


@dataclass(kw_only=True)
class ImagePhase(Phase):
    """One prompt by one method."""

    model: PictureParticles
    optimiser: torch.optim.Optimizer
    networks: Networks | None = None

    PARTS = (*Phase.PARTS, "model", "optimiser", "networks")


def particles_of(guide: Guide, model: PictureParticles, transforms: Sequence[str]) -> Tensor:
    """What the method works on, differentiable: the N particles, or of an illusion K·N, as each prompt sees them."""
    if not transforms and not guide.pictures:
        return model.latents(guide.prior)
    return guide.encode(seen_by(model.images(guide.prior), transforms))


def distil(job: Job, run: MethodRun, texts: list[str], name: str) -> ImagePhase:
    """Optimise the particles of a phase's prompts by one method; `name` is the phase's.

    Of an illusion, the loss is the mean over its transforms, and particles share scores under each of them.
    """
    config, prior = job.config, job.prior
    guide = Guide(prior, run, job.networks.get(run.name), job.generator(f"{name}/lora"))
    model = PictureParticles(prior, config.particles, job.side, config.space, job.generator("start"), job.source)
    if run.distill.weight == "x0":
        optimiser: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 1.0)
    else:
        optimiser = torch.optim.Adam(model.parameters(), config.learning_rate)
    phase = ImagePhase(job.generator(name), model=model, optimiser=optimiser, networks=guide.networks)
    start = particles_of(guide, model, config.transforms).detach().clone()
    prompts = [text for text in texts for _ in range(config.particles)]
    context: dict[str, Any] = {"prompts": prompts, "source": start, "source_prompts": config.source.prompt}
    if config.transforms:
        context["groups"] = torch.arange(len(prompts)) // config.particles
    if run.distill.noise in GIVEN:  # FSD, CFD: a picture is seen from one place, so one draw serves all steps
        context["camera_noise"] = draw_noise(start, "independent", job.generator("camera noise"))
    report: dict[str, float] = {}

    def advance(step: int, curves: Curves) -> dict[str, float]:
        z = particles_of(guide, model, config.transforms)
        loss, found = guide.loss(
            z, lambda: seen_by(model.images(prior), config.transforms), step, phase.generator, **context
        )
        optimiser.zero_grad(set_to_none=True)
        (loss / max(len(config.transforms), 1)).backward()
        finite = all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        if finite:
            optimiser.step()
        report.update(found | {"skipped": float(not finite)})
        return report

    run_steps(job, phase, name, run.distill.steps, advance, lambda: f"t {report.get('t', 0):.0f}")
    return phase
