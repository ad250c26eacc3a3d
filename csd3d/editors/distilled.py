"""Edit of a scene by any method of score distillation that edits a source: DDS, PDS, DreamCatalyst, DVRF."""

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from csd3d.distillation.method import Method
from csd3d.distillation.named import names_for
from csd3d.distillation.noise import GIVEN
from csd3d.distillation.step import DistillConfig, distill_step
from csd3d.distillation.suits import suited
from csd3d.editors.scene import Report, SceneEdit
from csd3d.priors import Defaults
from csd3d.registry import register
from csd3d.schema import MOST_STEPS, Chosen, OneOf, Steps, Within, choose


@register("scene_editor", "distilled", title="Score distillation, view by view")
@dataclass(frozen=True)
class Distilled:
    """The latents of every training view follow the direction of `method` by Adam, each view by itself.

    The papers optimise the field itself. Here the views are optimised and the scene is fitted to them: `steps` are
    shared out to `rounds`, of which the first starts at the photos and each later one at renders of the scene. Levels t
    go on from round to round, Adam's moments do not.

    The prior is an editing model: ε^ω of the target is InstructPix2Pix's of photo and instruction, ε^ω of the source
    that of the photo alone (`guidance.guided`), as in DreamCatalyst's code. So there is no source prompt, and DDS is
    CSD-Edit with baseline "guided" and without collaboration.

    PDS pulls to the photo at every level and needs more guidance; its authors' ω is 100.

        compare: [distilled, {type: distilled+dc, method: dreamcatalyst}]
        editor: {type: distilled, method: pds, text_scale: 6}
    """

    method: Annotated[Chosen, OneOf("method")] = field(default_factory=lambda: choose("method", "dds"))  # the direction
    steps: Annotated[int, Within(1, MOST_STEPS)] = 40  # optimisation steps of each view
    rounds: Annotated[int, Within(1, MOST_STEPS)] = 1  # rounds that the steps are shared out to
    edit_every: Steps = 300  # steps of the fit between rounds
    learning_rate: float = 0.06  # Adam's, in units of the latents
    schedule: str = "uniform"  # t: uniform or logit_normal in [t_min, t_max], or annealed (t_max to t_min)
    t_min: float | None = (
        0.2  # lowest noise level, a fraction of the schedule; null: the model's (PDS then pulls too hard)
    )
    t_max: float | None = None  # highest noise level, a fraction of the schedule; null: the model's
    noise: str = "independent"  # ε: independent (drawn for each view) or shared by all views
    text_scale: float | None = None  # ω_y, guidance by the instruction; null: the model's default
    image_scale: float | None = None  # ω_s, guidance by the photo; null: the model's default

    def __post_init__(self) -> None:
        able = [name for name in names_for(["source"]) if name not in names_for()]
        if self.method.name not in able:
            raise ValueError(f"method is {self.method.name!r}: choose one that edits a source, of {', '.join(able)}")
        for key in ("rounds", "edit_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a whole number of at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}: give a number above 0")
        if self.noise in GIVEN:
            raise ValueError(f"noise is {self.noise!r}: choose one of independent, shared")
        own = getattr(self.method.thing, "fixed", {}).get("schedule", self.schedule)
        if self.schedule not in (own, type(self).schedule):
            raise ValueError(f"schedule is {self.schedule!r}: {self.method.name} has {own}; leave schedule out")
        self.distill(Defaults())  # ValueError where a key of it is wrong

    def distill(self, defaults: Defaults) -> DistillConfig:
        """The settings of the steps, with the numbers that suit the model."""
        given = {key: getattr(self, key) for key in ("steps", "schedule", "t_min", "t_max", "noise")}
        text_scale = defaults.text_scale if self.text_scale is None else self.text_scale
        return suited(DistillConfig(guidance_scale=text_scale, weight="one", **given), defaults)

    def update(self, edit: SceneEdit, step: int, report: Report) -> None:
        """Take the steps of a round, if one begins at `step`."""
        number, rest = divmod(step, self.edit_every)
        if rest or number >= self.rounds:
            return
        rows = torch.arange(edit.count)
        start = edit.encode(edit.render(rows)) if number else edit.source.z
        numbers = range(*(self.steps * k // self.rounds for k in (number, number + 1)))
        edit.replace(rows, self.descend(edit, start, numbers, report))

    def descend(self, edit: SceneEdit, start: Tensor, numbers: range, report: Report) -> Tensor:
        """The latents [N, C, h, w] that steps `numbers` lead to from `start`."""
        prior, source, config = edit.prior, edit.source, self.distill(edit.prior.defaults)
        method: Method = self.method.thing
        image_scale = prior.defaults.image_scale if self.image_scale is None else self.image_scale
        about = {"prompts": source.prompt, "source": source.z, "image": source.image, "image_scale": image_scale}
        z = start.clone()
        optimiser = torch.optim.Adam([z], self.learning_rate)
        for number in numbers:
            z.grad, found = distill_step(
                prior.predict, method, z, number, config, prior.alphas_cumprod, edit.generator, **about
            )
            if not found["skipped"]:
                optimiser.step()
            report(found)
        return z
