"""The world's objects that a prompt allows, to hold assets against: `csd3d.evaluation.ground_truth.RightObjects`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.evaluation.ground_truth import TrueViews
from csd3d.world.language import caption
from csd3d.world.prompts import OPEN, open_attributes, read_prompt, scenes_of_prompt
from csd3d.world.reference import scene_distance
from csd3d.world.render import FAR, Pictures, render_arrays
from csd3d.world.scene import COLOURS, PATTERNS, Arrays, Scene, compile_scene
from csd3d.world.shapes import KINDS, ROUND

SUNS = [(azimuth, elevation) for elevation in (38.0, 65.0) for azimuth in range(0, 360, 45)]  # degrees
TURNS = 12  # of an object without a front, up to where it looks the same again
SAME_COLOUR = 0.06  # largest difference in a channel between a pixel's base colour and the colour that it has
SNOW = 0.96


@dataclass(frozen=True)
class WorldObjects:
    """The objects of a prompt in the world's words: scenes with a plain backdrop, and no plate unless it is said."""

    prompt: str

    def draw(self, count: int, seed: int) -> list[Scene]:
        return [self._alone(scene) for scene in scenes_of_prompt(self.prompt, count, seed)]

    def near(self, thing: Scene) -> list[Scene]:
        said = read_prompt(self.prompt)
        found = [replace(thing, sun_azimuth_deg=a, sun_elevation_deg=e) for a, e in SUNS]
        for key in open_attributes(said):
            if key != "backdrop":
                found += [replace(thing, **{key: value}) for value in OPEN.get(key, COLOURS)]
        if not KINDS[thing.kind].has_front:  # then no view word tells its front
            found += [replace(thing, azimuth_deg=_period(thing) * i / TURNS) for i in range(TURNS)]
        # another kind may have a front, which must be where view words say
        found = [replace(s, azimuth_deg=0.0) if KINDS[s.kind].has_front else s for s in found]
        other = [s for s in dict.fromkeys(found) if s != thing]
        return [s for s in other if s.pattern == "plain" or s.colour != s.pattern_colour]

    def _alone(self, scene: Scene) -> Scene:
        return replace(scene, sky="plain", plate="plate" in read_prompt(self.prompt))

    def views(self, thing: Scene, cameras: Cameras, backdrop: Tensor) -> TrueViews:
        arrays = compile_scene(thing)
        arrays.globals[9:12] = backdrop.numpy()
        intrinsics = torch.stack((cameras.fx, cameras.fy, cameras.cx, cameras.cy), 1)
        rows = torch.cat((cameras.camera_to_world.flatten(1), intrinsics), 1).cpu().numpy().astype(np.float32)
        found = render_arrays([arrays] * len(rows), rows, cameras.width, cameras.height)
        seen = found.depth < FAR
        mask = torch.from_numpy(seen.astype(np.float32) if thing.plate else found.mask)
        depth = torch.from_numpy(np.where(seen, found.depth, np.inf))
        return TrueViews(torch.from_numpy(found.rgb), depth, mask, _asked(thing, arrays, found))

    def distance(self, thing: Scene, points: Tensor) -> Tensor:
        return scene_distance(compile_scene(thing), points)[0]

    def open_values(self, thing: Scene) -> dict[str, str]:
        keys = [key for key in open_attributes(read_prompt(self.prompt)) if key != "backdrop"]
        return {key: str(getattr(thing, key)) for key in keys}

    def name(self, thing: Scene) -> str:
        return caption(thing).replace(f", {thing.backdrop} background", "")


def _period(scene: Scene) -> float:
    """The turn in degrees after which an object without a front looks the same, 0 if any turn does."""
    if scene.pattern in ("checks", "dots"):  # they do not turn with the shape
        return 360.0
    symmetry = KINDS[scene.kind].symmetry
    return 0.0 if symmetry == ROUND else 360.0 / symmetry


def _asked(scene: Scene, arrays: Arrays, found: Pictures) -> Tensor:
    """The colour that each pixel is meant to have, [B,H,W]; see `TrueViews`."""
    parts = [tuple(row[:3]) for row in arrays.materials if row[10] > 0.5]
    main, pattern = COLOURS[scene.colour], COLOURS[scene.pattern_colour]
    others = [*parts, *([(SNOW,) * 3] if scene.snow else [])]
    far = (9.0, 9.0, 9.0)  # no pixel has it
    asked = [main, pattern if scene.pattern in PATTERNS[1:] else far]
    asked += [c for c in dict.fromkeys(others) if not any(_alike(c, other) for other in asked)]
    difference = np.abs(found.albedo[..., None, :] - np.array(asked, np.float32)).max(-1)
    clear = (difference.min(-1) < SAME_COLOUR) & (found.mask > 0.5)
    return torch.from_numpy(np.where(clear, difference.argmin(-1), -1))


def _alike(a: Sequence[float], b: Sequence[float]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < SAME_COLOUR
