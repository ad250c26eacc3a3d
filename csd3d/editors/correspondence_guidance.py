"""Correspondence guidance (Bengtson et al. 2025, arXiv 2511.22228), on InstructPix2Pix.

Symbols: those of `matches`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from csd3d.distillation.ddim import PredictNoise, ddim_step, ddim_timesteps
from csd3d.distillation.guidance import edit_predictor
from csd3d.distillation.noise import NOISES, draw_noise, implied_noise
from csd3d.distillation.samplers import Sampler
from csd3d.distillation.samplers import sample as sample_by
from csd3d.distillation.schedule import timestep
from csd3d.editors.canvas import check_shares
from csd3d.editors.matches import Matches, check_matches, matches_of
from csd3d.editors.sampled import WINDOWS_AT_ONCE
from csd3d.editors.scene import Report, SceneEdit, SceneSource
from csd3d.priors.queries import check_image_scale
from csd3d.registry import register
from csd3d.schema import Within

AGREES = ("picture", "change")
ORDERS = ("together", "in turn")
Loss = Callable[[Tensor], tuple[Tensor, Tensor]]  # of what must agree: the value, and the gradient


@register("scene_editor", "correspondence_guidance", title="Correspondence guidance, edited together")
@dataclass(frozen=True)
class CorrespondenceGuidance:
    """InstructPix2Pix of all training views, once, from noise; matching points are pulled towards looking alike.

    From the paper: no training; points that match in the unedited views should look alike after the edit; a
    consistency loss L of the predicted clean views changes the noise estimate ε(z_t, t) at each step of the sampling.

    Ours, because the paper's loss, matcher and step sizes are not used here:
    - L (see `Matches`) is the squared difference of *latents* along matches that the scene's depth gives, without
      features or a matching network.
    - Its gradient is taken with respect to ẑ_0, in closed form and without a pass through the UNet:
      ẑ_0 ← ẑ_0 − strength ∇L, and ε is the noise that z_t and the new ẑ_0 imply.
    - By default all views take each step together. The paper edits one view after the other, each guided by those
      before, which is order "in turn". The next view is then the one that shares most with those before.
    - With agree "change", what must match is the edit ẑ_0 − z̃_0 of the photo's latents z̃_0, so details that latents
      of two views show differently are left as they are.

        editors: {correspondence_guidance: {strength: 0.5, noise: independent}}
        compare: [correspondence_guidance]
    """

    steps: Annotated[int, Within(1, 10_000)] = 20  # steps from noise to a clean view
    sampler: Sampler = "ddim"  # ddim, euler or dpm++: how each step is taken
    start: float = 1.0  # noise level of the first step, a share of the schedule
    noise: str = "shared"  # noise of the views: shared by all, or independent (the paper)
    strength: Annotated[float, Within(0, 2)] = (
        1.0  # step along the loss's gradient; 1 takes views that match to their mean
    )
    iterations: Annotated[int, Within(1, 1000)] = 1  # gradient steps in each step of the sampler
    guide_from: float = 0.0  # share of the steps after which guidance begins
    guide_until: float = (
        0.8  # share of the steps after which it ends; to the last step it leaves speckles at silhouettes
    )
    pairs: Annotated[int | None, Within(1, 100_000)] = None  # views each view is matched with, the nearest; null: all
    order: str = "together"  # all views take each step together, or each is edited after another (in turn, the paper)
    agree: str = "change"  # what matching points have in common: their picture, or their change from the photo
    text_scale: float | None = None  # ω_y, guidance by the instruction; null: the model's default
    image_scale: float | None = None  # ω_s, guidance by the photo; null: the model's default

    def __post_init__(self) -> None:
        check_shares(self, "start", "guide_from", "guide_until")
        for key, choices in (("noise", NOISES), ("order", ORDERS), ("agree", AGREES)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} is {getattr(self, key)!r}: choose one of {', '.join(choices)}")

    def check(self, source: SceneSource, key: str) -> None:
        """Raise InputError, before any work, for guidance the model does not have, or too many pairs for the memory."""
        check_image_scale(source.prior, self.image_scale, f"{key}.image_scale")
        count = len(source.capture.train)
        check_matches(source, count, min(self.pairs or count, count), key, f"set {key}.pairs to fewer")

    @torch.no_grad()
    def update(self, edit: SceneEdit, step: int, report: Report) -> None:
        """Edit all views before the first step of the fit, when the scene still has the photos' geometry."""
        if step:
            return
        rows = torch.arange(edit.count)
        matches = matches_of(edit, rows, edit.render(rows), self.pairs)
        z = draw_noise(edit.source.z, self.noise, edit.generator).clone()
        if self.order == "together":
            z = self.sample(edit, rows, z, matches.loss, report)
        for view, before in matches.in_turn() if self.order == "in turn" else ():
            of_view = matches.of(view, before)

            def loss(own: Tensor, view: int = view, of_view: Matches = of_view) -> tuple[Tensor, Tensor]:
                changes = z - self.reference(edit, rows)
                changes[view] = own[0]
                value, gradient = of_view.loss(changes)
                return value, gradient[view][None]

            z[view] = self.sample(edit, rows[view : view + 1], z[view : view + 1], loss, report)[0]
        edit.replace(rows, z)

    def reference(self, edit: SceneEdit, rows: Tensor) -> Tensor | float:
        """What is taken off latents before they are compared."""
        return edit.source.z[rows] if self.agree == "change" else 0.0

    def sample(self, edit: SceneEdit, rows: Tensor, z_t: Tensor, loss: Loss, report: Report) -> Tensor:
        """Clean latents [m, C, h, w] of the views `rows` [m], sampled from noise z_t under guidance by `loss`."""
        alphas, suits = edit.prior.alphas_cumprod, edit.prior.defaults
        timesteps = ddim_timesteps(timestep(self.start, edit.prior.num_train_timesteps), self.steps)
        first, last = self.guide_from * len(timesteps), self.guide_until * len(timesteps)
        text = suits.sampling_text_scale if self.text_scale is None else self.text_scale
        image = suits.sampling_image_scale if self.image_scale is None else self.image_scale
        guided, place = view_predictor(edit, rows, text, image), iter(range(len(timesteps)))

        def predict(z_t: Tensor, t: int) -> Tensor:
            eps, alpha_bar, losses = guided(z_t, t), alphas[t].item(), {}
            if first <= next(place) < last:
                z0 = ddim_step(z_t, eps, alpha_bar, 1.0)
                for _ in range(self.iterations):
                    value, gradient = loss(z0 - self.reference(edit, rows))
                    losses.setdefault("consistency_loss", value.item())
                    z0 = z0 - self.strength * gradient
                eps = implied_noise(z_t, z0, alpha_bar)
            report({"t": float(t), **losses})
            return eps

        return sample_by(predict, z_t, alphas, timesteps, self.sampler)


def view_predictor(edit: SceneEdit, rows: Tensor, text_scale: float, image_scale: float) -> PredictNoise:
    """The guided ε(z_t, t) of the views `rows`, `WINDOWS_AT_ONCE` of them a call of the prior."""
    parts = torch.arange(len(rows)).split(WINDOWS_AT_ONCE)
    prompts = (edit.source.prompt,) * WINDOWS_AT_ONCE
    guided = [
        edit_predictor(edit.prior.predict, prompts[: len(p)], edit.source.image[rows[p]], text_scale, image_scale)
        for p in parts
    ]
    return lambda z_t, t: torch.cat([one(z_t[p], t) for one, p in zip(guided, parts, strict=True)])
