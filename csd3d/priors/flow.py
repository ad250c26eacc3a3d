"""Flow-matching models (Stable Diffusion 3, arXiv 2403.03206) in the variance-preserving terms of `prior`.

Symbols as in `prior`, a = √ᾱ_t, σ = √(1 − ᾱ_t), and:
  s    the flow's time in (0, 1): x_s = (1 − s) x_0 + s ε
  v    [B, C, h, w] the velocity that the network predicts, dx_s/ds = ε − x_0

Both noisings mix x_0 = z and ε, so z_t = a x_0 + σ ε equals x_s up to scale where the two mixing ratios agree:

    s/(1 − s) = σ/a   =>   s = σ/(a + σ),   1 − s = a/(a + σ),   x_s = z_t/(a + σ)

and the noise follows from the velocity with no approximation:

    x_s + (1 − s) v = (1 − s) x_0 + s ε + (1 − s)(ε − x_0) = ε

Networks predict expectations given z_t (equivalently, given x_s), and the equation holds for these too.
`parameterisation.to_epsilon` does the last step.
"""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


def flow_time(alpha_bar: Tensor) -> Tensor:
    """s = σ/(a + σ) of ᾱ, any shape, in float64: near ᾱ = 1, σ = √(1 − ᾱ) is exact for the given ᾱ."""
    a, sigma = alpha_bar.double().sqrt(), (1 - alpha_bar.double()).sqrt()
    return sigma / (a + sigma)


def flow_alphas(s: Tensor) -> Tensor:
    """ᾱ = (1 − s)²/((1 − s)² + s²), the inverse of `flow_time`, float64."""
    s = s.double()
    return (1 - s).square() / ((1 - s).square() + s.square())


def flow_schedule(scheduler: "FlowMatchEulerDiscreteScheduler", tokens: int) -> Tensor:
    """ᾱ_t [T] float64, decreasing, at the model's own T shifted times s; t = 0 is the least noise.

    A shift that depends on the resolution (`use_dynamic_shifting`) is taken for pictures of `tokens` patches. The last
    time, s = 1, has ᾱ = 0, where x̂_0 = (z_t − σ ε)/a is undefined, so it is moved back by half a step.
    """
    s = scheduler.sigmas.double()
    if scheduler.config.use_dynamic_shifting:
        s = scheduler.time_shift(_dynamic_shift(scheduler, tokens), 1.0, s)
    s = s.flip(0)
    s[-1] = (s[-1] + s[-2]) / 2
    return flow_alphas(s)


def _dynamic_shift(scheduler: "FlowMatchEulerDiscreteScheduler", tokens: int) -> float:
    """μ, linear in the number of patches, as in diffusers' pipelines (arXiv 2403.03206, section 5.3.2)."""
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


def flow_input(z_t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """The network's input x_s [B, C, h, w] for z_t, and its time s [B]; `alpha_bar` [B]."""
    s = flow_time(alpha_bar)
    norm = alpha_bar.double().sqrt() + (1 - alpha_bar.double()).sqrt()
    s, norm = s.to(z_t.dtype), norm.to(z_t.dtype)
    return z_t / norm.view(-1, 1, 1, 1), s
