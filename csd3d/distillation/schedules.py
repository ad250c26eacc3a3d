"""Which timestep a step uses, and how much it weighs. Times are fractions of the schedule: 0 clean, 1 noise."""

import math

import torch

SCHEDULES = ("uniform", "annealed", "staged")
WEIGHTS = ("sigma2", "one", "x0")


def timestep(fraction: float, num_train_timesteps: int) -> int:
    """The integer timestep nearest to `fraction` of the schedule, kept within [0, T − 1]."""
    return min(max(round(fraction * num_train_timesteps), 0), num_train_timesteps - 1)


def annealed_fraction(step: int, steps: int, t_min: float, t_max: float) -> float:
    """Linear from t_max at step 0 to t_min at the last step; t_max if there is only one."""
    return t_max + (t_min - t_max) * step / max(steps - 1, 1)


def stage(step: int, steps: int, switch: float) -> int:
    """1 before `switch` (a fraction) of the steps, 2 from there on: a comparison, so a resumed run keeps its stage."""
    return 2 if step >= switch * steps else 1


def uniform_timestep(t_min: float, t_max: float, num_train_timesteps: int, generator: torch.Generator) -> int:
    """One timestep drawn uniformly from [t_min, t_max] of the schedule, ends included."""
    low, high = timestep(t_min, num_train_timesteps), timestep(t_max, num_train_timesteps)
    return int(torch.randint(low, high + 1, (), generator=generator, device=generator.device))


def step_weight(kind: str, alpha_bar: float) -> float:
    """w(t): "sigma2" = σ_t², as DreamFusion and CSD; "one"; "x0" = σ_t/√ᾱ_t, in units of the latent.

    z − ẑ_0(z_t) = (σ_t/√ᾱ_t)(ε^ω − ε): with "x0" a step of size 1 along an SDS direction lands on the denoised
    estimate, which makes an annealed schedule a sampler; along CSD-Edit it lands there plus what the source's own
    reconstruction missed.
    """
    if kind == "one":
        return 1.0
    if kind == "sigma2":
        return 1 - alpha_bar
    if kind == "x0":
        return math.sqrt((1 - alpha_bar) / alpha_bar)
    raise ValueError(f"weight is {kind!r}: choose one of {', '.join(WEIGHTS)}")
