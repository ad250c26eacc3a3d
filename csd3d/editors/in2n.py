"""Instruct-NeRF2NeRF (arXiv 2303.12789, section 4.2): edit the training views one by one, in turn."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from csd3d.distillation.noise import NOISES, add_noise, draw_noise
from csd3d.distillation.samplers import Sampler, sample
from csd3d.distillation.schedule import uniform_timestep
from csd3d.editors.scene import Report, SceneEdit
from csd3d.registry import register
from csd3d.schema import Steps, Within


@register("scene_editor", "in2n", title="Instruct-NeRF2NeRF, one by one")
@dataclass(frozen=True)
class InstructNeRF2NeRF:
    """Every `edit_rate` steps, edit the next view by InstructPix2Pix, conditioned on its *original* photo.

    With `edits_per_view`, E edits for V views are spread evenly over the fit instead, so that a short fit edits each
    view as often as a long one. The released code makes 1500 edits in 15 000 steps, of captures of about 100 photos.

    The edit starts at a render of the scene, noised to a random level. Noise "shared" is not in the paper: all views
    get the same ε, as in CSD-Edit, which alone makes them more consistent.

        compare: [in2n, {type: in2n+shared, noise: shared}]
    """

    edit_rate: Steps = 10  # steps of the fit between edits
    # edits of each view in the whole fit, evenly spread, in place of edit_rate; null: by edit_rate
    edits_per_view: Annotated[float, Within(0, 10_000)] | None = None
    t_min: float = 0.02  # least noise level an edit starts from, a share of the schedule
    t_max: float = 0.98  # largest noise level an edit starts from, a share of the schedule
    ddim_steps: Annotated[int, Within(1, 10_000)] = 20  # steps of an edit, by `sampler`
    sampler: Sampler = "ddim"  # ddim, euler or dpm++: how each step is taken
    text_scale: float | None = None  # ω_y, guidance by the instruction; null: the model's default (the paper: 7.5)
    image_scale: float | None = None  # ω_s, guidance by the photo; null: the model's default (the paper: 1.5)
    noise: str = "independent"  # ε: independent (drawn for each edit, the paper) or shared by all edits

    def __post_init__(self) -> None:
        for key in ("edit_rate", "ddim_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a whole number of at least 1")
        if not 0 <= self.t_min <= self.t_max <= 1:
            raise ValueError(f"t_min is {self.t_min}, t_max {self.t_max}: give fractions in [0, 1], the lower first")
        if self.noise not in NOISES:
            raise ValueError(f"noise is {self.noise!r}: choose one of {', '.join(NOISES)}")

    def update(self, edit: SceneEdit, step: int, report: Report) -> None:
        """Edit the next views, as many as are due at `step`."""
        for number in self.due(step, edit):
            self.edit_view(edit, number, report)

    def due(self, step: int, edit: SceneEdit) -> range:
        """The numbers of the edits that are made before `step`."""
        if self.edits_per_view is None:
            number, rest = divmod(step, self.edit_rate)
            return range(number, number if rest else number + 1)
        total = round(self.edits_per_view * edit.count)
        return range(step * total // edit.steps, (step + 1) * total // edit.steps)

    def edit_view(self, edit: SceneEdit, number: int, report: Report) -> None:
        """Make edit `number`; views are edited in turn."""
        rows = torch.tensor([number % edit.count])
        alphas = edit.prior.alphas_cumprod
        drawn = uniform_timestep(self.t_min, self.t_max, len(alphas), edit.generator)
        timesteps = leading_timesteps(drawn, self.ddim_steps)
        z = edit.encode(edit.render(rows))
        z_t = add_noise(z, self.draw(z, edit), alphas[timesteps[0]].item())
        guided = edit.guided(rows, self.text_scale, self.image_scale)
        edit.replace(rows, sample(guided, z_t, alphas, timesteps, self.sampler))
        report({"t": float(timesteps[0])})

    def draw(self, z: Tensor, edit: SceneEdit) -> Tensor:
        """The noise of an edit of z [1, C, h, w]."""
        shared = self.noise == "shared"
        # seeded anew each time: all views get the same noise, and checkpoints need not store it
        generator = torch.Generator().manual_seed(edit.seed) if shared else edit.generator
        return draw_noise(z, "independent", generator)


def leading_timesteps(drawn: int, steps: int) -> list[int]:
    """The distinct falling timesteps of an edit whose noise level was drawn as T = `drawn`.

    (n − 1) ⌊T/n⌋ + 1, …, ⌊T/n⌋ + 1, 1 for n = `steps`: diffusers' "leading" spacing of a schedule that ends at T, as in
    the authors' code. Noise is added at the first of them, which is below T.
    """
    stride = drawn // steps
    return list(dict.fromkeys(k * stride + 1 for k in reversed(range(steps))))
