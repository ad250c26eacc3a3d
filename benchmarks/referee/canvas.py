"""Edits of strips and videos of the world by canvas editors, as `csd3d.tasks.edit_canvas` makes them.

A strip shows four objects in a row, a video 24 frames of an orbit; both are named by their seed, "strip-4". A *unit* is
what must agree with the others: an object's cell of a strip, a frame of a video.
"""

import json
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lines import measured
from benchmarks.referee.inputs import compare
from benchmarks.referee.protocol import Level
from csd3d import registry
from csd3d.canvas.clip import Clip
from csd3d.canvas.latents import Latents, edited_frames, encode_clip, working_size
from csd3d.editors.canvas import Canvas, CanvasEditor, CanvasPhase, check_prior, make_cover, window_side
from csd3d.engine.phase import seeded_generator
from csd3d.evaluation.canvas import make_metrics, part_count, parts
from csd3d.evaluation.text import load_judge
from csd3d.priors import Prior, load_prior
from csd3d.run import read

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = {"strip": CONFIGS / "csd-edit-panorama.yaml", "orbit": CONFIGS / "csd-edit-video.yaml"}
RENAMED = {  # figures of csd3d.evaluation.canvas, as the tables call them
    "psnr_truth": "psnr_picture",  # of whole pictures
    "flow_warped_error": "warped_error",
    "seam_visibility_relative": "seams",
    **{key: key for key in ("ssim_truth", "neighbour_distance", "clip_image", "clip_consistency", "clip_directional")},
}


@cache
def canvas_editor_of(keys: str, file: Path) -> CanvasEditor:
    """The editor with these keys, in JSON; raises InputError for keys that are wrong."""
    return read(file, [f"editor={keys}", "compare=[]", "editors={}"]).editor.thing


class CanvasBench:
    """An open prior, a strip or a video, and what judges its edits."""

    def __init__(self, level: Level, scene: str, overrides: tuple[str, ...] = ()):
        self.level, self.file = level, FILES[level.clip]
        seed = scene.rpartition("-")[2]
        self.config = read(self.file, ["compare=[]", "editors={}", f"world.seed={seed}", *overrides])
        self.prior = load_prior(self.config.prior, require="edit")
        self.judge = load_judge(self.config.clip, self.prior.device) if self.prior.knows else None
        self.canvases: dict[str, Canvas] = {}

    def canvas(self, instruction: str) -> Canvas:
        """The clip with the answers to an instruction; the last is kept. ValueError where it does not apply."""
        if instruction not in self.canvases:
            clip = registry.get("demo", self.level.clip).thing(self.config.world, instruction)
            if clip.answers is None:
                raise ValueError(f"{instruction!r} is no instruction for {clip.name}")
            encoded = next(iter(self.canvases.values())).latents if self.canvases else None
            self.canvases = {instruction: open_canvas(self.prior, clip, instruction, self.config, encoded)}
        return self.canvases[instruction]

    def edit(self, one: Any) -> dict[str, Any]:
        """The line of an edit, of an `Asked`."""
        return measured(one.identity | {"kind": one.kind}, lambda: self.measured(one))

    def measured(self, one: Any) -> dict[str, Any]:
        """What is measured of an edit."""
        editor, name = canvas_editor_of(one.keys, self.file), json.loads(one.keys)["type"]
        canvas = replace(self.canvas(one.instruction), generator=partial(seeded_generator, one.seed), kept={})
        check_prior(self.prior, window_side(self.prior, None), canvas.sampling, {name: editor})
        latents, z, cost = edit_canvas(canvas, editor, name)
        return self.figures(canvas, latents, z) | cost

    def figures(self, canvas: Canvas, latents: Latents, z: Tensor) -> dict[str, Any]:
        """Measures of an edit: those of `compare`, by units, and those of csd3d.evaluation.canvas."""
        metrics, frames = make_metrics(canvas.latents, canvas.cover, self.judge, None), []
        for number, source, found in edited_frames({"": (latents, z)}):
            metrics.add_source(number, source)
            metrics.add("", number, found[""])
            frames.append(found[""].picture)
        known = metrics.figures("")
        figures = judge_units(canvas.latents.clip, torch.stack(frames).permute(0, 2, 3, 1))
        return figures | {new: known[old] for old, new in RENAMED.items() if old in known}


def open_canvas(prior: Prior, clip: Clip, instruction: str, config: Any, encoded: Latents | None) -> Canvas:
    """The canvas of a clip; `encoded` are the latents of the same pictures with another instruction."""
    window = window_side(prior, config.window)
    if encoded is None:
        size = working_size(clip, window, prior.codec.downscale, False, prior.codec.multiple)
        encoded = encode_clip(prior, clip, size, False, None)
    latents = replace(encoded, clip=clip, keep_detail=config.keep_detail)
    return Canvas(prior, latents, [instruction], make_cover(latents, window, config.overlap), config.sampling)


def edit_canvas(canvas: Canvas, editor: CanvasEditor, name: str) -> tuple[Latents, Tensor, dict[str, float]]:
    """The latents that an editor works on, what it makes of them, and evaluations and seconds."""
    prior, began = canvas.prior, time.perf_counter()
    prior.unet_evaluations = 0
    own = editor.own_canvas(canvas) if hasattr(editor, "own_canvas") else canvas
    z = own.latents.z.clone()
    phase = CanvasPhase(generator=canvas.generator(name), z=z, moved=torch.zeros_like(z))
    for step in range(editor.count_steps(own)):
        editor.take_step(own, phase, step)
    cost = {"evaluations": prior.unet_evaluations, "seconds": time.perf_counter() - began}
    return own.latents, phase.z, cost


def judge_units(clip: Clip, after: Tensor) -> dict[str, float | int | None]:
    """`compare` of an edited clip [F, H, W, 3], unit by unit."""
    before = clip.read(range(clip.count)).permute(0, 2, 3, 1)
    answers = torch.from_numpy(clip.answers)
    answers = answers.float() / 255 if answers.dtype == torch.uint8 else answers
    count = part_count(clip)
    photos, own, *right = (units(pictures, count) for pictures in (before, after, *answers))
    return compare(photos, photos, right, own)


def units(pictures: Tensor, count: int) -> Tensor:
    """Pictures [F, H, W, 3] cut into `count` units each, [F · count, H, W / count, 3]."""
    return torch.cat([part[None].permute(0, 2, 3, 1) for x in pictures for part in parts(x.permute(2, 0, 1), count)])
