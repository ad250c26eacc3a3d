"""Video editors that reach into the UNet's attention, on an InstructPix2Pix prior: Pix2Video and FateZero.

Both start from the DDIM inversion of the source under its own image and the empty text, unguided: the prior's account
of a source that no instruction has been added to. Windows are taken by tracks, the place of a window being a video of
its own; symbols as in `pieces`, T frames a track.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from csd3d.canvas.pieces import WINDOWS_AT_ONCE, Pieces, Report, frame_predictor, reported, window_predictor
from csd3d.distillation.ddim import PredictNoise, ddim_invert, ddim_sample, ddim_step, ddim_timesteps
from csd3d.distillation.edit import PredictBranches, guided_predictor
from csd3d.distillation.schedules import timestep
from csd3d.priors import DiffusersPrior
from csd3d.priors.attention import (
    AttentionFusion,
    AttentionMaps,
    CrossFrameAttention,
    cross_frame_attention,
    fused_attention,
    layer_sizes,
    map_shapes,
)

DECODER = "up_blocks."  # the layers of a UNet in which Pix2Video injects


@dataclass
class Sampling:
    """DDIM steps from `start` (a fraction of the schedule) to clean, and InstructPix2Pix's guidance scales."""

    steps: int = 50
    start: float = 1.0
    text_scale: float = 7.5
    image_scale: float = 1.5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: give at least 1")
        check_shares(self, "start")

    def timesteps(self, num_train_timesteps: int) -> list[int]:
        return ddim_timesteps(timestep(self.start, num_train_timesteps), self.steps)


@dataclass
class Pix2VideoConfig:
    """`pull`: the share of the way that a frame's ẑ_0 goes to the previous frame's, in the first `pull_steps` of the
    steps (the paper's 25 of 50)."""

    pull: float = 0.1
    pull_steps: float = 0.5

    def __post_init__(self) -> None:
        check_shares(self, "pull", "pull_steps")


@dataclass
class FateZeroConfig:
    """The source's maps are fused in the first `fuse_steps` of the steps, in layers of at most `max_pixels` latent
    pixels. `mask_threshold` = τ: 0 edits everywhere, above 1 nowhere. Maps take at most `budget_gib`: as many frames
    are edited at once as fit, so memory does not grow with the video."""

    fuse_steps: float = 0.8
    mask_threshold: float = 0.3
    max_pixels: int = 256
    budget_gib: float = 2.0

    def __post_init__(self) -> None:
        check_shares(self, "fuse_steps")
        for key in ("mask_threshold", "budget_gib"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} is {getattr(self, key)}: give a finite number of at least 0")


def check_shares(config: object, *keys: str) -> None:
    """Raises ValueError for a setting outside [0, 1]."""
    for key in keys:
        if not 0 <= getattr(config, key) <= 1:
            raise ValueError(f"{key} is {getattr(config, key)}: give a number in [0, 1]")


def pix2video(
    prior: DiffusersPrior, pieces: Pieces, sampling: Sampling, config: Pix2VideoConfig, report: Report
) -> Tensor:
    """Pix2Video (Ceylan et al. 2023, arXiv 2303.12688): the edited canvas [F, C, H, W].

    Every frame attends, in the decoder, to the first and the previous one instead of itself, and its latents are guided
    to the previous one's. The paper edits frame after frame; here all take a step together, which is the same, since
    what frame i takes from i − 1 (inputs of attention, ẑ_0) belongs to the same step.
    """
    z_source = pieces.gather(pieces.z_source)
    edited, timesteps = torch.empty_like(z_source), sampling.timesteps(prior.num_train_timesteps)
    for rows in pieces.tracks:
        z_t = invert(window_predictor(prior, pieces), z_source, rows, prior.alphas_cumprod, timesteps, report)
        state = CrossFrameAttention(("anchor", "previous"))
        predict = frame_predictor(prior, pieces, state.begin)
        guided = reported(guided_predictor(predict, rows, sampling.text_scale, sampling.image_scale), report)
        with cross_frame_attention(prior.unet, state, DECODER):
            edited[rows] = sample_guided(guided, z_t, prior.alphas_cumprod, timesteps, config)
    return pieces.merge(edited)


def invert(
    predict: PredictBranches,
    z_source: Tensor,
    rows: Tensor,
    alphas_cumprod: Tensor,
    timesteps: list[int],
    report: Report,
) -> Tensor:
    """DDIM inversion of the windows `rows`, each alone, up the falling `timesteps`: [m, C, h, w]."""

    def inverted(part: Tensor) -> Tensor:
        image = reported(lambda z_t, t: predict(z_t, t, ("image",), part), report)
        return ddim_invert(image, z_source[part], alphas_cumprod, timesteps[::-1])

    return torch.cat([inverted(part) for part in rows.split(WINDOWS_AT_ONCE)])


def sample_guided(
    predict: PredictNoise, z_t: Tensor, alphas_cumprod: Tensor, timesteps: list[int], config: Pix2VideoConfig
) -> Tensor:
    """`ddim_sample` of frames z_t [T, ...], with `guide_latents` after each of the first `pull_steps` of the steps."""
    alpha_bars = [alphas_cumprod[t].item() for t in timesteps] + [1.0]
    for step, (t, (alpha_bar, alpha_bar_next)) in enumerate(zip(timesteps, pairwise(alpha_bars), strict=True)):
        eps = predict(z_t, t)
        z0 = ddim_step(z_t, eps, alpha_bar, 1.0)
        z_t = ddim_step(z_t, eps, alpha_bar, alpha_bar_next)
        if step < config.pull_steps * len(timesteps):
            z_t = guide_latents(z_t, z0, alpha_bar_next, config.pull)
    return z_t


def guide_latents(z_next: Tensor, z0: Tensor, alpha_bar_next: float, pull: float) -> Tensor:
    """z_{t−1}^i ← z_{t−1}^i − δ ∇_{z_t^i} |ẑ_0^i − ẑ_0^{i−1}|², Pix2Video's latent guidance, for frames i > 0 [T, ...].

    ε is a constant in the gradient, which is then 2 (ẑ_0^i − ẑ_0^{i−1})/√ᾱ_t without a pass back through the UNet; and
    δ = ½ pull √(ᾱ_t ᾱ_{t−1}), with which the step is DDIM's to a ẑ_0 moved by `pull` of the way to the previous
    frame's. Both are choices: a constant δ would outweigh everything at high t, where √ᾱ_t is small.
    """
    ahead = torch.zeros_like(z0)
    ahead[1:] = z0[1:] - z0[:-1]
    return z_next - pull * alpha_bar_next**0.5 * ahead


def fatezero(
    prior: DiffusersPrior, pieces: Pieces, sampling: Sampling, config: FateZeroConfig, report: Report
) -> Tensor:
    """FateZero (Qi et al. 2023, arXiv 2303.09535): the edited canvas [F, C, H, W].

    Frames attend to themselves and to the middle one of their track, which is inverted and edited anew with each chunk
    of the others; attention maps are kept of one chunk at a time. Raises InputError where those of the middle frame and
    one other exceed the budget.
    """
    z_source = pieces.gather(pieces.z_source)
    edited = torch.empty_like(z_source)
    make_state, at_once = plan_fusion(prior, pieces, z_source.shape[-2:], sampling, config)
    for track in pieces.tracks:
        middle = track[len(track) // 2]
        for chunk in track[track != middle].split(max(at_once - 1, 1)):
            rows = torch.cat([middle[None], chunk])
            edited[rows] = fuse_frames(prior, pieces, z_source, rows, make_state(rows), sampling, report)
    return pieces.merge(edited)


def plan_fusion(
    prior: DiffusersPrior, pieces: Pieces, size: tuple[int, int], sampling: Sampling, config: FateZeroConfig
) -> tuple[Callable[[Tensor], AttentionFusion], int]:
    """How to make the state for windows `rows` of `size` = (h, w), and of how many the maps fit in the budget."""
    sees, sizes = ("own", "anchor"), layer_sizes(prior.unet, *size)
    shapes = map_shapes(prior.unet, sizes, pieces.null.text.shape[1], len(sees), config.max_pixels)
    steps = round(config.fuse_steps * len(sampling.timesteps(prior.num_train_timesteps)))
    budget = int(config.budget_gib * 2**30)

    def make_state(rows: Tensor) -> AttentionFusion:
        return AttentionFusion(
            frames=CrossFrameAttention(sees),
            maps=AttentionMaps(shapes, len(rows), steps, budget),
            sizes=sizes,
            source_text=pieces.null.text,
            words=pieces.words,
            threshold=config.mask_threshold,
        )

    return make_state, budget // max(AttentionMaps.frame_bytes(shapes, steps), 1)


def fuse_frames(
    prior: DiffusersPrior,
    pieces: Pieces,
    z_source: Tensor,
    rows: Tensor,
    state: AttentionFusion,
    sampling: Sampling,
    report: Report,
) -> Tensor:
    """The windows `rows` [T], of which all see the first, inverted and edited by FateZero: clean latents [T, C, h, w].

    Step k of the edit has the maps of the step of the inversion that it undoes, the k-th from its end. Beside the
    inversion, on its latents, the instruction is asked what its words attend to.
    """
    timesteps = sampling.timesteps(prior.num_train_timesteps)
    predict = frame_predictor(prior, pieces, state.frames.begin)
    guided = guided_predictor(predict, rows, sampling.text_scale, sampling.image_scale)
    undone_by, step = iter(reversed(range(len(timesteps)))), iter(range(len(timesteps)))

    def record(z_t: Tensor, t: int) -> Tensor:
        branches = ("image", "full") if state.at("record", next(undone_by)) else ("image",)
        return predict(torch.cat([z_t] * len(branches)), t, branches, rows)[: len(rows)]

    def fuse(z_t: Tensor, t: int) -> Tensor:
        state.at("fuse", next(step))
        return guided(z_t, t)

    with fused_attention(prior.unet, state):
        z_t = ddim_invert(reported(record, report), z_source[rows], prior.alphas_cumprod, timesteps[::-1])
        return ddim_sample(reported(fuse, report), z_t, prior.alphas_cumprod, timesteps)
