"""CSD-Edit of a scene: at intervals, many training views are edited together (arXiv 2307.04787, section 4.3)."""

import logging
import time
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor

from csd3d.distillation.edit_loop import CollaborativeEditConfig, collaborative_edit, inner_edit
from csd3d.distillation.methods.csd_edit import CSDEdit
from csd3d.distillation.step import configured
from csd3d.distillation.suits import suited
from csd3d.editors.matches import check_matches, matches_of
from csd3d.editors.scene import Report, SceneEdit, SceneSource
from csd3d.errors import InputError
from csd3d.priors import Defaults
from csd3d.registry import register
from csd3d.schema import MOST_STEPS, Share, Steps, Within

logger = logging.getLogger("csd3d")
LONG_S = 10.0  # seconds that a round takes, from which on it is announced


@register("scene_editor", "csd_edit", title="CSD-Edit, edited together")
@dataclass(frozen=True)
class CSDEditScene:
    """CSD-Edit of the training views, conditioned on the *original* photos.

    Round 0 starts at the photos and uses `edit`. Later rounds start at renders of the scene and take `later_steps` at
    noise levels up to `later_t_max`, so that they keep what round 0 chose. With edit.svgd.compat "official" the photos
    are encoded as in the authors' code (scaled and sampled), and the baseline is guided by them too.

    Not in the paper: with `match`, after each step z ← z − match ∇L(z − z̃), L the consistency loss of `Matches`: what
    an edit changes is pulled together where views show the same point of the scene, by its depth.

        editor: {type: csd_edit, rounds: 3, edit: {steps: 40}}
    """

    edit_every: Steps = 300  # steps of the fit between rounds
    rounds: Annotated[int, Within(0, MOST_STEPS)] = 2  # number of rounds
    # views edited together in a round, drawn at random; null: all
    views: Annotated[int, Within(1, 100_000)] | None = None
    later_t_max: Annotated[float, Within(0.001, 1)] = 0.4  # most noise of later rounds, a share of the schedule
    later_steps: Annotated[int, Within(0, MOST_STEPS)] = 8  # steps of each later round
    match: Annotated[float, Within(0, 2)] = 0.0  # how far points that match in 3D are pulled together after each step
    # views that each view is matched with, the nearest; null: all
    match_nearest: Annotated[int, Within(1, 100_000)] | None = None
    match_above: Share = 0.15  # noise level, a share of the schedule, below which they are not
    text_scale: float | None = None  # ω_y, guidance by the instruction; null: the model's default
    image_scale: float | None = None  # ω_s, guidance by the photo; null: the model's default
    baseline: str = "image"  # what is subtracted: image (the paper), guided or noise; see `csd3d keys csd_edit`
    edit: CollaborativeEditConfig = field(default_factory=inner_edit)  # the inner edit of a round

    def __post_init__(self) -> None:
        if self.edit_every < 1:
            raise ValueError(f"edit_every is {self.edit_every}: give a whole number of at least 1")
        configured(self.method(Defaults()), self.edit)  # ValueError if the two do not fit

    def check(self, source: SceneSource, key: str) -> None:
        """Raise InputError, before any work, if a round of this capture does not fit in memory, or has no noise."""
        try:
            self.inner(1, source.prior.defaults)
        except ValueError as error:  # `later_t_max` is below the lowest noise level, which may be the model's
            raise InputError(f"{key}.later_t_max: {error}") from None
        count = len(source.capture.train)
        count = min(self.views or count, count)
        if self.match:
            nearest = min(self.match_nearest or count, count)
            check_matches(source, count, nearest, f"{key}.match", f"set {key}.match_nearest to fewer")

    @property
    def official(self) -> bool:
        """Whether to follow the authors' code in everything."""
        return self.edit.svgd is not None and self.edit.svgd.official

    def method(self, defaults: Defaults) -> CSDEdit:
        """CSD-Edit with these scales, or the prior's defaults where they are null."""
        return CSDEdit(
            defaults.text_scale if self.text_scale is None else self.text_scale,
            defaults.image_scale if self.image_scale is None else self.image_scale,
            "guided" if self.official else self.baseline,
        )

    def update(self, edit: SceneEdit, step: int, report: Report) -> None:
        """Edit the views of a round, if one begins at `step`."""
        number, rest = divmod(step, self.edit_every)
        if rest or number >= self.rounds:
            return
        prior, source = edit.prior, edit.source
        rows = torch.randperm(edit.count, generator=edit.generator)[: self.views or edit.count].sort().values
        views = edit.render(rows) if number or self.match else None
        matches = matches_of(edit, rows, views, self.match_nearest) if self.match else None
        config = self.inner(number, prior.defaults)
        began = time.monotonic()

        def tell(done: int, _: Tensor, diagnostics: dict[str, float]) -> None:
            report(diagnostics)
            left = (time.monotonic() - began) * (config.steps - 1)
            if done == 0 and left > LONG_S:
                what = f"round {number + 1} of {self.rounds}: {len(rows)} views"
                logger.info("%s, %d steps, about %.0f s", what, config.steps, left)

        def matched(z: Tensor, level: float) -> Tensor:
            if level < self.match_above:
                return z
            return z - self.match * matches.loss(z - source.z[rows])[1]

        z = collaborative_edit(
            prior.predict,
            self.method(prior.defaults),
            source.z[rows],
            self.condition(edit, rows),
            config,
            prior.alphas_cumprod,
            edit.generator,
            prompts=source.prompt,
            callback=tell,
            z_start=edit.encode(views) if number else None,
            adjust=matched if self.match else None,
        )
        edit.replace(rows, z)

    def inner(self, number: int, defaults: Defaults) -> CollaborativeEditConfig:
        """The inner edit of round `number`; rounds after the first take fewer steps at lower noise."""
        edit = suited(self.edit, defaults)
        if number == 0:
            return edit
        return replace(edit, steps=self.later_steps, t_max=min(self.later_t_max, edit.t_max), init="source")

    @torch.no_grad()
    def condition(self, edit: SceneEdit, rows: Tensor) -> Tensor:
        """The photos of `rows` as the prior's image condition."""
        if self.official:
            return edit.prior.encode(edit.source.photos[rows], edit.generator)
        return edit.source.image[rows]
