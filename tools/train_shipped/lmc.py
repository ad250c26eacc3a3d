"""Training of b_ψ (`ExpectedReconstruction`) for LMC-SDS (arXiv 2401.05293), for one prior.

Symbols: z scaled latents of real pictures [B,4,h,w], y their captions, z_t = √ᾱ z + √(1−ᾱ) ε, and the prior's one-step
reconstruction ẑ_0(z_t; y) = (z_t − √(1−ᾱ) ε̂(z_t; y))/√ᾱ, at guidance 1. Minimised is

    E over z, y, ε and t in [0.02, 0.98] of w(t) |b_ψ(z, t) − ẑ_0(z_t; y)|²,

whose minimum, whatever w > 0, is b(z, t) = E[ẑ_0(z_t; y) | z]. The formula is from the paper's abstract and secondary
sources.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel

from csd3d.distillation.schedule import timestep
from csd3d.errors import InputError
from csd3d.priors import Condition, Prior, PriorConfig, load_prior
from csd3d.priors.expected import ExpectedReconstruction
from tools.train_shipped.feed import Feed, FeedConfig
from tools.train_shipped.learner import choose
from tools.train_shipped.loop import FitConfig, Trainer, autocast, fit, process
from tools.train_shipped.rows import Encoder
from tools.train_shipped.vae import save_whole

T_MIN, T_MAX = 0.02, 0.98

Predict = Callable[[Tensor, Tensor], Tensor]


def reconstruction_weight(alphas_cumprod: Tensor, gamma: float = 5.0) -> Tensor:
    """w = min(SNR + 1, γ + 1), SNR = ᾱ/(1 − ᾱ); [T], between 1 and γ + 1.

    Unweighted, high noise dominates: |b − z|² is (1 − ᾱ)² |z|² for a standard normal prior, and the square of an error
    of ε̂ is multiplied by (1 − ᾱ)/ᾱ, up to 170, there. In the units of ε, where Δ is formed, the weight is SNR: 50 at
    low noise and nearly 0 at high, where b_ψ differs from z most. SNR + 1, the units of v, has neither fault, but at
    low noise spends 50 on the variance of ẑ_0, which no b_ψ can lower: hence the bound. It is what a clean-image error
    weighed when the shipped priors were trained (`velocity_weight`).
    """
    return (1 / (1 - alphas_cumprod)).clamp(max=gamma + 1)


@torch.no_grad()
def reconstruct(predict: Predict, z: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """ẑ_0 [B,4,h,w] of z noised by `noise` to t [B], ᾱ [B]; `predict(z_t, t)` is ε̂."""
    a, sigma = (value.sqrt()[:, None, None, None] for value in (alpha_bar, 1 - alpha_bar))
    noisy = a * z + sigma * noise
    return (noisy - sigma * predict(noisy, t)) / a


def lmc_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    predict: Predict,
    z: Tensor,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Weighted |b_ψ(z, t) − ẑ_0|² for t uniform and ε normal, both drawn here; and `sds`, what b = z would have.

    `alphas_cumprod` [T] may lie on any device; the loss cannot fall below the variance of ẑ_0 given z.
    """
    steps = len(alphas_cumprod)
    low, high = timestep(T_MIN, steps), timestep(T_MAX, steps)
    t = torch.randint(low, high + 1, (len(z),), generator=generator).to(alphas_cumprod.device)
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    alpha_bar, weight = alphas_cumprod[t].to(z.device), reconstruction_weight(alphas_cumprod)[t].to(z.device)
    t = t.to(z.device)
    target = reconstruct(predict, z, noise, t, alpha_bar)
    errors = {"loss": model(z, t) - target, "sds": z - target}
    return {name: (weight * e.float().square().mean((1, 2, 3))).mean() for name, e in errors.items()}


def train_lmc(config: FitConfig, rows: FeedConfig, base: Path, out: Path, width: int = 64, blocks: int = 4) -> None:
    """Train for the text-to-image pipeline `base` on streamed pictures and their captions; the average goes to `out` at
    every checkpoint. InputError where `base` is no Stable Diffusion of text to image."""
    prior = open_base(base, config)
    encoder, size = Encoder(prior.vae, prior.tokenizer, config), prior.defaults.working_size
    model = ExpectedReconstruction(prior.vae.config.latent_channels, width, blocks)
    scaling = prior.vae.config.scaling_factor
    with Feed("t2i", encoder, size, config.seed + 1_000_003 * process(), rows) as feed:
        trainer = Trainer(model.to(memory_format=torch.channels_last), config, feed)

        def loss_fn(generator: torch.Generator, progress: float) -> dict[str, Tensor]:
            drawn = feed.draw(config.batch, generator)
            tokens = choose(drawn["tokens"][:, :-1], generator)  # the last one is of the blurred picture
            with torch.no_grad():
                text = prior.text_encoder(tokens)[0].float()
            predict = lambda z_t, t: prior.predict_noise(z_t, t, Condition(text))  # noqa: E731 (a name for one call)
            with autocast(config):
                return lmc_loss(model, predict, scaling * drawn["modes"].float(), prior.alphas_cumprod, generator)

        fit(trainer, loss_fn, lambda: save_whole(out, trainer.ema_model()))


def open_base(base: Path, config: FitConfig) -> Prior:
    """The prior in config.precision; InputError where captions need more than one CLIP's tokens (SDXL, IF, SD3)."""
    dtype = "bfloat16" if config.precision == "bf16" else "float32"
    opened = PriorConfig(model=str(base), device=config.device, dtype=dtype, micro_batch=config.batch)
    prior = load_prior(opened, require="text")
    # embeddings of all captions would take gigabytes, so tokens are kept, of one CLIP
    if type(prior.text_encoder) is not CLIPTextModel or prior.condition([""]).pooled is not None:
        raise InputError(f"{base}: train lmc needs a Stable Diffusion 1.x or 2.x, whose text encoder is one CLIP")
    return prior
