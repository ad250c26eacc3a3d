"""What CSD-Edit of panoramas and videos is compared with: other ways to edit a canvas by the same prior.

    ip2p                 InstructPix2Pix (arXiv 2211.09800), every window on its own
    ip2p_multidiffusion  its windows fused at every step: MultiDiffusion (arXiv 2302.08113)
    pix2video, fatezero  see `baselines_video`

InstructPix2Pix on the down-scaled whole is "ip2p" with one window a frame, on pictures of `downscaled_size`. All take
the same image conditions, and those that start from noise the same noise: one draw of the canvas, of which a window
sees its part. Symbols as in `pieces`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from csd3d.canvas.pieces import WINDOWS_AT_ONCE, Pieces, Report, reported, window_predictor
from csd3d.distillation.ddim import ddim_sample
from csd3d.distillation.edit import guided_predictor
from csd3d.distillation.multidiffusion import multidiffusion_sample
from csd3d.distillation.noise import NOISES, add_noise, draw_noise
from csd3d.editors.baselines_video import FateZeroConfig, Pix2VideoConfig, Sampling, fatezero, pix2video
from csd3d.errors import InputError
from csd3d.priors import DiffusersPrior, Prior

INITS = ("noise", "source")


@dataclass
class BaselineConfig:
    """Settings of the baselines.

    `init`, of InstructPix2Pix: from "noise" alone, or from the "source" noised to sampling.start. `noise`: of each
    frame "independent", or "shared" by all.
    """

    init: str = "noise"
    noise: str = "independent"
    sampling: Sampling = field(default_factory=Sampling)
    pix2video: Pix2VideoConfig = field(default_factory=Pix2VideoConfig)
    fatezero: FateZeroConfig = field(default_factory=FateZeroConfig)

    def __post_init__(self) -> None:
        for key, choices in (("init", INITS), ("noise", NOISES)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} is {getattr(self, key)!r}: choose one of {', '.join(choices)}")


def edit_by(
    name: str,
    prior: Prior,
    pieces: Pieces,
    config: BaselineConfig,
    generator: torch.Generator,
    report: Report = lambda _: None,
) -> tuple[Tensor, int]:
    """Edits a canvas by the baseline `name`: its latents [F, C, H, W], and the UNet evaluations that it took.

    `report` is called with {"t": …} before every prediction. Raises InputError for an unknown name, and for a prior or
    a memory budget that the method can't work with.
    """
    if name not in BASELINES:
        raise InputError(f"baseline {name!r} is unknown: choose one of {', '.join(BASELINES)}")
    before = prior.unet_evaluations
    with torch.no_grad():
        z = BASELINES[name](prior, pieces, config, generator, report)
    return z, prior.unet_evaluations - before


def edit_windows(
    prior: Prior, pieces: Pieces, config: BaselineConfig, generator: torch.Generator, report: Report
) -> Tensor:
    """InstructPix2Pix on every window alone; where they overlap they are averaged when all is done."""
    predict, sampling = window_predictor(prior, pieces), config.sampling
    windows = pieces.gather(start_latents(pieces.z_source, prior.alphas_cumprod, config, generator))
    timesteps = sampling.timesteps(len(prior.alphas_cumprod))
    edited = []
    for rows in torch.arange(len(windows)).split(WINDOWS_AT_ONCE):
        guided = reported(guided_predictor(predict, rows, sampling.text_scale, sampling.image_scale), report)
        edited.append(ddim_sample(guided, windows[rows], prior.alphas_cumprod, timesteps))
    return pieces.merge(torch.cat(edited))


def edit_fused(
    prior: Prior, pieces: Pieces, config: BaselineConfig, generator: torch.Generator, report: Report
) -> Tensor:
    """InstructPix2Pix with the windows' guided predictions fused at every step."""
    predict, sampling = window_predictor(prior, pieces), config.sampling

    def predict_windows(z_windows: Tensor, t: int, rows: Tensor) -> Tensor:
        guided = guided_predictor(predict, rows, sampling.text_scale, sampling.image_scale)
        return reported(guided, report)(z_windows, t)

    return multidiffusion_sample(
        predict_windows,
        start_latents(pieces.z_source, prior.alphas_cumprod, config, generator),
        prior.alphas_cumprod,
        sampling.timesteps(len(prior.alphas_cumprod)),
        gather=pieces.gather,
        scatter=pieces.scatter,
        weights=pieces.weights,
        batch=WINDOWS_AT_ONCE,
    )


def start_latents(
    z_source: Tensor, alphas_cumprod: Tensor, config: BaselineConfig, generator: torch.Generator
) -> Tensor:
    """Where InstructPix2Pix starts, [F, C, H, W]."""
    eps = draw_noise(z_source, config.noise, generator)
    start = config.sampling.timesteps(len(alphas_cumprod))[0]
    return eps if config.init == "noise" else add_noise(z_source, eps, alphas_cumprod[start].item())


BASELINES = {
    "ip2p": edit_windows,
    "ip2p_multidiffusion": edit_fused,
    "pix2video": lambda prior, pieces, config, _, report: pix2video(
        prior, pieces, config.sampling, config.pix2video, report
    ),
    "fatezero": lambda prior, pieces, config, _, report: fatezero(
        prior, pieces, config.sampling, config.fatezero, report
    ),
}


def downscaled_size(prior: DiffusersPrior, height: int, width: int) -> tuple[int, int]:
    """(H, W) whose longer side is the one that the prior was trained at; both divide by what VAE and UNet halve."""
    factor = prior.codec.downscale
    unit = factor * 2 ** (len(prior.unet.down_blocks) - 1)
    scale = prior.unet.config.sample_size * factor / max(height, width)
    return tuple(max(round(side * scale / unit), 1) * unit for side in (height, width))
