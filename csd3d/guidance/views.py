"""Random cameras of text to 3D, and the prompt of each view.

Angles in degrees. Azimuth 0 is the object's front (+x), counter-clockwise from above; elevation 90 is straight above.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from csd3d.cameras import Cameras, look_at, on_sphere, side_seen, wrap_deg
from csd3d.errors import InputError, closest
from csd3d.priors import Prior
from csd3d.schema import Amount, Within, counted_as

Range = tuple[float, float]
VIEW_WORDS = {  # {view} of a prompt, by direction
    "front": "front view",
    "left": "side view",
    "right": "side view",
    "back": "back view",
    "overhead": "overhead view",
}
FIELDS = ("{prompt}", "{view}", "{backdrop}")  # of a template of prompts
FIELD = re.compile(r"\{[^{}]*\}")


@dataclass
class ViewsConfig:
    """The cameras of a step's views, drawn uniformly from ranges; lengths in world units."""

    elevation_deg: Range = (0.0, 60.0)  # range of camera elevations, degrees
    azimuth_deg: Range = (0.0, 360.0)  # range of camera azimuths, degrees; 0 is the object's front
    distance: Range = (3.7, 4.3)  # range of distances from the object's centre, world units
    fov_deg: Range = (31.0, 31.0)  # range of fields of view, degrees
    position_jitter: Amount = 0.0  # standard deviation of noise on the camera's position, world units
    target_jitter: Amount = 0.03  # standard deviation of the point that the camera looks at, world units
    up_jitter: Amount = 0.0  # standard deviation of the camera's roll, radians
    stratified: bool = True  # spread a step's azimuths evenly: one view in each equal part of the range

    def __post_init__(self) -> None:
        for key in ("elevation_deg", "azimuth_deg", "distance", "fov_deg"):
            low, high = getattr(self, key)
            if not low <= high:
                raise ValueError(f"{key} is [{low:g}, {high:g}]: give the lower end first")
        limits = {"elevation_deg": (-90, 90), "fov_deg": (1, 170), "distance": (1e-3, 1e6)}
        for key, (least, most) in limits.items():
            if not (least <= getattr(self, key)[0] and getattr(self, key)[1] <= most):
                raise ValueError(f"{key} is {list(getattr(self, key))}: both ends must be in [{least:g}, {most:g}]")
        if self.azimuth_deg[1] - self.azimuth_deg[0] > 360:
            raise ValueError(f"azimuth_deg is {list(self.azimuth_deg)}: a range of at most 360 degrees")


@dataclass(frozen=True)
class Views:
    """Cameras [B] with their azimuths in [−180, 180) and elevations, both [B] in degrees."""

    cameras: Cameras
    azimuth_deg: Tensor
    elevation_deg: Tensor

    @property
    def places(self) -> list[tuple[float, float]]:
        """(azimuth, elevation) of each view."""
        return list(zip(self.azimuth_deg.tolist(), self.elevation_deg.tolist(), strict=True))

    @property
    def pose(self) -> Tensor:
        """Camera to world [B, 12], row-major 3x4."""
        return self.cameras.camera_to_world.flatten(1)

    @property
    def view(self) -> Tensor:
        """[B, 3]: azimuth, elevation and distance from the origin, for priors that take cameras."""
        return torch.stack((self.azimuth_deg, self.elevation_deg, self.cameras.positions.norm(dim=1)), 1)


def sample_views(config: ViewsConfig, count: int, size: int, generator: torch.Generator) -> Views:
    """`count` random views of `size`² pixels; the number of random draws does not depend on the config."""

    def uniform(limits: Range, strata: int = 1) -> Tensor:
        u = torch.rand(count, generator=generator)
        u = (torch.arange(count) + u) / count if strata > 1 else u
        return limits[0] + (limits[1] - limits[0]) * u

    azimuth = uniform(config.azimuth_deg, count if config.stratified else 1)
    elevation, distance, fov = (uniform(getattr(config, key)) for key in ("elevation_deg", "distance", "fov_deg"))
    position, target, up = torch.randn(3, count, 3, generator=generator)
    direction = on_sphere(torch.deg2rad(azimuth), torch.deg2rad(elevation))
    place = distance[:, None] * direction + config.position_jitter * position
    poses = look_at(place, config.target_jitter * target)
    if config.up_jitter:
        poses = tilt(poses, config.up_jitter * up[:, 0])
    focal = 0.5 * size / torch.deg2rad(fov / 2).tan()
    middle = torch.full((count,), size / 2)
    return Views(Cameras(poses, focal, focal, middle, middle, size, size), wrap_deg(azimuth), elevation)


def tilt(poses: Tensor, angle: Tensor) -> Tensor:
    """Poses [B,3,4] rolled about their viewing axes by `angle` [B] radians."""
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    right, up = poses[:, :, 0], poses[:, :, 1]
    return torch.stack((c * right + s * up, c * up - s * right, poses[:, :, 2], poses[:, :, 3]), -1)


# --- what the prompt says ---


@dataclass
class PromptConfig:
    """The prompt of a view: `template` with {prompt}, {view} and {backdrop} filled in.

    With `backdrops`, each step draws one, renders all its views over it and names it in the prompt, so that the object
    cannot hide in a fixed background colour. Exports use the first.
    """

    template: str = "{prompt}, {view}"  # prompt of a view; {prompt}, {view} and {backdrop} are filled in
    words: dict[str, str] = field(default_factory=lambda: dict(VIEW_WORDS))  # {view} by direction
    front_deg: float = 45.0  # a view is "front" up to this many degrees to either side of the front
    back_deg: float = 45.0  # a view is "back" up to this many degrees to either side of the back
    overhead_deg: Annotated[float, Within(-90, 90)] = 60.0  # a view is "overhead" above this elevation, degrees
    backdrops: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # background colours: {name: rgb}
    # whether the model is told a view's camera too: auto (if it takes one), true (it must take one), or false
    camera: bool | Literal["auto"] = counted_as(lambda told: None if told == "auto" else told, "auto")
    # whether guidance leads to the camera too: the unconditional branch is told none (of a model that takes cameras)
    guide_camera: bool = False

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise ValueError(f'template is {self.template!r}: it must hold {{prompt}}, as "{{prompt}}, {{view}}" does')
        if unfilled := [name for name in FIELD.findall(self.template) if name not in FIELDS]:
            raise ValueError(f"template has {unfilled[0]}: only {', '.join(FIELDS)} are filled in")
        for view, text in self.words.items():
            if view not in VIEW_WORDS:
                near = f"did you mean {closest(view, VIEW_WORDS)}?"
                raise ValueError(f"words.{view}: there is no such view; {near} Known: {', '.join(VIEW_WORDS)}")
            if unfilled := FIELD.findall(text):
                raise ValueError(f"words.{view} has {unfilled[0]}: only those of the template are filled in")
        if missing := VIEW_WORDS.keys() - self.words.keys():
            raise ValueError(f"words lacks {', '.join(sorted(missing))}")
        if bool(self.backdrops) != ("{backdrop}" in self.template):
            raise ValueError("backdrops and {backdrop} in the template go together: give both, or neither")
        for name, colour in self.backdrops.items():
            if not all(0 <= part <= 1 for part in colour):
                raise ValueError(f"backdrops.{name} is {list(colour)}: give red, green and blue in [0, 1]")
        for key in ("front_deg", "back_deg"):
            if not 0 <= getattr(self, key) <= 180:
                raise ValueError(f"{key} is {getattr(self, key):g}: give degrees to either side, 0 to 180")
        if self.front_deg + self.back_deg > 180:
            raise ValueError(
                f"front_deg {self.front_deg:g} and back_deg {self.back_deg:g} overlap: at most 180 together"
            )

    def text(self, prompt: str, view: str, backdrop: str | None = None) -> str:
        """The prompt of a view ("front", "left", "right", "back", "overhead"), before the first backdrop by default."""
        backdrop = backdrop or next(iter(self.backdrops), "")
        values = {"{view}": self.words[view], "{backdrop}": backdrop, "{prompt}": prompt}
        return FIELD.sub(lambda match: values[match[0]], self.template)

    def texts(self, prompt: str) -> list[str]:
        """All values of `text` for a prompt."""
        return [self.text(prompt, view, name) for view in self.words for name in self.backdrops or ("",)]


def check_camera(config: PromptConfig, prior: Prior, model: str) -> None:
    """Raise InputError if the config demands that the model is told the camera, and it takes none."""
    if config.camera is True and not prior.takes_camera:
        raise InputError(
            f"prompts.camera: true, but {model} takes no camera; set auto or false, or give a model that does, such as "
            "csd3d/assets/t2i"
        )


def view_of(azimuth_deg: float, elevation_deg: float, config: PromptConfig) -> str:
    """ "overhead" above `overhead_deg`, else what `side_seen` says: "front", "left", "right" or "back"."""
    above = elevation_deg > config.overhead_deg
    return "overhead" if above else side_seen(azimuth_deg, config.front_deg, config.back_deg)


def away_views(
    azimuth_deg: float, elevation_deg: float, overhead_deg: float = 60.0
) -> tuple[tuple[str, str], tuple[float, float]]:
    """The two views that Perp-Neg pushes a particle away from, and their weights (arXiv 2304.04968, section 4.2).

    With r = 1 − |azimuth|/90: between front and side, the side by r and the back by 1; between side and back, the side
    by −r and the front by 1. The weights are linear and each view has one prompt; the paper's interpolated prompts and
    fitted exponentials are for Stable Diffusion's bias. Overhead views have weights 0.
    """
    if elevation_deg > overhead_deg:
        return ("front", "back"), (0.0, 0.0)
    turn = wrap_deg(azimuth_deg)
    side, off = "left" if turn > 0 else "right", abs(turn) / 90
    return ((side, "back"), (max(1 - off, 0.0), 1.0)) if off < 1 else ((side, "front"), (off - 1, 1.0))
