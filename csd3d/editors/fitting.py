"""The fit of a scene to pictures, as a phase of a run with checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from csd3d.datasets import Capture
from csd3d.engine.logs import Curves
from csd3d.engine.phase import Job, Phase, run_steps
from csd3d.representations.base import SceneModel
from csd3d.representations.fit import Features, FitConfig, Pictures


@dataclass(kw_only=True)
class FitPhase(Phase):
    """The fit of a scene to pictures, which an editor may replace between steps."""

    model: SceneModel
    optimiser: torch.optim.Optimizer
    images: Tensor  # [B, H, W, 3], the frames of a capture

    PARTS = (*Phase.PARTS, "model", "optimiser")
    TENSORS = ("images",)


def new_phase(generator: torch.Generator, model: SceneModel, images: Tensor, config: FitConfig) -> FitPhase:
    """The fit of `model` before its first step, to a copy of `images`."""
    return FitPhase(generator, model=model, optimiser=model.start_fit(config), images=images.clone())


def fit_phase(
    job: Job,
    name: str,
    phase: FitPhase,
    capture: Capture,
    config: FitConfig,
    update: Callable[[int, Curves], None] | None = None,
    features: Features | None = None,
) -> None:
    """Run the remaining steps of phase `name`; `update` is called before each and may replace pictures.

    features: the network of the perceptual loss, see `SceneModel.fit_step`.
    """
    report: dict[str, float] = {}

    def advance(step: int, curves: Curves) -> dict[str, float]:
        if update is not None:
            update(step, curves)
        pictures = Pictures(phase.images, capture.cameras, capture.masks, capture.train)
        report.update(phase.model.fit_step(phase.optimiser, pictures, config, step, phase.generator, features))
        return report

    run_steps(job, phase, name, config.steps, advance, lambda: f"psnr {report.get('psnr', 0):.1f} dB")
