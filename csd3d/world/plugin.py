"""The procedural world as csd3d sees it: two clips to edit where no file is given, whose true edits are known.

The core never imports `csd3d.world`. It asks the registry, and the registry imports this module.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from csd3d.canvas.clip import Captions, Clip, DemoConfig
from csd3d.registry import register
from csd3d.world.language import caption, find_edit
from csd3d.world.scene import Scene
from csd3d.world.scroll import clip_edits, orbit_clip, row_answers, strip_edits, true_flow, wide_strip


@register("demo", "strip", title="A row of objects of the procedural world")
def world_strip(config: DemoConfig, instruction: str | Sequence[str | None]) -> Clip:
    """A picture of a row of objects, with its true edits by an instruction, or by one for each object (None: as is)."""
    strip = wide_strip(config.seed, config.width, config.height)
    alike = isinstance(instruction, str) or len(instruction) == len(strip.scenes)
    rows = row_answers(strip.scenes, instruction) if alike else []
    answers = strip_edits(strip, instruction)[:, None] if rows else None
    pixels = torch.from_numpy(strip.rgb).permute(2, 0, 1)[None]
    found = Clip(f"{len(strip.scenes)} objects of the world", 1, *strip.rgb.shape[:2], _frames_of(pixels))
    found.answers, found.captions = answers, _captions(strip.scenes, rows)
    return found


@register("demo", "orbit", title="A camera on its way around an object of the procedural world")
def world_orbit(config: DemoConfig, instruction: str) -> Clip:
    """A square video, `config.height` a side, of one object from all sides, with its true edits and its true flow."""
    orbit = orbit_clip(config.seed, config.frames, config.height)
    edit, answers = find_edit(orbit.scene, instruction), clip_edits(orbit, instruction)
    pixels = torch.from_numpy(orbit.frames).permute(0, 3, 1, 2)

    def read(indices: Sequence[int]) -> Tensor:
        return pixels[list(indices)].float() / 255

    def flow(a: int, b: int) -> tuple[Tensor, Tensor]:
        motion, seen = true_flow(orbit, a, b)
        return torch.from_numpy(motion), torch.from_numpy(seen)

    found = Clip("an object of the world", *orbit.frames.shape[:3], read, fps=orbit.fps, flow=flow)
    rows = [(scene,) for scene in edit.answers] if edit else []
    found.answers, found.captions = answers if len(answers) else None, _captions((orbit.scene,), rows)
    return found


def _captions(scenes: Sequence[Scene], rows: Sequence[Sequence[Scene]]) -> Captions | None:
    before, *after = ([caption(scene) for scene in row] for row in (scenes, *rows))
    return Captions(before, after) if after else None


def _frames_of(pixels: Tensor) -> Callable[[Sequence[int]], Tensor]:
    return lambda indices: pixels[list(indices)]
