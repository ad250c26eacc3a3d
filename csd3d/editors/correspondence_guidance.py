"""Correspondence guidance (Bengtson et al. 2025, arXiv 2511.22228), on InstructPix2Pix.

Symbols: N views with latents z [N, C, h, w]; P pairs (a, b) of views; p a latent pixel of a. x_ab(p) is where b shows
the surface that a shows at p, v_ab(p) in [0, 1] the share of p's pixels that b shows, b the bilinear weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from csd3d.cameras import Cameras, pixel_centres
from csd3d.canvas.latents import pixel_grid, to_latent
from csd3d.distillation.ddim import ddim_sample, ddim_step, ddim_timesteps
from csd3d.distillation.guidance import edit_predictor
from csd3d.distillation.noise import NOISES, draw_noise, implied_noise
from csd3d.distillation.schedule import timestep
from csd3d.editors.canvas import check_shares
from csd3d.editors.sampled import WINDOWS_AT_ONCE
from csd3d.editors.scene import Report, SceneEdit, SceneSource
from csd3d.memory import check_fits
from csd3d.metrics.consistency import reproject, view_pairs
from csd3d.priors.queries import check_image_scale
from csd3d.registry import register
from csd3d.representations.base import surface_depth
from csd3d.schema import Within

AGREES = ("picture", "change")
BYTES = 4 * 40  # of a latent pixel of a pair: what `Matches` holds, and one warp of four channels with its taps


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
    - All views take each step together. The paper edits one view after the other, each guided by those before.
    - With agree "change", what must match is the edit ẑ_0 − z̃_0 of the photo's latents z̃_0, so details that latents
      of two views show differently are left as they are.

        editors: {correspondence_guidance: {strength: 0.5, noise: independent}}
        compare: [correspondence_guidance]
    """

    steps: Annotated[int, Within(1, 10_000)] = 20  # DDIM steps from noise to a clean view
    start: float = 1.0  # noise level of the first step, a share of the schedule
    noise: str = "shared"  # noise of the views: shared by all, or independent (the paper)
    strength: Annotated[float, Within(0, 2)] = (
        1.0  # step along the loss's gradient; 1 takes views that match to their mean
    )
    iterations: Annotated[int, Within(1, 1000)] = 1  # gradient steps in each DDIM step
    guide_from: float = 0.0  # share of the steps after which guidance begins
    guide_until: float = 1.0  # share of the steps after which it ends
    pairs: Annotated[int | None, Within(1, 100_000)] = None  # views each view is matched with, the nearest; null: all
    agree: str = "change"  # what matching points have in common: their picture, or their change from the photo
    text_scale: float | None = None  # ω_y, guidance by the instruction; null: the model's default
    image_scale: float | None = None  # ω_s, guidance by the photo; null: the model's default

    def __post_init__(self) -> None:
        check_shares(self, "start", "guide_from", "guide_until")
        for key, choices in (("noise", NOISES), ("agree", AGREES)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} is {getattr(self, key)!r}: choose one of {', '.join(choices)}")

    def check(self, source: SceneSource, key: str) -> None:
        """Raise InputError, before any work, for guidance the model does not have, or too many pairs for the memory."""
        check_image_scale(source.prior, self.image_scale, f"{key}.image_scale")
        height, width = source.prior.latent_shape(*source.size)[1:]
        count = len(source.capture.train)
        pairs = count * min(self.pairs or count, count)
        given = f"{key}: the matches of {pairs} pairs of views of {height}x{width} latents"
        check_fits(BYTES * pairs * height * width, given, f"set {key}.pairs to fewer", source.prior.device)

    @torch.no_grad()
    def update(self, edit: SceneEdit, step: int, report: Report) -> None:
        """Edit all views before the first step of the fit, when the scene still has the photos' geometry."""
        if step == 0:
            rows = torch.arange(edit.count)
            z_t = draw_noise(edit.source.z, self.noise, edit.generator)
            edit.replace(rows, self.sample(edit, z_t, self.matches(edit, rows), report))

    def matches(self, edit: SceneEdit, rows: Tensor) -> "Matches":
        """The matches of the views `rows`, by the depth of the scene as it is now."""
        views = edit.render(rows)
        cameras = edit.cameras[rows].to(views.depth.device)
        pairs = view_pairs(cameras, neighbours=self.pairs or len(rows), long_neighbours=0)["short"]
        size, unit = tuple(edit.source.z.shape[2:]), edit.prior.codec.downscale
        return match_views(cameras, surface_depth(views), pairs, size, unit).to(edit.prior.device)

    def sample(self, edit: SceneEdit, z_t: Tensor, matches: "Matches", report: Report) -> Tensor:
        """Clean latents [N, C, h, w] of all views, sampled from noise z_t under guidance."""
        alphas, suits = edit.prior.alphas_cumprod, edit.prior.defaults
        timesteps = ddim_timesteps(timestep(self.start, edit.prior.num_train_timesteps), self.steps)
        first, last = self.guide_from * len(timesteps), self.guide_until * len(timesteps)
        source = edit.source.z if self.agree == "change" else torch.zeros_like(z_t)
        text = suits.sampling_text_scale if self.text_scale is None else self.text_scale
        image = suits.sampling_image_scale if self.image_scale is None else self.image_scale
        guide = view_predictor(edit, text, image)
        place = iter(range(len(timesteps)))

        def predict(z_t: Tensor, t: int) -> Tensor:
            eps, alpha_bar, losses = guide(z_t, t), alphas[t].item(), {}
            if first <= next(place) < last:
                z0 = ddim_step(z_t, eps, alpha_bar, 1.0)
                for _ in range(self.iterations):
                    loss, gradient = matches.loss(z0 - source)
                    losses.setdefault("consistency_loss", loss.item())
                    z0 = z0 - self.strength * gradient
                eps = implied_noise(z_t, z0, alpha_bar)
            report({"t": float(t), **losses})
            return eps

        return ddim_sample(predict, z_t, alphas, timesteps)


def view_predictor(edit: SceneEdit, text_scale: float, image_scale: float) -> Callable[[Tensor, int], Tensor]:
    """The guided ε(z_t, t) of all training views, `WINDOWS_AT_ONCE` of them a call of the prior."""
    parts = torch.arange(edit.count).split(WINDOWS_AT_ONCE)
    prompts = (edit.source.prompt,) * WINDOWS_AT_ONCE
    guided = [
        edit_predictor(edit.prior.predict, prompts[: len(rows)], edit.source.image[rows], text_scale, image_scale)
        for rows in parts
    ]
    return lambda z_t, t: torch.cat([one(z_t[rows], t) for one, rows in zip(guided, parts, strict=True)])


@dataclass
class Matches:
    """The matches of P pairs of views, and the consistency loss along them.

        L(z) = ¼ Σ_ab Σ_p ω_ab(p) ‖z_a(p) − Σ_q b(q − x_ab(p)) z_b(q)‖²,   ω_ab(p) = v_ab(p) / Σ_c v_ac(p)

    So z − ∇L takes views that all match exactly, pixel by pixel, to within 1/(N − 1) of their mean.

    pairs [P, 2]; index, weight [P, h w, 4] the pixels q of b that each p reads, flat, and their bilinear weights;
    omega [P, h w].
    """

    pairs: Tensor
    index: Tensor
    weight: Tensor
    omega: Tensor

    def to(self, device: torch.device) -> "Matches":
        return Matches(*(part.to(device) for part in (self.pairs, self.index, self.weight, self.omega)))

    def loss(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """L, divided by the number of values in z, and ∇L [N, C, h, w] (of the undivided loss)."""
        flat, (a, b) = z.flatten(2), self.pairs.T
        weight = self.weight.flatten(1).to(z)[:, None]
        index = self.index.flatten(1)[:, None].expand(-1, z.shape[1], -1)
        read = (flat[b].gather(2, index) * weight).unflatten(2, (-1, 4)).sum(-1)
        misses = flat[a] - read
        pulls = self.omega.to(z)[:, None] * misses
        given_back = torch.zeros_like(read).scatter_add_(2, index, pulls.repeat_interleave(4, 2) * weight)
        gradient = torch.zeros_like(flat).index_add_(0, a, pulls / 2).index_add_(0, b, given_back / -2)
        return (pulls * misses).sum() / (4 * z.numel()), gradient.view_as(z)


def match_views(
    cameras: Cameras, depths: Tensor, pairs: Tensor, size: tuple[int, int], unit: int, depth_tolerance: float = 0.02
) -> Matches:
    """The matches of `pairs` [P, 2] of views, by their `depths` [N, H, W], distances along the rays.

    `size` = (h, w) of the latents, each `unit` pixels a side. Pixels without a surface, or whose surface is hidden from
    the other view by `reproject` with `depth_tolerance`, match nothing.
    """
    height, width = depths.shape[1:]
    centres = pixel_centres(width, height, depths.device).reshape(height, width, 2)
    flow, share = depths.new_zeros(len(pairs), *size, 2), depths.new_zeros(len(pairs), *size)
    for k, (a, b) in enumerate(pairs.tolist()):
        pixels, seen = reproject(depths, cameras, a, b, depth_tolerance)
        flow[k], share[k] = to_latent(torch.where(seen[..., None], pixels - centres, 0), seen, size, unit)
    place, share = (pixel_grid(*size).to(flow) + flow).flatten(1, 2), share.flatten(1)
    total = share.new_zeros(len(depths), share.shape[1]).index_add_(0, pairs[:, 0].to(share.device), share)
    omega = share / total[pairs[:, 0]].clamp_min(torch.finfo(share.dtype).tiny)
    return Matches(pairs, *bilinear_taps(place, size), omega)


def bilinear_taps(place: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The four pixels [..., 4] around `place` [..., 2] = (x, y), as flat indices, and their bilinear weights.

    Places outside a picture of `size` = (h, w) are moved to its border.
    """
    last = place.new_tensor([size[1] - 1, size[0] - 1])
    place = place.clamp_min(0).minimum(last)
    low = place.floor()
    x, y = (place - low).unbind(-1)
    x0, y0 = low.long().unbind(-1)
    x1, y1 = (x0 + 1).clamp_max(size[1] - 1), (y0 + 1).clamp_max(size[0] - 1)
    index = torch.stack([y0 * size[1] + x0, y0 * size[1] + x1, y1 * size[1] + x0, y1 * size[1] + x1], -1)
    return index, torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], -1)
