"""Register the procedural world: two demo inputs for jobs without a file, and the ground truth of edits and prompts.

The core never imports `csd3d.world`; the registry imports this module. Other sources of demo data or ground truth
register in the same way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.canvas.clip import Captions, Clip, DemoConfig
from csd3d.datasets import Capture
from csd3d.evaluation.ground_truth import TrueViews, own_cameras
from csd3d.registry import register
from csd3d.vocabulary import Vocabulary
from csd3d.world import prompts, vocabulary
from csd3d.world.dataset import read_scene, render_views, true_answers
from csd3d.world.language import caption, find_edit
from csd3d.world.objects import WorldObjects
from csd3d.world.render import FAR
from csd3d.world.scene import Scene
from csd3d.world.scroll import clip_edits, orbit_clip, row_answers, strip_edits, true_flow, wide_strip

if TYPE_CHECKING:  # the truth about captures does not need the libraries of the metrics
    from csd3d.metrics.clip import ClipModel


@register("demo", "strip", title="A row of objects of the procedural world")
def world_strip(config: DemoConfig, instruction: str | Sequence[str | None]) -> Clip:
    """A picture of a row of objects, with its true edits by an instruction, or by one per object (None: unchanged)."""
    strip = wide_strip(config.seed, config.width, config.height)
    alike = isinstance(instruction, str) or len(instruction) == len(strip.scenes)
    rows = row_answers(strip.scenes, instruction) if alike else []
    answers = strip_edits(strip, instruction)[:, None] if rows else None
    pixels = torch.from_numpy(strip.rgb).permute(2, 0, 1)[None]
    found = Clip(f"{len(strip.scenes)} objects of the world", 1, *strip.rgb.shape[:2], _frames_of(pixels))
    found.answers, found.captions = answers, _captions(strip.scenes, rows)
    return found


@register("demo", "orbit", title="A camera path around an object of the procedural world")
def world_orbit(config: DemoConfig, instruction: str) -> Clip:
    """A square video, `config.height` pixels a side, of one object, with its true edits and its true flow."""
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


@register("demo", "object", title="One view of an object of the procedural world")
def world_object(prompt: str, seed: int, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """The first camera's picture [H, W, 3] of an object that the prompt allows, premultiplied by its mask [H, W].

    Raises InputError for a prompt in other words than the world's.
    """
    objects, grey = WorldObjects(prompt), torch.full((3,), 0.6)
    seen = objects.views(objects.draw(1, seed)[0], cameras[0], grey)
    mask = seen.mask[0]
    return (seen.rgb[0] - (1 - mask[:, :, None]) * grey).clamp(0, 1), mask


def _captions(scenes: Sequence[Scene], rows: Sequence[Sequence[Scene]]) -> Captions | None:
    before, *after = ([caption(scene) for scene in row] for row in (scenes, *rows))
    return Captions(before, after) if after else None


def _frames_of(pixels: Tensor) -> Callable[[Sequence[int]], Tensor]:
    return lambda indices: pixels[list(indices)]


@dataclass
class WorldSceneTruth:
    """The right answers to an edit of a capture of the world; see `csd3d.evaluation.ground_truth.Truth`."""

    capture: Capture
    source: Scene
    answers: tuple[Scene, ...]

    def views(self, scene: Scene, indices: Tensor) -> TrueViews:
        """Render `scene` by the capture's cameras `indices`."""
        cameras = own_cameras(self.capture, self.capture.cameras[indices])
        intrinsics = torch.stack((cameras.fx, cameras.fy, cameras.cx, cameras.cy), 1)
        pictures = render_views(scene, cameras.camera_to_world.float(), intrinsics, cameras.width, cameras.height)
        depth = torch.from_numpy(pictures.depth)
        depth = torch.where(depth < FAR, depth * self.capture.scale, torch.inf)
        return TrueViews(torch.from_numpy(pictures.rgb), depth, torch.from_numpy(pictures.mask))


@register("ground_truth", "world", title="The procedural world")
class WorldTruth:
    """Ground truth for captures of the world and for prompts in its words; see `GroundTruth` for each method."""

    def scene_truth(self, capture: Capture, prompt: str) -> WorldSceneTruth | None:
        scene = read_scene(capture.folder)
        answers = true_answers(scene, prompt) if scene is not None else ()
        return WorldSceneTruth(capture, scene, answers) if answers else None

    def knows(self, prompt: str) -> bool:
        return prompts.parse_prompt(prompt) is not None

    def shape_prompt(self, prompt: str) -> str:
        said = prompts.read_prompt(prompt)
        kept = {key: value for key, value in said.items() if key not in ("pattern", "pattern_colour", "material")}
        return prompts.write_prompt(kept | {"colour": "white"})

    def distractors(self, prompt: str, count: int, seed: int) -> list[str]:
        return prompts.distractors(prompt, count, seed)

    def open_attribute_values(self, clip: "ClipModel", images: Tensor, prompt: str) -> dict[str, list[str]]:
        return prompts.open_attribute_values(clip, images, prompt)

    def true_renders(
        self, prompt: str, azimuths_deg: Sequence[float], elevation_deg: float, count: int, size: int, seed: int
    ) -> Tensor:
        return prompts.true_renders(prompt, azimuths_deg, elevation_deg, count, size, seed)

    def right_objects(self, prompt: str) -> WorldObjects:
        return WorldObjects(prompt)

    def vocabulary(self) -> Vocabulary:
        return vocabulary.vocabulary()
