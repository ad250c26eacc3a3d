"""The kinds of object: each a handful of signed-distance parts, standing on the floor, front along +x.

Sizes: sphere (radius); box (half extents 3, rounding); cylinder (radius, half height, rounding); cone (radius below,
radius above, half height); torus (radius, tube radius); capsule (radius, half length); tube (radius, half wall, half
height). Cylinders, cones, tori, capsules and tubes stand along their own z; `tilt` (degrees about x, y, z in turn)
lays them over.
"""

from dataclasses import dataclass

import numpy as np

FLOOR = -0.8
ROUND = 360


@dataclass(frozen=True)
class Part:
    """One primitive of an object, in the object's frame; `material` is "main" or an accent's name."""

    shape: str
    position: tuple[float, float, float]
    size: tuple[float, ...]
    material: str = "main"
    tilt: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def rotation(self) -> np.ndarray:
        """Local-to-object rotation [3,3]."""
        result = np.eye(3)
        for axis, angle in enumerate(np.radians(self.tilt)):
            c, s = np.cos(angle), np.sin(angle)
            i, j = (axis + 1) % 3, (axis + 2) % 3
            turn = np.eye(3)
            turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
            result = turn @ result
        return result


@dataclass(frozen=True)
class Kind:
    """An object's parts, where a hat sits on it, whether its front can be told from its back, and how many turns
    about z leave it as it is (ROUND: any)."""

    parts: tuple[Part, ...]
    top: tuple[float, float, float]
    top_radius: float
    has_front: bool = False
    symmetry: int = 1


def hat_parts(top: tuple[float, float, float], radius: float) -> list[Part]:
    """A brimmed cone whose brim lies at `top`."""
    x, y, z = top
    return [
        Part("cylinder", (x, y, z + 0.02), (radius * 1.7, 0.04, 0.02), "hat"),
        Part("cone", (x, y, z + 0.06 + radius * 0.75), (radius * 1.2, radius * 0.35, radius * 0.75), "hat"),
    ]


def _legs(x: float, y: float, top: float, half: float) -> list[Part]:
    middle, half_height = (top + FLOOR) / 2, (top - FLOOR) / 2
    return [Part("box", (sx * x, sy * y, middle), (half, half, half_height, 0.01)) for sx in (-1, 1) for sy in (-1, 1)]


def _eyes(x: float, y: float, z: float, radius: float, material: str = "dark") -> list[Part]:
    return [Part("sphere", (x, side * y, z), (radius,), material) for side in (-1, 1)]


KINDS: dict[str, Kind] = {
    "ball": Kind((Part("sphere", (0, 0, -0.08), (0.72,)),), (0, 0, 0.58), 0.26, symmetry=ROUND),
    "cube": Kind((Part("box", (0, 0, -0.22), (0.58, 0.58, 0.58, 0.05)),), (0, 0, 0.36), 0.3, symmetry=4),
    "cylinder": Kind((Part("cylinder", (0, 0, -0.12), (0.52, 0.68, 0.04)),), (0, 0, 0.56), 0.3, symmetry=ROUND),
    "cone": Kind((Part("cone", (0, 0, -0.05), (0.72, 0.04, 0.75)),), (0, 0, 0.45), 0.2, symmetry=ROUND),
    "donut": Kind((Part("torus", (0, 0, -0.02), (0.52, 0.26), tilt=(0, 90, 0)),), (0, 0, 0.72), 0.2, symmetry=2),
    "snowman": Kind(
        (
            Part("sphere", (0, 0, -0.4), (0.46,)),
            Part("sphere", (0, 0, 0.14), (0.33,)),
            Part("sphere", (0, 0, 0.56), (0.25,)),
            Part("cone", (0.34, 0, 0.55), (0.08, 0.01, 0.16), "carrot", (0, 90, 0)),
            *_eyes(0.21, 0.1, 0.64, 0.045),
        ),
        (0, 0, 0.74),
        0.19,
        True,
    ),
    "table": Kind(
        (Part("box", (0, 0, 0.0), (0.82, 0.56, 0.09, 0.03)), *_legs(0.68, 0.42, -0.06, 0.085)),
        (0, 0, 0.09),
        0.25,
        symmetry=2,
    ),
    "chair": Kind(
        (
            Part("box", (0, 0, -0.14), (0.5, 0.46, 0.08, 0.03)),
            Part("box", (-0.44, 0, 0.36), (0.07, 0.46, 0.5, 0.03)),
            *_legs(0.42, 0.38, -0.2, 0.075),
        ),
        (-0.44, 0, 0.86),
        0.16,
        True,
    ),
    "tree": Kind(
        (
            Part("cylinder", (0, 0, -0.6), (0.13, 0.22, 0.0), "wood"),
            Part("cone", (0, 0, -0.12), (0.66, 0.16, 0.3)),
            Part("cone", (0, 0, 0.26), (0.52, 0.1, 0.28)),
            Part("cone", (0, 0, 0.62), (0.38, 0.02, 0.27)),
        ),
        (0, 0, 0.62),
        0.17,
        symmetry=ROUND,
    ),
    "house": Kind(
        (
            Part("box", (0, 0, -0.38), (0.5, 0.5, 0.42, 0.02)),
            Part("cone", (0, 0, 0.32), (0.76, 0.02, 0.32), "brick"),
            Part("box", (0.49, 0, -0.56), (0.04, 0.15, 0.24, 0.01), "wood"),
            Part("box", (0.49, 0.31, -0.3), (0.03, 0.1, 0.1, 0.01), "pale"),
            Part("box", (0.49, -0.31, -0.3), (0.03, 0.1, 0.1, 0.01), "pale"),
        ),
        (0, 0, 0.46),
        0.16,
        True,
    ),
    "mug": Kind(
        (
            Part("tube", (0, 0, -0.22), (0.5, 0.06, 0.58)),
            Part("cylinder", (0, 0, -0.72), (0.5, 0.08, 0.02)),
            Part("capsule", (0, 0.72, 0.04), (0.08, 0.17), tilt=(90, 0, 0)),
            Part("capsule", (0, 0.72, -0.5), (0.08, 0.17), tilt=(90, 0, 0)),
            Part("capsule", (0, 0.89, -0.23), (0.08, 0.27)),
        ),
        (0, 0, 0.36),
        0.4,
        True,
    ),
    "lamp": Kind(
        (
            Part("cylinder", (0, 0, -0.73), (0.4, 0.07, 0.03), "dark"),
            Part("cylinder", (0, 0, -0.3), (0.06, 0.45, 0.0), "steel"),
            Part("cone", (0, 0, 0.34), (0.62, 0.3, 0.36)),
        ),
        (0, 0, 0.7),
        0.22,
        symmetry=ROUND,
    ),
    "robot": Kind(
        (
            Part("box", (0, 0, -0.12), (0.3, 0.4, 0.36, 0.05)),
            Part("box", (0, 0, 0.5), (0.24, 0.28, 0.22, 0.05)),
            Part("capsule", (0, 0.5, -0.12), (0.09, 0.26), "steel"),
            Part("capsule", (0, -0.5, -0.12), (0.09, 0.26), "steel"),
            Part("box", (0, 0.2, -0.64), (0.14, 0.13, 0.16, 0.02), "steel"),
            Part("box", (0, -0.2, -0.64), (0.14, 0.13, 0.16, 0.02), "steel"),
            *_eyes(0.23, 0.12, 0.56, 0.065, "pale"),
            Part("box", (0.23, 0, 0.4), (0.03, 0.14, 0.03, 0.0), "dark"),
        ),
        (0, 0, 0.72),
        0.2,
        True,
    ),
    "duck": Kind(
        (
            Part("capsule", (-0.05, 0, -0.42), (0.37, 0.28), tilt=(0, 90, 0)),
            Part("cone", (-0.62, 0, -0.2), (0.22, 0.05, 0.2), tilt=(0, -60, 0)),
            Part("sphere", (0.34, 0, 0.2), (0.32,)),
            Part("cone", (0.72, 0, 0.14), (0.14, 0.05, 0.13), "carrot", (0, 90, 0)),
            *_eyes(0.57, 0.15, 0.32, 0.05),
        ),
        (0.32, 0, 0.46),
        0.2,
        True,
    ),
    "car": Kind(
        (
            Part("box", (0, 0, -0.42), (0.86, 0.42, 0.2, 0.06)),
            Part("box", (-0.12, 0, -0.08), (0.44, 0.36, 0.2, 0.06)),
            Part("box", (0.31, 0, -0.1), (0.03, 0.29, 0.12, 0.01), "pale"),
            *(
                Part("cylinder", (x, y, -0.6), (0.2, 0.07, 0.02), "dark", (90, 0, 0))
                for x in (-0.5, 0.5)
                for y in (-0.4, 0.4)
            ),
            *_eyes(0.85, 0.27, -0.38, 0.07, "pale"),
        ),
        (-0.12, 0, 0.12),
        0.24,
        True,
    ),
}
