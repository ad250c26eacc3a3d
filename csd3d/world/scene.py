"""A scene of the world: its description (`Scene`), compiled to primitives, materials and lights (`Arrays`).

World frame: z up, the floor disc at `FLOOR`; an object's own front looks along +x before it is turned by `azimuth_deg`.
A primitive is a row of 18 numbers: shape, material, position 3, rotation 9 (world to local, row-major), size 4.
A material is a row of 11: colour 3, pattern colour 3, pattern, gloss, metal, snow, on the object (the disc is not).
The globals are 20: sun direction 3, sunlight 3, ambient light 3, sky 3, ground 3, background kind, cos and sin of the
object's azimuth, 1 / its scale, height of the floor.
"""

import math
from dataclasses import dataclass

import numpy as np

from csd3d.world.shapes import FLOOR, KINDS, Part, hat_parts

COLOURS = {
    "red": (0.85, 0.10, 0.10),
    "orange": (0.96, 0.50, 0.05),
    "yellow": (0.95, 0.85, 0.12),
    "green": (0.12, 0.62, 0.18),
    "cyan": (0.12, 0.75, 0.78),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.50, 0.16, 0.70),
    "pink": (0.95, 0.50, 0.68),
    "white": (0.93, 0.93, 0.93),
    "black": (0.10, 0.10, 0.11),
}
ACCENTS = {
    "wood": (0.45, 0.28, 0.14),
    "carrot": (0.95, 0.45, 0.08),
    "dark": (0.12, 0.12, 0.13),
    "pale": (0.90, 0.90, 0.88),
    "steel": (0.55, 0.57, 0.60),
    "brick": (0.55, 0.22, 0.16),
    "floor": (0.74, 0.73, 0.71),
}
BACKDROPS = {
    "grey": (0.62, 0.62, 0.63),
    "beige": (0.87, 0.80, 0.66),
    "sky blue": (0.56, 0.76, 0.95),
    "mint": (0.66, 0.88, 0.72),
    "lavender": (0.76, 0.69, 0.92),
    "white": (0.95, 0.95, 0.95),
    "red": (0.78, 0.18, 0.16),
    "green": (0.16, 0.55, 0.24),
    "blue": (0.16, 0.28, 0.75),
}
PATTERNS = ("plain", "stripes", "checks", "dots")
MATERIALS = ("matte", "glossy", "metal")
SKIES = ("plain", "gradient", "horizon")
TIMES = ("day", "sunset", "night")


@dataclass(frozen=True)
class Scene:
    """One object, with or without a disc, described by words and numbers; an edit is a `dataclasses.replace` of it."""

    kind: str
    colour: str
    pattern: str = "plain"
    pattern_colour: str = "white"
    material: str = "matte"
    backdrop: str = "grey"
    sky: str = "plain"
    time: str = "day"
    snow: bool = False
    hat: str | None = None
    scale: float = 1.0
    azimuth_deg: float = 0.0
    sun_azimuth_deg: float = 40.0
    sun_elevation_deg: float = 50.0
    plate: bool = True  # the disc below the object; without it the object floats

    def __post_init__(self) -> None:
        _check("kind", self.kind, KINDS)
        _check("colour", self.colour, COLOURS)
        _check("pattern", self.pattern, PATTERNS)
        _check("pattern_colour", self.pattern_colour, COLOURS)
        _check("material", self.material, MATERIALS)
        _check("backdrop", self.backdrop, BACKDROPS)
        _check("sky", self.sky, SKIES)
        _check("time", self.time, TIMES)
        if self.hat is not None:
            _check("hat", self.hat, COLOURS)
        for key in ("scale", "azimuth_deg", "sun_azimuth_deg", "sun_elevation_deg"):
            value = getattr(self, key)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not abs(value) <= 1e4 or (key == "scale" and value < 1e-3):
                what = "a number in [0.001, 10000]" if key == "scale" else "degrees in [-10000, 10000]"
                raise ValueError(f"scene {key} {value!r:.40} is not {what}")
        for key in ("snow", "plate"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"scene {key} {getattr(self, key)!r:.40} is not true or false")


def _check(key: str, value: str, known) -> None:
    if value not in known:
        raise ValueError(f"scene {key} {value!r} is not one of {', '.join(known)}")


@dataclass(frozen=True)
class Arrays:
    """A scene as numbers: `primitives` [P,18], `materials` [M,11], `globals` [20], all float32."""

    primitives: np.ndarray
    materials: np.ndarray
    globals: np.ndarray


def compile_scene(scene: Scene) -> Arrays:
    """The arrays that the renderers take."""
    kind = KINDS[scene.kind]
    parts = list(kind.parts)
    if scene.hat is not None:
        parts += hat_parts(kind.top, kind.top_radius)
    names = [*(["floor"] if scene.plate else []), *dict.fromkeys(part.material for part in parts)]
    materials = np.stack([_material(name, scene) for name in names])
    floor = Part("cylinder", (0, 0, FLOOR - 0.05), (1.12, 0.05, 0.02), "floor")
    rows = [_row(floor, 0, 0.0, 1.0)] if scene.plate else []
    rows += [_row(part, names.index(part.material), scene.azimuth_deg, scene.scale) for part in parts]
    return Arrays(np.stack(rows), materials, _globals(scene))


SHAPES = ("sphere", "box", "cylinder", "cone", "torus", "capsule", "tube")


def _row(part: Part, material: int, azimuth_deg: float, scale: float) -> np.ndarray:
    a = math.radians(azimuth_deg)
    turn = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    foot = np.array([0, 0, FLOOR])
    position = turn @ ((np.array(part.position) - foot) * scale) + foot
    size = np.zeros(4)
    size[: len(part.size)] = np.array(part.size) * scale
    rotation = (turn @ part.rotation()).T
    return np.concatenate([[SHAPES.index(part.shape), material], position, rotation.ravel(), size]).astype(np.float32)


def _material(name: str, scene: Scene) -> np.ndarray:
    snow = float(scene.snow)
    if name == "main":
        first, second = COLOURS[scene.colour], COLOURS[scene.pattern_colour]
        gloss, metal = float(scene.material == "glossy"), float(scene.material == "metal")
        row = [*first, *second, PATTERNS.index(scene.pattern), gloss, metal, snow, 1.0]
    else:
        colour = COLOURS[scene.hat] if name == "hat" else ACCENTS[name]
        row = [*colour, *colour, 0, 0, 0, snow, float(name != "floor")]
    return np.array(row, np.float32)


_LIGHTS = {  # sunlight, ambient light, tint of the backdrop
    "day": ((0.62, 0.60, 0.56), (0.50, 0.51, 0.53), (1.0, 1.0, 1.0)),
    "sunset": ((0.85, 0.42, 0.18), (0.42, 0.32, 0.36), (1.0, 0.66, 0.48)),
    "night": ((0.16, 0.20, 0.34), (0.20, 0.23, 0.36), (0.20, 0.23, 0.40)),
}


def _globals(scene: Scene) -> np.ndarray:
    sunlight, ambient, tint = _LIGHTS[scene.time]
    azimuth, elevation = math.radians(scene.sun_azimuth_deg), math.radians(scene.sun_elevation_deg)
    sun = (math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation))
    sky = np.array(BACKDROPS[scene.backdrop]) * tint
    ground = sky * 0.62
    turn = math.radians(scene.azimuth_deg)
    tail = (SKIES.index(scene.sky), math.cos(turn), math.sin(turn), 1 / scene.scale, FLOOR)
    return np.array([*sun, *sunlight, *ambient, *sky, *ground, *tail], np.float32)
