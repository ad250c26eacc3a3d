"""Shared by DGE and GaussCtrl: the choice of key views, epipolar lines, and predictions that begin with the key views.

Symbols: N training views, K of them key views; n = h w pixels of a layer of the UNet, each `stride` pixels of the
picture wide; (u, v) pixels of the picture with its lens undone.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.canvas.latents import pixel_grid
from csd3d.distillation.ddim import PredictNoise
from csd3d.distillation.guidance import edit_predictor
from csd3d.distillation.method import Predict, Query
from csd3d.editors.inversion import Asked, by_micro_batches
from csd3d.editors.scene import SceneEdit, SceneSource
from csd3d.errors import InputError, at_key
from csd3d.priors import Prior
from csd3d.priors.attention import check_attention
from csd3d.priors.key_views import KeyViewAttention
from csd3d.priors.queries import restricted
from csd3d.schema import Share, Within
from csd3d.waits import sent

ONE_OF = 5  # views for each key view, as in DGE's code


@dataclass(frozen=True)
class KeyViewEditor:
    """Keys of the editors whose views attend to key views. Subclasses define `update`."""

    # number of key views, at most all and prior.micro_batch; null: one for five views
    key_views: Annotated[int, Within(1, 100_000)] | None = None
    ddim_steps: Annotated[int, Within(1, 10_000)] = 20  # steps of an edit
    start: Share = 1.0  # noise level of the first step, a share of the schedule
    text_scale: float | None = None  # ω_y, guidance by the instruction; null: the model's default
    image_scale: float | None = None  # ω_s, guidance by the photo; null: the model's default

    def __post_init__(self) -> None:
        for key, least in (("key_views", 1), ("ddim_steps", 1)):
            if (value := getattr(self, key)) is not None and value < least:
                raise ValueError(f"{key} is {value}: give a whole number of at least {least}")
        if not 0 <= self.start <= 1:
            raise ValueError(f"start is {self.start}: give a number in [0, 1]")

    def check(self, source: SceneSource, key: str) -> None:
        """Raise InputError for a model without Stable Diffusion's attention, or key views that do not fit in a call."""
        with at_key(key):
            check_attention(source.prior)
        count, at_once = self.count_keys(len(source.capture.train), source.prior), source.prior.micro_batch
        if count > at_once:
            raise InputError(
                f"{key}.key_views: {count} key views see one another, so that they need one call of the model, but "
                f"prior.micro_batch is {at_once}: give at most {at_once}, or raise prior.micro_batch"
            )

    def count_keys(self, views: int, prior: Prior) -> int:
        """K for N = `views`."""
        given = min(-(-views // ONE_OF), prior.micro_batch) if self.key_views is None else self.key_views
        return min(given, views)

    def guided(self, edit: SceneEdit, predict: Predict) -> PredictNoise:
        """The guided ε(z_t, t) of all N views, from the predictions of InstructPix2Pix's branches."""
        defaults, source = edit.prior.defaults, edit.source
        text = defaults.sampling_text_scale if self.text_scale is None else self.text_scale
        image = defaults.sampling_image_scale if self.image_scale is None else self.image_scale
        return edit_predictor(predict, (source.prompt,) * edit.count, source.image, text, image)


def in_runs(cameras: Cameras, count: int) -> list[Tensor]:
    """The views in `count` runs of almost equal lengths, in the order of the azimuths that their cameras look at."""
    axis = -cameras.camera_to_world[:, :, 2].cpu()
    order = torch.atan2(axis[:, 1], axis[:, 0]).argsort(stable=True)
    return list(order.tensor_split(count))


def one_of_each(runs: list[Tensor], generator: torch.Generator) -> Tensor:
    """One view of each run, drawn at random, in rising order."""
    drawn = [run[torch.randint(len(run), (1,), generator=generator)] for run in runs]
    return torch.cat(drawn).sort().values


def key_views_first(work: Asked, state: KeyViewAttention, keys: Tensor) -> Predict:
    """`work.predict` for queries with one row for each view: the key views `keys` in one call, then the others.

    Where the branches of the key views do not fit in one call together, each call has all key views of some branches.
    """

    def predict(asked: dict[str, Query]) -> dict[str, Tensor]:
        found = {name: torch.empty_like(query.z_t) for name, query in asked.items()}
        rest = torch.ones(len(next(iter(found.values()))), dtype=torch.bool)
        rest[keys] = False
        parts = [(keys, None)] + ([(others, others)] if len(others := rest.nonzero()[:, 0]) else [])
        for rows, views in parts:
            state.hold(keys, views)
            of_part = {name: restricted(replace(query, rows=rows)) for name, query in asked.items()}
            answers = by_micro_batches(work, state.begin, whole=views is None)(of_part)
            for name, answer in answers.items():
                found[name][sent(rows, answer.device)] = answer
        return found

    return predict


class EpipolarLines:
    """Which pixels of one view lie near the epipolar line of a pixel of another view, in each layer of a UNet."""

    def __init__(self, cameras: Cameras, strides: dict[str, int], sizes: dict[str, tuple[int, int]], reach: float):
        """`strides`, `sizes` (h, w): by layer. `reach`: largest distance from the line, in pixels of the layer."""
        self.cameras, self.strides, self.sizes, self.reach = cameras, strides, sizes, reach
        positions = cameras.positions.cpu()
        self._apart = (torch.cdist(positions, positions) > 1e-6).tolist()
        self._rays: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def near(self, layer: str, view: int, key: int) -> Tensor | None:
        """[n, n] bool: whether pixel q (column) of view `key` is near the line of pixel p (row) of `view`.

        None, all pixels, where the two cameras stand at the same point and there are no lines.
        """
        if not self._apart[view][key]:
            return None
        stride, (h, w) = self.strides[layer], self.sizes[layer]
        if (stride, h, w) not in self._rays:
            pixels = (pixel_grid(h, w).reshape(-1, 2).to(self.cameras.fx) + 0.5) * stride
            views = range(len(self.cameras))
            found = [view_rays(self.cameras, i, pixels) for i in views]
            self._rays[stride, h, w] = torch.stack([d for d, _ in found]), torch.stack([uv for _, uv in found])
        directions, uv = self._rays[stride, h, w]
        return epipolar_distance(self.cameras, view, key, directions[view], uv[key]) <= self.reach * stride


def view_rays(cameras: Cameras, view: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Of pixels [n, 2] of one view: unit directions [n, 3] in the world, and (u, v) [n, 2] with the lens undone.

    Pixels that a fisheye sees at 90° or more off its axis have no (u, v) in a flat picture; they are put far outside.
    """
    _, directions = cameras.rays(torch.full((len(pixels),), view, device=pixels.device), pixels)
    x, y, z = (directions @ cameras.camera_to_world[view, :, :3]).unbind(-1)  # OpenGL's axes: y up, looking along -z
    xy = torch.stack((x, -y), -1) / (-z).clamp_min(1e-6)[:, None]
    focal = torch.stack((cameras.fx[view], cameras.fy[view]))
    return directions, xy * focal + torch.stack((cameras.cx[view], cameras.cy[view]))


def epipolar_distance(cameras: Cameras, view: int, key: int, directions: Tensor, uv: Tensor) -> Tensor:
    """Distances [P, Q] of points `uv` [Q, 2] of `key` from the lines of rays `directions` [P, 3] of `view`, in pixels.

    The plane through both cameras and a ray has the normal m = (o_view − o_key) × d. In key's picture it is the line
    a u + b v + c = 0 with (a, b, c) = K⁻ᵀ Rᵀ m. The cameras must not stand at the same point.
    """
    baseline = cameras.positions[view] - cameras.positions[key]
    normal = torch.linalg.cross(baseline.expand_as(directions), directions)
    x, y, z = (normal @ cameras.camera_to_world[key, :, :3]).unbind(-1)  # OpenGL's axes, of which K has y and z turned
    a, b = x / cameras.fx[key], -y / cameras.fy[key]
    c = -z - a * cameras.cx[key] - b * cameras.cy[key]
    slope = torch.stack((a, b), -1)
    return (slope @ uv.T + c[:, None]).abs() / slope.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def layer_strides(sizes: dict[str, tuple[int, int]], latents: tuple[int, int], unit: int) -> dict[str, int]:
    """Pixels of the picture along a pixel of each layer of `sizes` (h, w), for latents (h, w) of `unit` pixels each."""
    halved = {tuple(-(-side // 2**level) for side in latents): unit * 2**level for level in reversed(range(8))}
    return {layer: halved[size] for layer, size in sizes.items()}
