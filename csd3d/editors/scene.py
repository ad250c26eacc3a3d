"""The edit of a scene: an editor replaces training views while the scene is fitted to them.

Symbols: N training views of H × W pixels, M of them at a time, `rows` [M] long; z [M, C, h, w] their latents. The prior
sees photos and renders at its own size H' × W' (`view_size`); edited pictures are brought back to H × W. An editor is
one file of this folder:

    @register("scene_editor", "mine", title="My editor")
    @dataclass(frozen=True)
    class Mine:
        every: int = 10  # steps between edits

        def update(self, edit: SceneEdit, step: int, report: Report) -> None:
            '''Called before step `step` of the fit; may replace pictures of `edit` and report values to log.'''
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.canvas.detail import restore_detail
from csd3d.canvas.latents import resize
from csd3d.datasets import Capture
from csd3d.distillation.ddim import PredictNoise
from csd3d.distillation.guidance import edit_predictor
from csd3d.distillation.method import Query
from csd3d.errors import InputError, at_key
from csd3d.priors import Prior
from csd3d.rendering import Rendered
from csd3d.representations.base import SceneModel

Report = Callable[[dict[str, float]], None]


class SceneEditor(Protocol):
    """An editor: a frozen dataclass whose fields are its config keys.

    It may have check(source: SceneSource, key: str), called before any work: it raises InputError, which begins with
    `key`, the editor's place in the config, if it cannot edit this capture.
    """

    def update(self, edit: "SceneEdit", step: int, report: Report) -> None:
        """Replace the pictures of `edit` that are due before step `step`; call `report` after each inner step.

        Take all randomness from edit.generator, or seed it by edit.seed if it must be the same each time. A resumed run
        then continues like an uninterrupted one.
        """


@dataclass(eq=False)
class SceneSource:
    """The photos and the instruction, shared by all editors of a run; encoded once, when an editor first asks."""

    prior: Prior  # an editing model
    capture: Capture
    prompt: str  # the instruction
    keep_detail: bool = True  # see `restore_detail`
    side: int | None = None  # shorter side, in pixels, at which the prior sees views; None: its own

    @property
    def size(self) -> tuple[int, int]:
        """(H', W') at which the prior sees photos and renders."""
        return view_size(tuple(self.capture.images.shape[1:3]), self.side or self.prior.defaults.working_size)

    @cached_property
    def photos(self) -> Tensor:
        """The training photos [N, 3, H', W']."""
        return self.shown(self.capture.images[self.capture.train])

    def shown(self, pictures: Tensor) -> Tensor:
        """Pictures [M, H, W, 3] as the prior sees them, [M, 3, H', W']."""
        return resize(pictures.permute(0, 3, 1, 2), self.size)

    @cached_property
    @torch.no_grad()
    def z(self) -> Tensor:
        """Their latents [N, C, h, w]."""
        return self.prior.encode(self.photos)

    @cached_property
    @torch.no_grad()
    def image(self) -> Tensor:
        """The photos as an editing model takes them, [N, ...]: `Prior.encode_condition`."""
        image = self.prior.encode_condition(self.photos)
        self.prior.introduce(self, image)
        return image

    @cached_property
    @torch.no_grad()
    def decoded(self) -> Tensor:
        """The photos after encoding and decoding, [N, 3, H', W'] on the CPU."""
        return torch.cat([self.decode(part).cpu() for part in self.z.split(self.prior.micro_batch)])

    def decode(self, z: Tensor) -> Tensor:
        """Pictures [M, 3, H', W'] of latents."""
        return self.prior.decode(z, size=self.size)

    def brought_back(self, pictures: Tensor) -> Tensor:
        """Pictures [M, 3, H', W'] in the capture's size, [M, H, W, 3]."""
        return resize(pictures, tuple(self.capture.images.shape[1:3])).permute(0, 2, 3, 1)


@dataclass(eq=False)
class SceneEdit:
    """The state of one editor's edit: the scene, and the pictures that it is fitted to."""

    source: SceneSource
    model: SceneModel  # the scene as fitted so far
    images: Tensor  # [B, H, W, 3], all frames of the capture; editors replace training views in place
    generator: torch.Generator
    seed: int = 0  # the run's seed
    steps: int = 1  # of the whole fit

    @property
    def prior(self) -> Prior:
        return self.source.prior

    @property
    def capture(self) -> Capture:
        return self.source.capture

    @property
    def count(self) -> int:
        """N, the number of training views."""
        return len(self.capture.train)

    @cached_property
    def cameras(self) -> Cameras:
        """The training views' cameras [N], of H' × W' pixels."""
        height, width = self.source.size
        own = self.capture.cameras[self.capture.train]
        return own if (height, width) == (own.height, own.width) else own.resized(width, height)

    def render(self, rows: Tensor) -> Rendered:
        """Render the scene as it is now from the training views `rows`, H' × W' pixels each."""
        return self.model.render_views(self.cameras, rows)

    @torch.no_grad()
    def encode(self, views: Rendered) -> Tensor:
        """Latents z of rendered views."""
        return self.prior.encode(views.rgb.clamp(0, 1).permute(0, 3, 1, 2))

    @torch.no_grad()
    def replace(self, rows: Tensor, z: Tensor) -> None:
        """Replace the training views `rows` by the pictures of edited latents."""
        source, at_once = self.source, self.prior.micro_batch  # large photos do not fit in memory all together
        for part, latents in zip(rows.split(at_once), z.split(at_once), strict=True):
            pictures = source.brought_back(source.decode(latents))
            if source.keep_detail:
                photos = self.capture.images[self.capture.train[part]].to(pictures.device)
                decoded = source.brought_back(source.decoded[part].to(pictures.device))
                pictures = restore_detail(pictures, decoded, photos)
            self.images[self.capture.train[part]] = pictures.cpu()

    def predict(self, asked: dict[str, Query]) -> dict[str, Tensor]:
        """`prior.predict`."""
        return self.prior.predict(asked)

    def query(self, z_t: Tensor, t: int, rows: Tensor, prompt: str | None = None, image: bool = True) -> Query:
        """A query for the views `rows` at z_t, under the instruction or another `prompt`, with their photos or without.

        Pass it to `prior.predict` under any name; equal queries are computed once.
        """
        prompt = self.source.prompt if prompt is None else prompt
        return Query(z_t, t, (prompt,) * len(rows), self.source.image[rows] if image else None)

    def guided(self, rows: Tensor, text_scale: float | None, image_scale: float | None) -> PredictNoise:
        """The guided ε(z_t, t) of the views `rows`, InstructPix2Pix's Eq. 3 (arXiv 2211.09800), for `samplers.sample`.

        Scales that are None are the model's for sampled pictures.
        """
        source, suits = self.source, self.prior.defaults
        text_scale = suits.sampling_text_scale if text_scale is None else text_scale
        image_scale = suits.sampling_image_scale if image_scale is None else image_scale
        prompts = (source.prompt,) * len(rows)
        return edit_predictor(self.prior.predict, prompts, source.image[rows], text_scale, image_scale)


def view_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(H', W') of pictures of `size` = (H, W) whose shorter side is made `side` pixels."""
    scale = side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


@torch.no_grad()
def try_out(source: SceneSource) -> None:
    """Encode one view, predict its noise and decode it, so that a model or a size which does not work fails at once.

    Raises InputError in the words of what failed.
    """
    one = replace(source, capture=replace(source.capture, train=source.capture.train[:1]))
    prior = source.prior
    with at_key("working_size"):
        prior.check_size(*source.size)
    try:
        query = Query(one.z, prior.num_train_timesteps // 2, (source.prompt,), one.image)
        prior.predict({"full": query})
        one.decode(one.z)
    except InputError:
        raise
    except ValueError as error:
        height, width = source.size
        raise InputError(f"working_size: a view of {width}x{height} does not suit the model: {error}") from None
