"""CSD-Edit of a scene: now and then, many training views are edited together (arXiv 2307.04787, section 4.3)."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from csd3d.distillation.edit_loop import CollaborativeEditConfig, collaborative_edit, inner_edit
from csd3d.distillation.methods.csd_edit import CSDEdit
from csd3d.distillation.step import configured
from csd3d.editors.correspondence import NONE, OneCorrespondence, check_works
from csd3d.editors.scene import Report, SceneEdit
from csd3d.priors import Defaults
from csd3d.registry import register


@register("scene_editor", "csd_edit", title="CSD-Edit, edited together")
@dataclass(frozen=True)
class CSDEditScene:
    """CSD-Edit of the training views, conditioned on the *original* photos.

    Round 0 starts at the photos, with `edit` as it stands. Later rounds start at what the scene looks like then, with
    `later_steps` from at most `later_t_max` of noise, so that what was chosen stays chosen. With edit.svgd.compat
    "official" the photos are told as the authors' code does it: scaled and sampled, and guiding the baseline too.

        editor: {type: csd_edit, rounds: 3, edit: {steps: 40}}
    """

    edit_every: int = 300  # steps of the fit between rounds
    rounds: int = 2  # how many rounds there are
    views: int | None = None  # views edited together a round, at random; null: all
    later_t_max: float = 0.4  # most noise of later rounds
    later_steps: int = 8  # steps of later rounds
    correspondence: OneCorrespondence = NONE  # what views share: none (equal addresses, the paper) or depth
    text_scale: float | None = None  # ω_y; null: what suits the prior
    image_scale: float | None = None  # ω_s; null: what suits the prior
    baseline: str = "image"  # of CSD-Edit: image, guided or noise, see `methods.csd_edit`
    edit: CollaborativeEditConfig = field(default_factory=inner_edit)  # the inner edit of a round

    def __post_init__(self) -> None:
        check_works(self.correspondence, "scene")
        if self.edit_every < 1:
            raise ValueError(f"edit_every is {self.edit_every}: give a whole number of at least 1")
        configured(self.method(Defaults()), self.edit)  # ValueError where the two do not go together

    @property
    def official(self) -> bool:
        """Whether it does all as the authors' code does."""
        return self.edit.svgd is not None and self.edit.svgd.official

    def method(self, defaults: Defaults) -> CSDEdit:
        """CSD-Edit with these scales, or with those that suit the prior."""
        return CSDEdit(
            defaults.text_scale if self.text_scale is None else self.text_scale,
            defaults.image_scale if self.image_scale is None else self.image_scale,
            "guided" if self.official else self.baseline,
        )

    def update(self, edit: SceneEdit, step: int, report: Report) -> None:
        """Edits a round's views, where one begins at `step`."""
        number, rest = divmod(step, self.edit_every)
        if rest or number >= self.rounds:
            return
        prior, source = edit.prior, edit.source
        rows = torch.randperm(edit.count, generator=edit.generator)[: self.views or edit.count].sort().values
        along = self.correspondence.thing
        views = edit.render(rows) if number or along is not None else None
        z = collaborative_edit(
            prior.predict,
            self.method(prior.defaults),
            source.z[rows],
            self.condition(edit, rows),
            self.edit if number == 0 else self.later_edit(),
            prior.alphas_cumprod,
            edit.generator,
            prompts=source.prompt,
            callback=lambda _, __, diagnostics: report(diagnostics),
            z_start=edit.encode(views) if number else None,
            correspond=None if along is None else along.open(edit)(rows, views).select,
        )
        edit.replace(rows, z)

    def later_edit(self) -> CollaborativeEditConfig:
        """The inner edit of every round but the first: fewer steps, from lower noise."""
        t_max = min(self.later_t_max, self.edit.t_max)
        return replace(self.edit, steps=self.later_steps, t_max=t_max, init="source")

    @torch.no_grad()
    def condition(self, edit: SceneEdit, rows: Tensor) -> Tensor:
        """The photos of `rows` as the prior is told them."""
        if self.official:
            return edit.prior.encode(edit.source.photos[rows], edit.generator)
        return edit.source.image[rows]
