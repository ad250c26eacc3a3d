"""How assets are descended: Adam with warm-up and decay, clipped gradients, averaged weights."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from csd3d.representations.batch import Assets
from csd3d.representations.fit import gradients_finite


@dataclass
class OptimConfig:
    """Adam on the fields."""

    learning_rate: float = 1e-2
    final: float = 1.0  # share of learning_rate that is left at the last step, falling exponentially
    background: float = 0.1  # the background's learning rate, as a share of the fields'
    clip: float = 0.0  # greatest norm of the gradients; 0: any
    ema: float = 0.0  # decay of averaged weights, which are what is shown; 0: none
    warmup: int = 10  # steps

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not 0 <= self.ema < 1:
            raise ValueError(f"learning_rate is {self.learning_rate:g}, ema {self.ema:g}: above 0, and in [0, 1)")
        if not 0 < self.final <= 1:
            raise ValueError(f"final is {self.final:g}: give the share of learning_rate left at the end, in (0, 1]")

    def share(self, step: int, steps: int) -> float:
        """Of the learning rate, at `step` of `steps`: linear warm-up times exponential decay to `final`."""
        return min(1.0, (step + 1) / max(self.warmup, 1)) * self.final ** (step / max(steps - 1, 1))


@dataclass
class Descent:
    """The optimiser of some assets, and their averaged weights, if any."""

    config: OptimConfig
    model: Assets
    optimiser: torch.optim.Adam
    average: AveragedModel | None

    @staticmethod
    def of(model: Assets, config: OptimConfig) -> "Descent":
        """A new one; the background has a learning rate of its own."""
        background = {id(p) for m in model.models for p in m.background.parameters()}
        rate = config.learning_rate
        groups = [
            {"params": [p for p in model.parameters() if id(p) not in background], "lr": rate},
            {"params": [p for p in model.parameters() if id(p) in background], "lr": rate * config.background},
        ]
        optimiser = torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.99), eps=1e-15)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
        return Descent(config, model, optimiser, average)

    def step(self, loss: Tensor, share: float) -> bool:
        """Backward, clip, one step at a share of the rate, average; False where the gradients are not finite."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if not gradients_finite(self.model):
            return False
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        rates = [group["lr"] for group in self.optimiser.param_groups]
        for group, rate in zip(self.optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * share
        self.optimiser.step()
        for group, rate in zip(self.optimiser.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.average is not None:
            self.average.update_parameters(self.model)
        return True
