"""The baselines of CSD-Edit, on the same canvas as it or on one of their own."""

import torch

from csd3d.canvas.latents import Workspace, encode_footage
from csd3d.canvas.pieces import Pieces, window_pieces
from csd3d.canvas.windows import Cover, even_windows, normalised_weights
from csd3d.editors.baselines import downscaled_size, edit_by
from csd3d.editors.edit_canvas import DOWNSCALED, CanvasPhase
from csd3d.engine.logs import Curves
from csd3d.engine.phase import Job, run_steps
from csd3d.priors import DiffusersPrior


def make_pieces(prior: DiffusersPrior, work: Workspace, cover: Cover, prompt: str) -> Pieces:
    """The canvas in evenly spaced windows, as the baselines take it, on the prior's device."""
    windows, z = even_windows(cover), work.z.to(prior.device)
    weights = normalised_weights(windows[windows.frame == 0], cover.shape[1:]).repeat(cover.shape[0], 1, 1, 1)
    return window_pieces(prior, z, work.codec.to_condition(z), prompt, windows, weights.to(prior.device))


def edit_baseline(
    job: Job, prior: DiffusersPrior, work: Workspace, cover: Cover, name: str
) -> tuple[Workspace, CanvasPhase]:
    """The edit by the baseline `name`, in one step; with the workspace that its canvas belongs to."""
    method = name
    if name == DOWNSCALED:
        work, method = downscaled(prior, work), "ip2p"
        cover = Cover((len(work.z), *work.z.shape[2:]), tuple(work.z.shape[2:]))
    phase = CanvasPhase(job.generator(name), z=work.z.clone(), moved=torch.zeros_like(work.z))
    report = {"t": 0.0}

    def advance(step: int, curves: Curves) -> dict[str, float]:
        pieces = make_pieces(prior, work, cover, job.config.prompt)
        arguments = (method, prior, pieces, job.config.baselines, phase.generator, report.update)
        z, phase.unet_evaluations = edit_by(*arguments)
        phase.z = z.cpu()
        return report | {"skipped": 0.0}

    run_steps(job, phase, name, 1, advance, lambda: "")
    return work, phase


def downscaled(prior: DiffusersPrior, work: Workspace) -> Workspace:
    """The same footage made as small as the prior's own pictures."""
    size = downscaled_size(prior, *work.footage.size)
    small = encode_footage(prior, work.footage, size, wrap=False, pixels=work.codec.pixels)
    small.keep_detail, small.inside = work.keep_detail, work.inside
    return small
