"""The timestep and the weight of a step. Times are fractions of the schedule: 0 clean, 1 noise."""

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from csd3d.distillation.step import DistillConfig

SCHEDULES = ("uniform", "annealed", "staged", "logit_normal")
WEIGHTS = ("sigma2", "one", "x0")


def timestep(fraction: float, num_train_timesteps: int) -> int:
    """The integer timestep nearest to `fraction` of the schedule, kept within [0, T − 1]."""
    return min(max(round(fraction * num_train_timesteps), 0), num_train_timesteps - 1)


def annealed_fraction(step: int, steps: int, t_min: float, t_max: float) -> float:
    """Linear from t_max at step 0 to t_min at the last step; t_max if there is only one."""
    return t_max + (t_min - t_max) * step / max(steps - 1, 1)


def stage(step: int, steps: int, switch: float) -> int:
    """1 before `switch` (a fraction) of the steps, 2 from there on; a function of the step, so resuming keeps it."""
    return 2 if step >= switch * steps else 1


def uniform_timestep(t_min: float, t_max: float, num_train_timesteps: int, generator: torch.Generator) -> int:
    """One timestep drawn uniformly from [t_min, t_max] of the schedule, ends included."""
    low, high = timestep(t_min, num_train_timesteps), timestep(t_max, num_train_timesteps)
    return int(torch.randint(low, high + 1, (), generator=generator, device=generator.device))


def logit_normal_timestep(t_min: float, t_max: float, num_train_timesteps: int, generator: torch.Generator) -> int:
    """One timestep whose fraction of the schedule is 1/(1 + e^−n), n standard normal, kept within [t_min, t_max].

    As in the training of Stable Diffusion 3 (arXiv 2403.03206, section 3.1): mostly in the middle of the schedule.
    """
    n = torch.randn((), generator=generator, device=generator.device)
    return timestep(min(max(torch.sigmoid(n).item(), t_min), t_max), num_train_timesteps)


def check_timesteps(config: "DistillConfig") -> None:
    """Raise ValueError naming the key that is out of range."""
    if config.schedule not in SCHEDULES:
        raise ValueError(f"schedule is {config.schedule!r}: choose one of {', '.join(SCHEDULES)}")
    for key in ("t_min", "t_max", "t_late", "switch"):
        if (value := getattr(config, key)) is not None and not 0 <= value <= 1:
            raise ValueError(f"{key} is {value}: give a fraction of the schedule in [0, 1]")
    ends = [config.t_max, config.t_late if config.schedule == "staged" else None]
    highest = min((end for end in ends if end is not None), default=1.0)
    if config.t_min is not None and config.t_min > highest:
        raise ValueError(f"t_min is {config.t_min}: give at most {highest}, the upper end of the range")


def scheduled_timestep(config: "DistillConfig", step: int, num_train_timesteps: int, generator: torch.Generator) -> int:
    """The t of all particles at `step`; an annealed schedule draws nothing from the generator."""
    if config.schedule == "annealed":
        return timestep(annealed_fraction(step, config.steps, config.t_min, config.t_max), num_train_timesteps)
    if config.schedule == "logit_normal":
        return logit_normal_timestep(config.t_min, config.t_max, num_train_timesteps, generator)
    late = config.schedule == "staged" and stage(step, config.steps, config.switch) == 2
    return uniform_timestep(config.t_min, config.t_late if late else config.t_max, num_train_timesteps, generator)


def step_weight(kind: str, alpha_bar: float) -> float:
    """w(t): "sigma2" = σ_t², as DreamFusion and CSD; "one"; "x0" = σ_t/√ᾱ_t, in units of the latent.

    z − ẑ_0(z_t) = (σ_t/√ᾱ_t)(ε^ω − ε), so with "x0" a step of size 1 along an SDS direction ends at the denoised
    estimate, and an annealed schedule acts as a sampler. Along CSD-Edit it ends at the denoised estimate plus the
    source's reconstruction error.
    """
    if kind == "one":
        return 1.0
    if kind == "sigma2":
        return 1 - alpha_bar
    if kind == "x0":
        return math.sqrt((1 - alpha_bar) / alpha_bar)
    raise ValueError(f"weight is {kind!r}: choose one of {', '.join(WEIGHTS)}")
