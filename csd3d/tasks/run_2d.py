"""A run on a canvas, from what was opened to what is left behind; each task says what it opens."""

import dataclasses
import time
from dataclasses import dataclass

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
    Correspond,
    Edit2dConfig,
    edit_canvas,
    make_cover,
    window_side,
)
from csd3d.engine.logs import logger
from csd3d.engine.phase import Job, Phase
from csd3d.errors import InputError
from csd3d.evaluation.canvas import make_instruments
from csd3d.evaluation.text import load_judge
from csd3d.priors import DiffusersPrior, load_prior
from csd3d.report.canvas import previewer, save_results


@dataclass(kw_only=True)
class CanvasJob(Job):
    """A run on a canvas: its footage, and the size it is worked on at; `masks` [K, H, W] of its regions, if any, those
    of `instructions` first. `wrap`: its right border continues at the left."""

    prior: DiffusersPrior
    footage: Footage
    size: tuple[int, int]
    masks: Tensor | None = None
    wrap: bool = False

    @property
    def wanted(self) -> list[str]:
        return [MAIN, *self.config.compare]

    def run_phases(self) -> dict[str, Phase]:
        """Encodes the footage, then edits it by CSD-Edit and by each baseline."""
        for warning in self.footage.warnings:
            logger.warning("%s", warning)
        config, started = self.config, time.monotonic()
        self.announce("encode")
        work = encode_footage(self.prior, self.footage, self.size, self.wrap, config.tile_pixels)
        work.keep_detail = config.keep_detail
        editor = make_editor(self, work)
        self.cover = make_cover(config, self.prior, work)
        self.encode_seconds = time.monotonic() - started
        done = {MAIN: edit_canvas(self, editor, self.cover, previewer(self, work))}
        self.works = {MAIN: work}
        for name in dict.fromkeys(config.compare):
            if self.may_run(name):
                self.works[name], done[name] = edit_baseline(self, self.prior, work, self.cover, name)
        return done

    def measure(self, done: dict[str, Phase]) -> dict:
        """What is known before the finished pictures are gone through, which `save` does and measures."""
        self.judge = load_judge(self.config.clip, self.device)
        others = sum(phase.seconds for name, phase in done.items() if name != MAIN)
        seconds = {"encode": self.encode_seconds, "edit": done[MAIN].seconds, "compare": others}
        results = {n: {"unet_evaluations": p.unet_evaluations, "seconds": p.seconds} for n, p in done.items()}
        return {"seconds": seconds, "results": results, "judge": self.judge and self.judge.name}

    def save(self, done: dict[str, Phase], metrics: dict) -> None:
        """Pictures or videos, their figures, and the report."""
        self.announce("results")
        instruments = make_instruments(self.works[MAIN], self.cover, self.judge, captions_of(self.config))
        save_results(self, {name: (self.works[name], phase) for name, phase in done.items()}, metrics, instruments)


def open_job(
    config: Edit2dConfig, device: torch.device, footage: Footage, *, masks: Tensor | None = None, wrap: bool = False
) -> CanvasJob:
    """Opens the prior, and checks that it can work on the footage; embeds the prompts while there is a text encoder."""
    prior = load_prior(dataclasses.replace(config.prior, device=str(device)), require="edit")
    size = working_size(footage, window_side(config, prior), prior.codec.downscale, wrap)
    if config.correspondence == "flow" and not footage.is_video:
        raise InputError("correspondence: flow is for videos; use overlap or none")
    prior.condition(["", *config.instructions])
    parts = {"prior": prior, "footage": footage, "size": size, "masks": masks, "wrap": wrap}
    return CanvasJob(config=config, device=device, **parts)


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
