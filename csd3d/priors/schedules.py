"""The noise schedule of a model, by the scheduler_config.json of its folder, of which every key that counts is checked.

All functions raise InputError in one line that names the file, and the key.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from csd3d.errors import InputError
from csd3d.priors.libraries import opened
from csd3d.priors.opening import ModelFolder, config_name, read_config

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

ZERO_ALPHA = 1e-10  # ᾱ below is taken for 0; a cosine schedule ends at 2e-9
LEAST_ALPHA = 2.0**-24  # what it becomes
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
LEAST_STEPS, MOST_STEPS = 10, 100_000  # of a schedule


def load_noise_schedule(folder: ModelFolder) -> "DDIMScheduler":
    """The noise schedule as a DDIM scheduler, which reads every β-schedule that these models were trained with."""
    from diffusers import DDIMScheduler

    config, file = read_config(folder, "scheduler"), _file(folder)
    kind, prediction = str(config.get("_class_name", "")), config.get("prediction_type", "epsilon")
    if "Flow" in kind or "EDM" in kind or prediction not in ("epsilon", "v_prediction", "sample"):
        raise InputError(
            f"{file}: {kind} with prediction_type {prediction!r} is not supported; epsilon, v_prediction and sample are"
        )
    _check_kind(file, config)
    _check_betas(file, config)
    schedule = opened(file, lambda: DDIMScheduler.from_config(config))
    betas = schedule.betas
    if not (betas.isfinite().all() and betas.min() >= 0 and betas.max() <= 1):
        raise InputError(f"{file}: its betas, {betas.min():g} to {betas.max():g}, make no noise schedule")
    return _away_from_zero(file, schedule, prediction)


def load_flow_schedule(folder: ModelFolder) -> "FlowMatchEulerDiscreteScheduler":
    """The times of a flow-matching model."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config, file = read_config(folder, "scheduler"), _file(folder)
    kind = str(config.get("_class_name", ""))
    if "FlowMatch" not in kind or config.get("invert_sigmas"):
        raise InputError(
            f"{file}: {kind} with invert_sigmas {config.get('invert_sigmas', False)} is not supported for a "
            "transformer; FlowMatchEulerDiscreteScheduler with invert_sigmas false is"
        )
    _check_kind(file, config)
    return opened(file, lambda: FlowMatchEulerDiscreteScheduler.from_config(config))


def _file(folder: ModelFolder) -> Path:
    return folder.part("scheduler") / config_name("scheduler")


def _check_kind(file: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError for a class that is no scheduler of diffusers, and for a number of steps that cannot be."""
    import diffusers

    kind, steps = config.get("_class_name"), config.get("num_train_timesteps", 1000)
    if kind is not None and not (isinstance(kind, str) and kind.endswith("Scheduler") and kind in dir(diffusers)):
        raise InputError(f"{file}: _class_name: {kind!r} is no scheduler of diffusers; DDIMScheduler would be")
    if type(steps) is not int or not LEAST_STEPS <= steps <= MOST_STEPS:
        right = f"a whole number from {LEAST_STEPS} to {MOST_STEPS}, 1000 for most models"
        raise InputError(f"{file}: num_train_timesteps: expected {right}, got {steps!r}")


def _check_betas(file: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError where a key that β is made of is no number, or out of (0, 1)."""
    for key, usual in {"beta_start": 0.0001, "beta_end": 0.02}.items():
        if not _is_beta(value := config.get(key, usual)):
            raise InputError(f"{file}: {key}: expected a number above 0 and below 1, got {value!r}")
    kind = config.get("beta_schedule", BETA_SCHEDULES[0])
    if kind not in BETA_SCHEDULES:
        raise InputError(f"{file}: beta_schedule: expected one of {', '.join(BETA_SCHEDULES)}, got {kind!r}")
    betas, steps = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    if betas is not None and not (isinstance(betas, list) and len(betas) == steps and all(map(_is_beta, betas))):
        right = f"null, or num_train_timesteps = {steps} numbers above 0 and below 1"
        raise InputError(f"{file}: trained_betas: expected {right}, got {str(betas)[:60]}")


def _is_beta(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1


def _away_from_zero(file: Path, schedule: "DDIMScheduler", prediction: str) -> "DDIMScheduler":
    """The schedule with 2⁻²⁴ in place of ᾱ_T = 0, as diffusers' Euler schedulers have it.

    Models with zero terminal SNR (arXiv 2305.08891) have ᾱ_T = 0, where ẑ_0 = (z_t − σ ε)/√ᾱ is 0/0. At 2⁻²⁴ the
    rounding of float32 still leaves ẑ_0 three digits, and to the network z_t is the same. InputError for epsilon, which
    says nothing of ẑ_0 there.
    """
    alphas = schedule.alphas_cumprod
    if prediction == "epsilon" and alphas.min() < ZERO_ALPHA:
        raise InputError(
            f"{file}: prediction_type epsilon with zero terminal SNR (rescale_betas_zero_snr) cannot be: the noise "
            "says nothing of the picture there; v_prediction could be"
        )
    schedule.alphas_cumprod = torch.where(alphas < ZERO_ALPHA, LEAST_ALPHA, alphas)
    return schedule
