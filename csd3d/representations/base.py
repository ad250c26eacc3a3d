"""The protocol of representations: what a scene or an asset is made of.

Symbols: B views of H × W pixels; rgb in [0, 1]; positions [S, 3] in world units, directions [S, 3] of unit length;
sigma [S], density per world unit. A new representation is one file of this folder:

    @register("representation", "voxels", title="Dense voxels")
    @dataclass(frozen=True)
    class Voxels:
        side: int = 64  # voxels along each side

        def open(self, aabb, generator, unbounded=False, background="learned") -> SceneModel: ...

It renders whole views, so it need not have rays (splats.py has none). The number of its parameters may change in
`keep_up` and `fit_step`: the `Parameter` objects must stay the same, because optimisers refer to them; only their
`.data` is replaced, also by `load_state_dict`. Adam's moments (`fit.descend`) and the average of a parameter whose
shape has changed start anew.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from csd3d import registry
from csd3d.cameras import Cameras
from csd3d.engine.logs import progress
from csd3d.errors import InputError
from csd3d.rendering import Rendered, Shading
from csd3d.schema import Chosen

if TYPE_CHECKING:
    from csd3d.representations.fit import Features, FitConfig, Pictures

ALBEDO = Shading()
OPAQUE = 0.5  # pixels of a higher opacity show a surface

BackgroundKind = str | tuple[float, float, float]  # "learned", "white", "black", or a colour, rgb in [0, 1]


class Representation(Protocol):
    """The settings of a representation: a frozen dataclass, registered as "representation".

    It may also have `levels`, how many levels of detail there are (text to 3D then checks its `asset.levels`),
    `training_bytes`, memory for training one scene, and `bytes_per_ray`, that of a training render (what does not fit
    is then refused before any work), and `supports`, a tuple of "shading", "orientation", "distortion" and "smoothness"
    (depths have a gradient): what renders do of this. Keys for the rest get a warning. `hints`, a tuple, names what
    `open` also takes by keyword of a captured scene where that is known: "points" (its sparse `Points`), "cameras"
    (those of the training views) and "splats" (the splats that it already is).
    """

    def open(
        self, aabb: Tensor, generator: torch.Generator, unbounded: bool = False, background: BackgroundKind = "learned"
    ) -> "SceneModel":
        """Return a new scene in the box `aabb` [6] (min, max).

        Raises InputError for settings or a background that it does not support.
        """


class SceneModel(Protocol):
    """A scene: an `nn.Module` whose state_dict holds everything that a resumed run needs."""

    # ------------------------------------------------------------------------------------------------------ rendering

    def render_views(self, cameras: Cameras, indices: Tensor, shading: Shading = ALBEDO) -> Rendered:
        """Render the cameras `indices` [B] without a graph: rgb [B, H, W, 3], depth and opacity [B, H, W]."""

    def render(
        self,
        cameras: Cameras,
        jitter: Tensor | None = None,
        shading: Shading = ALBEDO,
        background: Callable[[Tensor], Tensor] | None = None,
        distortion: bool = False,
    ) -> Rendered:
        """Render all cameras with a graph, in the shapes of `render_views`.

        jitter [B, H, W] in [0, 1) shifts the samples along each ray.  background(directions) [R, 3], if given, replaces
        the scene's own.  distortion: also report each ray's distortion loss.  A scene without samples or without that
        loss ignores the argument.
        """

    # --------------------------------------------------------------------------------------------------- optimisation

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters, each in one group: "scene", and "background" where that is learned.

        A scene may also have `rate_of(parameter)`: the parameter's learning rate as a share of its group's.
        """

    def set_levels(self, levels: int) -> None:
        """Use only the `levels` coarsest levels of detail. Does nothing in a scene without levels."""

    def keep_up(self, step: int, generator: torch.Generator) -> None:
        """Do the upkeep before step `step` of an optimisation, such as updating an occupancy grid."""

    def start_fit(self, config: "FitConfig") -> torch.optim.Optimizer:
        """Return the optimiser of a new fit, and reset what an earlier fit has adapted, such as its ray count."""

    def fit_step(
        self,
        optimiser: torch.optim.Optimizer,
        pictures: "Pictures",
        config: "FitConfig",
        step: int,
        generator: torch.Generator,
        features: "Features | None" = None,
    ) -> dict[str, float]:
        """Do step `step` of a fit to pictures, including `keep_up`; return its losses, "psnr" and "skipped".

        features: maps images [B, 3, h, w] to feature maps for the perceptual loss.  skipped: 1.0 if the loss or a
        gradient was not finite, in which case no parameter has changed.
        """

    # ---------------------------------------------------------------------------------------------------------- shape

    def density(self, positions: Tensor) -> Tensor:
        """Return sigma [S]; a mesh is its iso-surface."""

    def radiance(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return rgb [S, 3] as seen along the directions, and sigma [S]; a mesh is coloured by it."""

    # -------------------------------------------------------------------------------------------------- as nn.Module

    def to(self, device: torch.device | str) -> "SceneModel": ...

    def parameters(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


# what an opened scene is checked for; torch's modules have the rest
DUTIES = (
    *("render", "render_views", "parameter_groups", "set_levels", "keep_up"),
    *("start_fit", "fit_step", "density", "radiance"),
)


def open_scene(
    representation: Representation, *parts: Any, hints: Mapping[str, Any] | None = None, **options: Any
) -> SceneModel:
    """Call `representation.open`; InputError, one line, if what it returns lacks a method of `SceneModel`.

    hints: what is known of a captured scene; the representation gets what its own `hints` name.
    """
    taken = getattr(representation, "hints", ())
    options |= {key: value for key, value in (hints or {}).items() if key in taken}
    model = representation.open(*parts, **options)
    entry = registry.entry_of("representation", representation)
    at = f"{entry.place}: representation {entry.name!r}" if entry else type(representation).__name__
    if not isinstance(model, nn.Module):
        raise InputError(f"{at}: open returned a {type(model).__name__}, which is no nn.Module")
    if lacking := [name for name in DUTIES if not callable(getattr(model, name, None))]:
        raise InputError(f"{at}: the {type(model).__name__} that open returned lacks {', '.join(lacking)}")
    return model


def check_opens(representation: Representation, aabb: Tensor, unbounded: bool = False, **options: Any) -> None:
    """Raise InputError, before any work, if `representation` cannot be opened; the scene that it opens is let go."""
    open_scene(representation, aabb, torch.Generator(), unbounded, **options)


def ignored_keys(chosen: Chosen, given: Mapping[str, str]) -> list[str]:
    """Return a warning for each key of `given` whose feature, its value, the representation does not support."""
    title, supported = registry.title("representation", chosen.name), getattr(chosen.thing, "supports", ())
    lacking = {key: feature for key, feature in given.items() if feature not in supported}
    return [f"{key} is set, but has no effect: {title} has no {feature}" for key, feature in lacking.items()]


def surface_depth(views: Rendered) -> Tensor:
    """Return the depth [B, H, W] of views, infinite where there is no surface."""
    return torch.where(views.opacity > OPAQUE, views.depth, torch.inf)


def render_each(
    model: SceneModel, cameras: Cameras, title: str, indices: Tensor | None = None, shading: Shading = ALBEDO
) -> Iterator[Rendered]:
    """Yield the renders [1, H, W, ...] of the cameras `indices`, or of all, under a progress bar; rgb in [0, 1]."""
    indices = torch.arange(len(cameras)) if indices is None else indices
    for i in progress(indices.cpu().split(1), title):
        view = model.render_views(cameras, i, shading)
        yield Rendered(view.rgb.clamp(0, 1), view.depth, view.opacity, view.samples)


def render_all(
    model: SceneModel, cameras: Cameras, title: str, indices: Tensor | None = None, shading: Shading = ALBEDO
) -> Rendered:
    """Return the renders of `render_each` as one, with fields [B, H, W, ...]."""
    views = list(render_each(model, cameras, title, indices, shading))
    fields = (torch.cat([getattr(view, key) for view in views]) for key in ("rgb", "depth", "opacity"))
    return Rendered(*fields, sum(view.samples for view in views))
