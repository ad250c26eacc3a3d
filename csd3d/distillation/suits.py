"""The numbers that suit a model, put into the settings of a distillation where those leave them to the model."""

from dataclasses import replace
from typing import Any, Protocol, TypeVar

from csd3d.distillation.kernel import OF_MODEL
from csd3d.distillation.step import DistillConfig

Config = TypeVar("Config", bound=DistillConfig)


class Suits(Protocol):
    """The numbers that suit a model: `priors.prior.Defaults`."""

    guidance_scale: float
    guidance_final: float
    t_min: float
    t_max: float
    bandwidth: float


def suited(config: Config, defaults: Suits) -> Config:
    """`config` with the numbers that suit the model, where it says null, or "model" for the kernel's width.

    Raises ValueError where the config's own numbers contradict them.
    """
    unsaid = [key for key in ("guidance_scale", "t_min", "t_max") if getattr(config, key) is None]
    changes: dict[str, Any] = {key: getattr(defaults, key) for key in unsaid}
    if "guidance_scale" in unsaid and config.guidance_final is None:
        changes["guidance_final"] = defaults.guidance_final or None
    if config.svgd is not None and config.svgd.bandwidth == OF_MODEL:
        changes["svgd"] = replace(config.svgd, bandwidth=defaults.bandwidth)
    return replace(config, **changes) if changes else config
