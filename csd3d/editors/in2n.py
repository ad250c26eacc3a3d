"""Instruct-NeRF2NeRF (arXiv 2303.12789, section 4.2): the training views are edited one by one, in turn."""

from dataclasses import dataclass

import torch
from torch import Tensor

from csd3d.distillation.ddim import PredictNoise, ddim_sample
from csd3d.distillation.guidance import ip2p_guidance
from csd3d.distillation.noise import NOISES, add_noise, draw_noise
from csd3d.distillation.schedule import uniform_timestep
from csd3d.editors.scene import Report, SceneEdit
from csd3d.priors import Defaults
from csd3d.registry import register


@register("scene_editor", "in2n", title="Instruct-NeRF2NeRF, one by one")
@dataclass(frozen=True)
class InstructNeRF2NeRF:
    """Every `edit_rate` steps the next view is edited by InstructPix2Pix, conditioned on its *original* photo.

    It starts at what the scene looks like from there, noised to a random level. Noise "shared" is not the paper's: all
    views get the same ε, which alone makes them agree more, as CSD-Edit's do.

        compare: [in2n, {type: in2n+shared, noise: shared}]
    """

    edit_rate: int = 10  # steps of the fit between edits
    t_min: float = 0.02  # least noise that a view is edited from, as a fraction of the schedule
    t_max: float = 0.98  # most noise
    ddim_steps: int = 20  # steps of DDIM an edit
    text_scale: float | None = None  # ω_y; null: what suits the prior (the paper's 7.5 for InstructPix2Pix)
    image_scale: float | None = None  # ω_s; null: what suits the prior (the paper's 1.5)
    noise: str = "independent"  # ε: drawn for every edit, as in the paper, or "shared" by all of them

    def __post_init__(self) -> None:
        for key in ("edit_rate", "ddim_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a whole number of at least 1")
        if not 0 <= self.t_min <= self.t_max <= 1:
            raise ValueError(f"t_min is {self.t_min}, t_max {self.t_max}: give fractions in [0, 1], the lower first")
        if self.noise not in NOISES:
            raise ValueError(f"noise is {self.noise!r}: choose one of {', '.join(NOISES)}")

    def update(self, edit: SceneEdit, step: int, report: Report) -> None:
        """Edits the next view, where one is due at `step`."""
        number, rest = divmod(step, self.edit_rate)
        if rest:
            return
        rows = torch.tensor([number % edit.count])
        alphas = edit.prior.alphas_cumprod
        drawn = uniform_timestep(self.t_min, self.t_max, len(alphas), edit.generator)
        timesteps = leading_timesteps(drawn, self.ddim_steps)
        z = edit.encode(edit.render(rows))
        z_t = add_noise(z, self.draw(z, edit), alphas[timesteps[0]].item())
        edit.replace(rows, ddim_sample(self.predictor(edit, rows), z_t, alphas, timesteps))
        report({"t": float(timesteps[0])})

    def draw(self, z: Tensor, edit: SceneEdit) -> Tensor:
        """The noise of an edit of z [1, C, h, w]."""
        shared = self.noise == "shared"
        # started from the run's seed every time: the same noise for all views, and nothing for a checkpoint to keep
        generator = torch.Generator().manual_seed(edit.seed) if shared else edit.generator
        return draw_noise(z, "independent", generator)

    def predictor(self, edit: SceneEdit, rows: Tensor) -> PredictNoise:
        """The guided prediction of the views `rows`, InstructPix2Pix's Eq. 3 (arXiv 2211.09800)."""
        text_scale, image_scale = self.scales(edit.prior.defaults)

        def predict(z_t: Tensor, t: int) -> Tensor:
            asked = {"image": edit.query(z_t, t, rows, ""), "full": edit.query(z_t, t, rows)}
            if image_scale != 1:  # at 1 the null branch has weight 0
                asked["null"] = edit.query(z_t, t, rows, "", image=False)
            eps = edit.prior.predict(asked)
            return ip2p_guidance(eps.get("null", eps["image"]), eps["image"], eps["full"], text_scale, image_scale)

        return predict

    def scales(self, defaults: Defaults) -> tuple[float, float]:
        """ω_y and ω_s, those of the config or those that suit the prior."""
        text, image = defaults.sampling_text_scale, defaults.sampling_image_scale
        return (
            text if self.text_scale is None else self.text_scale,
            image if self.image_scale is None else self.image_scale,
        )


def leading_timesteps(drawn: int, steps: int) -> list[int]:
    """The falling timesteps of an edit whose noise level was drawn as T = `drawn`, each once.

    (n − 1) ⌊T/n⌋ + 1, …, ⌊T/n⌋ + 1, 1 for n = `steps`: diffusers' "leading" spacing of a schedule cut off at T, which
    is what the authors' code has. Noise is added at the first of them, some way below T.
    """
    stride = drawn // steps
    return list(dict.fromkeys(k * stride + 1 for k in reversed(range(steps))))
