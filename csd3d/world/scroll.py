"""Demo inputs of panoramas and videos: a wide strip of objects and an orbit around one, with their true edits.

The strip shows objects on discs in a row, under one sun, with shadows on their neighbours. A camera travels along the
row and takes one column at a time (a pushbroom camera: parallel rays across, perspective down), so the picture has no
seams. The row is closed: the last object stands beside the first.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle, product

import numpy as np

from csd3d.world.language import PRIMARY, SOLIDS, Edit, find_edit
from csd3d.world.pairs import FOV_DEG, to_bytes
from csd3d.world.render import FAR, camera_row, render, render_arrays
from csd3d.world.scene import BACKDROPS, Arrays, Scene, compile_scene
from csd3d.world.shapes import KINDS, ROUND

ELEVATION_DEG, DISTANCE, TARGET_Z = 16.0, 4.25, -0.1  # of the travelling camera; it looks along -x
COLOURS = ("yellow", "orange", "cyan", "purple", "pink")  # vivid, but no answers to "a bright colour"
ORBITED = ("snowman", "chair", "mug", "robot", "duck", "car")  # kinds with a front, mostly of their own colour
CLASHES = {"sky blue": "cyan", "mint": "cyan", "beige": "yellow", "lavender": "purple"}  # backdrop: colour to avoid
CHUNK = 24  # frames rendered at a time
TOLERANCE, EDGE = 0.05, 0.3  # world units: depths closer than the first are equal; a larger step than EDGE is an edge


# --------------------------------------------------------------------------------------------------------------- strip


@dataclass(frozen=True)
class Strip:
    """n objects `scenes` from left to right, each in an n-th of the width; `rgb` [H, W, 3] float32 in [0, 1], and
    `mask` [H, W], the share of each pixel that objects cover."""

    scenes: tuple[Scene, ...]
    rgb: np.ndarray
    mask: np.ndarray

    @property
    def object_masks(self) -> np.ndarray:
        """The objects' own masks [n, H, W]."""
        owner = _cells(self.mask.shape[1], len(self.scenes))[0]
        return self.mask * (owner == np.arange(len(self.scenes))[:, None])[:, None]


def wide_strip(seed: int, width: int = 512, height: int = 128) -> Strip:
    """A strip of round(width / height) different objects, at least one. They are plain and matte, by day, so that each
    ambiguous instruction has the same answers for all of them."""
    scenes = _sample_row(random.Random(f"strip/{seed}"), max(1, round(width / height)))
    return Strip(scenes, *render_strip(scenes, width, height))


def _sample_row(rng: random.Random, count: int) -> tuple[Scene, ...]:
    """`count` scenes with one light and backdrop; neighbours differ in kind and colour."""
    backdrop = rng.choice([name for name in BACKDROPS if name not in PRIMARY])
    side = rng.choice((-1, 1))
    shared = {
        "backdrop": backdrop,
        "sky": rng.choice(("plain", "gradient")),
        "sun_azimuth_deg": side * rng.uniform(30, 65),
        "sun_elevation_deg": rng.uniform(45, 60),
    }
    kinds = [name for name, kind in KINDS.items() if name not in SOLIDS and kind.symmetry != ROUND]
    colours = [colour for colour in COLOURS if colour != CLASHES.get(backdrop)]
    rng.shuffle(kinds)
    rng.shuffle(colours)
    rows = zip(range(count), cycle(kinds), cycle(colours), strict=False)
    return tuple(Scene(kind, colour, azimuth_deg=rng.uniform(-50, 50), **shared) for _, kind, colour in rows)


def render_strip(scenes: Sequence[Scene], width: int, height: int, samples: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Render the row of `scenes`: rgb [H, W, 3] and mask [H, W], float32 in [0, 1].

    Each column is rendered as a picture of one row, by a camera turned by 90°.
    """
    owner, offset = _cells(width, len(scenes))
    focal = height / 2 / math.tan(math.radians(FOV_DEG) / 2)
    spacing = width / len(scenes) * DISTANCE / focal  # pixels are square at the objects' distance
    row = [_with_neighbours(scenes, i, spacing) for i in range(len(scenes))]
    cameras = np.stack([_column_camera(x * spacing, focal, height) for x in offset])
    pictures = render_arrays([row[i] for i in owner], cameras, height, 1, samples)
    return pictures.rgb[:, 0].transpose(1, 0, 2).copy(), pictures.mask[:, 0].T.copy()


def _cells(width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For every column: its object [W], and the distance to the middle of the object's cell, in cells [W]."""
    position = (np.arange(width) + 0.5) * count / width
    owner = np.minimum(position.astype(int), count - 1)
    return owner, position - owner - 0.5


def _column_camera(y: float, focal: float, height: int) -> np.ndarray:
    """A camera row [16] whose picture [1, height] is the column at world `y`, from top to bottom."""
    upright = camera_row(0, ELEVATION_DEG, DISTANCE, FOV_DEG, height, (0, y, TARGET_Z))
    right, up, back, origin = upright[:12].reshape(3, 4).T
    pose = np.stack([-up, right, back, origin], axis=1)
    return np.concatenate([pose.ravel(), [focal, focal, height / 2, 0.5]]).astype(np.float32)


def _with_neighbours(scenes: Sequence[Scene], index: int, spacing: float) -> Arrays:
    """Object `index` at the origin and its two neighbours, `spacing` apart along y, which cast shadows on it."""
    own = compile_scene(scenes[index])
    primitives, materials = [own.primitives], [own.materials]
    for step in (-1, 1) if len(scenes) > 1 else ():
        beside = compile_scene(scenes[(index + step) % len(scenes)])
        moved = beside.primitives.copy()
        moved[:, 1] += sum(len(rows) for rows in materials)
        moved[:, 3] += step * spacing
        primitives.append(moved)
        materials.append(beside.materials)
    return Arrays(np.concatenate(primitives), np.concatenate(materials), own.globals)


def strip_edits(strip: Strip, instruction: str | Sequence[str | None]) -> np.ndarray:
    """Render the right answers to an instruction, [K, H, W, 3] float32; K = 0 if the world does not know the words.

    In an answer all objects change in the same way, e.g. all to red. A sequence gives each object its own instruction
    (None: unchanged); objects with the same instruction change in the same way.
    """
    height, width = strip.mask.shape
    rows = row_answers(strip.scenes, instruction)
    pictures = [render_strip(row, width, height)[0] for row in rows]
    return np.stack(pictures) if pictures else np.empty((0, height, width, 3), np.float32)


def row_answers(scenes: Sequence[Scene], instruction: str | Sequence[str | None]) -> list[tuple[Scene, ...]]:
    """The edited rows that are right by an instruction, or by one for each object, as in `strip_edits`."""
    words = [instruction] * len(scenes) if isinstance(instruction, str) else list(instruction)
    if len(words) != len(scenes):
        raise ValueError(f"{len(words)} instructions for {len(scenes)} objects")
    asked = list(dict.fromkeys(word for word in words if word is not None))
    groups = {word: [i for i, w in enumerate(words) if w == word] for word in asked}
    choices = [_alike([scenes[i] for i in groups[word]], word) for word in asked]
    rows = []
    for chosen in product(*choices):
        row = list(scenes)
        for word, edited in zip(asked, chosen, strict=True):
            for i, scene in zip(groups[word], edited, strict=True):
                row[i] = scene
        rows.append(tuple(row))
    return rows


def _alike(scenes: list[Scene], instruction: str) -> list[tuple[Scene, ...]]:
    """The answers that change all `scenes` in the same way; none if a scene has no known answer."""
    edits = [find_edit(scene, instruction) for scene in scenes]
    example = next(((scene, edit) for scene, edit in zip(scenes, edits, strict=True) if edit), None)
    if example is None:
        return []
    count = len(example[1].answers)
    answers = [edit.answers if edit else _already(scene, *example) for scene, edit in zip(scenes, edits, strict=True)]
    return list(zip(*answers, strict=True)) if all(len(a) == count for a in answers) else []


def _already(scene: Scene, other: Scene, edit: Edit) -> tuple[Scene, ...]:
    """The scene itself if the edit of `other` would not change it: a yellow mug fulfils "make it yellow"."""
    wanted = {f.name: getattr(edit.answers[0], f.name) for f in fields(Scene)}
    changes = {name: value for name, value in wanted.items() if value != getattr(other, name)}
    return (scene,) if replace(scene, **changes) == scene and not edit.ambiguous else ()


# --------------------------------------------------------------------------------------------------------------- orbit


@dataclass(frozen=True)
class Clip:
    """An orbit around `scene`: `frames` [F, H, W, 3] uint8; `masks` [F, H, W], the share of each pixel that the object
    covers; `depth` [F, H, W] in world units along the ray (`FAR`: background); `cameras` [F, 16] of the renderer."""

    scene: Scene
    frames: np.ndarray
    masks: np.ndarray
    depth: np.ndarray
    cameras: np.ndarray
    fps: float = 12.0


def orbit_clip(seed: int, frames: int = 24, size: int = 128, arc_deg: float = 120.0) -> Clip:
    """Render a camera path of `arc_deg` around a still object. It is plain and matte, so that a surface has the same
    colour in all frames and ambiguous instructions have all their answers."""
    if frames < 1:
        raise ValueError(f"a clip of {frames} frames; at least one")
    rng = random.Random(f"orbit/{seed}")
    (scene,) = _sample_row(rng, 1)
    scene = replace(scene, kind=rng.choice(ORBITED))
    first, way = scene.azimuth_deg - arc_deg / 2, rng.choice((-1, 1))
    angles = [first + arc_deg * (i + 0.5) / frames for i in range(frames)][::way]
    cameras = np.stack([camera_row(a, ELEVATION_DEG, DISTANCE, FOV_DEG, size, (0, 0, TARGET_Z)) for a in angles])
    rgb, masks = _film(scene, cameras, size)
    depth = render([scene] * frames, cameras, size, size, samples=1).depth
    return Clip(scene, rgb, masks, depth, cameras)


def _film(scene: Scene, cameras: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames [F, H, W, 3] uint8 and masks [F, H, W] float32."""
    frames = np.empty((len(cameras), size, size, 3), np.uint8)
    masks = np.empty(frames.shape[:3], np.float32)
    for i in range(0, len(cameras), CHUNK):
        chunk = cameras[i : i + CHUNK]
        pictures = render([scene] * len(chunk), chunk, size, size)
        frames[i : i + CHUNK], masks[i : i + CHUNK] = to_bytes(pictures.rgb), pictures.mask
    return frames, masks


def clip_edits(clip: Clip, instruction: str) -> np.ndarray:
    """Render the right answers to an instruction, [K, F, H, W, 3] uint8; K = 0 if the world does not know the words."""
    edit = find_edit(clip.scene, instruction)
    size = clip.frames.shape[1]
    films = [_film(answer, clip.cameras, size)[0] for answer in edit.answers] if edit else []
    return np.stack(films) if films else np.empty((0, *clip.frames.shape), np.uint8)


def true_flow(clip: Clip, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
    """The flow [H, W, 2] from frame i to frame j in pixels (right, down), and whether j shows the pixel, [H, W] bool:
    inside the picture, nothing in front, no edge within a pixel. The backdrop is infinitely far."""
    size = clip.depth.shape[1]
    v, u = np.mgrid[:size, :size] + 0.5
    ahead = clip.depth[i] < FAR
    directions = _directions(clip.cameras[i], u, v)
    (_, start), (axes, origin) = _pose(clip.cameras[i]), _pose(clip.cameras[j])
    points = np.where(ahead[..., None], start, origin) + clip.depth[i][..., None] * directions
    x, y, z = np.moveaxis((points - origin) @ axes, -1, 0)
    fx, fy, cx, cy = clip.cameras[j, 12:]
    depth = np.minimum(z, -1e-6)  # behind the camera: far outside the picture
    to = np.stack([cx - fx * x / depth, cy + fy * y / depth], axis=-1)
    distance = np.linalg.norm(points - origin, axis=-1)
    return (to - np.stack([u, v], axis=-1)).astype(np.float32), _unhidden(clip.depth[j], to, distance)


def _pose(camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A camera's axes as columns [3, 3] (right, up, back) and its position [3]."""
    pose = camera[:12].reshape(3, 4).astype(np.float64)
    return pose[:, :3], pose[:, 3]


def _directions(camera: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Unit rays [..., 3] through picture points (u, v)."""
    fx, fy, cx, cy = camera[12:]
    local = np.stack([(u - cx) / fx, (cy - v) / fy, -np.ones_like(u)], axis=-1)
    rays = local @ _pose(camera)[0].T
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


def _unhidden(depth: np.ndarray, to: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Whether the four pixels of `depth` [H, W] around each point `to` [H, W, 2] show one surface at `distance`."""
    size = len(depth)
    inside = ((to >= 0) & (to <= size)).all(axis=-1)
    u, v = (np.floor(np.where(inside, to[..., k], 0) - 0.5).astype(int) for k in (0, 1))
    around = np.stack([depth[(v + dv).clip(0, size - 1), (u + du).clip(0, size - 1)] for du in (0, 1) for dv in (0, 1)])
    near, far = around.min(axis=0), around.max(axis=0)
    return inside & (far - near < EDGE) & (near - TOLERANCE < distance) & (distance < far + TOLERANCE)
