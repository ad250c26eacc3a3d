"""Directions Δ_i: what a method says should change about particle i, given the noise predictions it needs.

Shapes: every argument and result is [N, ...] in the latent's layout. Signs: Δ is descended (arXiv 2307.04787, METHODS
notation). Units: Δ is in those of ε, so that one weight w(t) and one combiner serve every method; a method stated in
the latent's own units (SDI, LMC-SDS) becomes that again under the weight "x0".
"""

import math

from torch import Tensor

from csd3d.distillation.noise import implied_noise


def sds(eps_guided: Tensor, noise: Tensor) -> Tensor:
    """Score distillation: Δ = ε^ω(z_t; y) − ε, DreamFusion (arXiv 2209.14988) Eq. 3 without w(t)."""
    return eps_guided - noise


def csd_edit(eps_guided_target: Tensor, eps_source: Tensor) -> Tensor:
    """CSD-Edit: Δ = ε^ω(z_t; x̃, y) − ε(z̃_t; x̃, ∅), arXiv 2307.04787 Eq. 10.

    The first is predicted at the noised *target*, the second at the *source* noised with the same ε and t (not at the
    target's z_t, as some pseudo-code has it). At z = z̃ with image scale 1 it is exactly 0 when the instruction has
    no effect; with image scale ω_s it is then (ω_s − 1)(ε(x̃, ∅) − ε(∅, ∅)), unless the baseline is guided by ω_s
    too, as in the authors' code.
    """
    return eps_guided_target - eps_source


def dds(eps_guided_target: Tensor, eps_guided_source: Tensor) -> Tensor:
    """Delta denoising score (arXiv 2304.07090) Eq. 3: Δ = ε^ω(z_t; y_target) − ε^ω(z̃_t; y_source), same ε and t.

    Exactly 0 at z = z̃ with equal prompts.
    """
    return eps_guided_target - eps_guided_source


def pds_coefficients(
    alpha_bar: float, alpha_bar_previous: float, alpha_step: float | None = None
) -> tuple[float, float]:
    """(ψ, χ) of `pds`, between a level t and the cleaner one t' that it is compared at.

        μ = A x̂_0 + B x_t,  A = √ᾱ' β/(1−ᾱ),  B = √α (1−ᾱ')/(1−ᾱ),  σ² = (1−ᾱ')/(1−ᾱ) β,  β = 1 − α
        ψ = (√ᾱ' − A − B √ᾱ)/σ,  χ = A √((1−ᾱ)/ᾱ)/σ

    With α = ᾱ/ᾱ' (`alpha_step` None), the DDPM posterior that t and t' really have, ψ is 0 up to rounding. The authors'
    code takes t' = t − 2 and yet α of the single step t; pass that as `alpha_step` for their identity term.
    """
    alpha = alpha_bar / alpha_bar_previous if alpha_step is None else alpha_step
    beta = 1 - alpha
    a = math.sqrt(alpha_bar_previous) * beta / (1 - alpha_bar)
    b = math.sqrt(alpha) * (1 - alpha_bar_previous) / (1 - alpha_bar)
    sigma = math.sqrt((1 - alpha_bar_previous) / (1 - alpha_bar) * beta)
    psi = (math.sqrt(alpha_bar_previous) - a - b * math.sqrt(alpha_bar)) / sigma
    return psi, a * math.sqrt((1 - alpha_bar) / alpha_bar) / sigma


def pds(
    z: Tensor, z_source: Tensor, eps_guided_target: Tensor, eps_guided_source: Tensor, psi: float, chi: float
) -> Tensor:
    """Posterior distillation sampling (arXiv 2311.13831) Eq. 12: Δ = ψ (z − z̃) + χ (ε^ω_target − ε^ω_source).

    The difference of the stochastic latents s = (x_t' − μ(x_t, x̂_0))/σ of target and source, noised alike; `psi` and
    `chi` of `pds_coefficients`. At ψ = 0 it is χ times `dds`; ψ > 0 holds the target to its source.
    """
    return psi * (z - z_source) + chi * (eps_guided_target - eps_guided_source)


def bridge(eps_target: Tensor, eps_source: Tensor) -> Tensor:
    """Stage 2 of SDS-Bridge (arXiv 2406.09417) Eq. 10: Δ = ε(z_t; y + good words) − ε(z_t; y + bad words).

    Both at the same z_t: the bridge from what the render is, in words, to what it should be. Stage 1 is `sds`.
    """
    return eps_target - eps_source


def nfsd(eps_null: Tensor, eps_text: Tensor, eps_negative: Tensor | None, scale: float) -> Tensor:
    """Noise-free score distillation (arXiv 2310.17590) Eq. 9: Δ = δ_D + ω (ε_y − ε_∅), without the noise ε.

    δ_D = ε_∅ − ε(z_t; negative prompt), what is out of domain told from what is noise; where t < 200 of 1000 there is
    little noise in ε_∅, and δ_D is ε_∅ itself: pass None for `eps_negative`.
    """
    domain = eps_null if eps_negative is None else eps_null - eps_negative
    return domain + scale * (eps_text - eps_null)


def vsd(eps_guided: Tensor, eps_lora: Tensor) -> Tensor:
    """Variational score distillation (arXiv 2305.16213) Eq. 9: Δ = ε^ω(z_t; y) − ε_φ(z_t; y, camera).

    ε_φ is the score of the renders themselves; where they are the prior's own samples Δ vanishes.
    """
    return eps_guided - eps_lora


def lmc(eps_guided: Tensor, z_expected: Tensor, z_t: Tensor, alpha_bar: float) -> Tensor:
    """LMC-SDS (arXiv 2401.05293): b_ψ(z, t) − ẑ_0(z_t) in place of z − ẑ_0, in units of ε (times √(ᾱ/(1−ᾱ))).

    `z_expected` is b_ψ(z, t), the prior's one-step reconstruction that a picture as good as z would get; against it the
    blur of the step cancels. From the abstract and secondary sources. With b_ψ(z, t) = z it is `sds`.
    """
    return eps_guided - implied_noise(z_t, z_expected, alpha_bar)
