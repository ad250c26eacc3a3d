"""A run on a canvas, from what was opened to what is left behind; each task says what it opens."""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from csd3d.canvas.clip import Captions, Footage
from csd3d.canvas.latents import Workspace, encode_footage, resize, working_size
from csd3d.canvas.regions import latent_shares, soft_union
from csd3d.canvas.windows import Windows
from csd3d.distillation import Correspondence, window_correspondence
from csd3d.editors.compare import edit_baseline
from csd3d.editors.edit_canvas import (
    MAIN,
    CanvasEditor,
    CanvasPhase,
    Correspond,
    Edit2dConfig,
    edit_canvas,
    make_cover,
    window_side,
)
from csd3d.engine.checkpoint import write_atomically
from csd3d.engine.phase import Job, all_finished, peak_memory_gib
from csd3d.errors import InputError
from csd3d.evaluation.canvas import make_instruments
from csd3d.evaluation.text import load_judge
from csd3d.interrupt import StopRequest
from csd3d.priors import DiffusersPrior, load_prior
from csd3d.report.canvas import previewer, save_results


@dataclass
class CanvasJob(Job):
    """A run on a canvas: its footage, and the size it is worked on at; `masks` [K, H, W] of its regions, if any, those
    of `instructions` first. `wrap`: its right border continues at the left."""

    prior: DiffusersPrior
    footage: Footage
    size: tuple[int, int]
    masks: Tensor | None = None
    wrap: bool = False


def open_job(
    config: Edit2dConfig,
    folder: Path,
    device: torch.device,
    stop: StopRequest,
    footage: Footage,
    *,
    masks: Tensor | None = None,
    wrap: bool = False,
) -> CanvasJob:
    """Opens the prior, and checks that it can work on the footage; embeds the prompts while there is a text encoder."""
    prior = load_prior(dataclasses.replace(config.prior, device=str(device)), require="edit")
    size = working_size(footage, window_side(config, prior), prior.codec.downscale, wrap)
    if config.correspondence == "flow" and not footage.is_video:
        raise InputError("correspondence: flow is for videos; use overlap or none")
    prior.condition(["", *config.instructions])
    return CanvasJob(config, folder, stop, device, prior, footage, size, masks, wrap)


def run_job(job: CanvasJob) -> None:
    """Does the whole job, from wherever its checkpoints say it stands; when stopped, with what there is."""
    config, started = job.config, time.monotonic()
    job.announce("encode")
    work = encode_footage(job.prior, job.footage, job.size, job.wrap, config.tile_pixels)
    work.keep_detail = config.keep_detail
    editor = make_editor(job, work)
    cover = make_cover(config, job.prior, work)
    encoded = time.monotonic()
    phases = {MAIN: (work, edit_canvas(job, editor, cover, previewer(job, work)))}
    for name in dict.fromkeys(config.compare):
        if not job.may_run(name):
            continue
        phases[name] = edit_baseline(job, job.prior, work, cover, name)
    exported = time.monotonic()
    job.announce("results")
    judge = load_judge(config.clip, job.device)
    metrics = summary(job, {name: phase for name, (_, phase) in phases.items()}) | {"judge": judge and judge.name}
    save_results(job, phases, metrics, make_instruments(work, cover, judge, captions_of(config)))
    metrics["seconds"] |= {"encode": encoded - started, "export": time.monotonic() - exported}
    metrics["seconds"]["total"] = sum(metrics["seconds"].values())
    metrics["peak_memory_gib"] = peak_memory_gib()
    write_atomically(job.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def captions_of(config: Edit2dConfig) -> Captions | None:
    """Those that the user gave."""
    return Captions(config.captions[:1], [config.captions[1:]]) if config.captions else None


def make_editor(job: CanvasJob, work: Workspace) -> CanvasEditor:
    """The canvas with its instructions; regions' masks brought to the latents and to what is composed at the end."""
    shares, count = None, len(job.config.instructions)
    if job.masks is not None:
        unit = job.prior.codec.downscale
        shares = latent_shares(job.masks, job.size, tuple(work.z.shape[2:]), unit)[None, :count]
        work.inside = soft_union(job.masks[:count])
    return CanvasEditor(job.prior, work, job.config.instructions, shares, correspondence_of(job, work))


def correspondence_of(job: CanvasJob, work: Workspace) -> Correspond | None:
    """What the windows of a step have in common, as the config asks."""
    kind = job.config.correspondence
    if kind == "none" or job.config.edit.svgd is None:
        return None
    size = tuple(work.z.shape[2:])
    if kind == "overlap":
        return lambda windows: overlap_correspondence(windows, size[1] if job.wrap else None)
    from csd3d.canvas.optical_flow import ClipFlow  # here: pictures need no OpenCV

    read, unit = job.footage.read, job.prior.codec.downscale
    flow = ClipFlow(lambda indices: resize(read(indices), job.size), size, unit)
    return lambda windows: flow.correspondence(windows.frame, windows.top, windows.left, windows.size)


def overlap_correspondence(windows: Windows, wrap: int | None) -> Correspondence:
    """Windows of one frame share where they overlap; those of others share nothing. `wrap`: the canvas's width."""
    found = window_correspondence(windows.top, windows.left, windows.size, wrap)
    same = windows.frame[:, None] == windows.frame
    return Correspondence(found.positions, found.validity * same[:, :, None, None])


def summary(job: CanvasJob, phases: dict[str, CanvasPhase]) -> dict:
    """metrics.json, but for what is measured on the finished pictures."""
    others = sum(phase.seconds for name, phase in phases.items() if name != MAIN)
    return {
        "task": job.config.task,
        "prompt": "; ".join(job.config.instructions),
        "finished": all_finished(phases, [MAIN, *job.config.compare]),
        "seconds": {"edit": phases[MAIN].seconds, "compare": others},
        "results": {
            name: {"unet_evaluations": phase.unet_evaluations, "seconds": phase.seconds}
            for name, phase in phases.items()
        },
    }
