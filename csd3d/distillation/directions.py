"""Directions Δ_i: what a method says should change about particle i, given the noise predictions it needs.

Shapes: every argument and result is [N, ...] in the latent's layout. Signs: Δ is descended (arXiv 2307.04787, METHODS
notation).
"""

from torch import Tensor


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
