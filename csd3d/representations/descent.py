"""The optimisation of assets: Adam with warm-up and decay, averaged weights."""

import copy
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from csd3d.representations.batch import Assets
from csd3d.schema import MOST_STEPS, Amount, Within


@dataclass
class OptimConfig:
    """Adam on the assets."""

    learning_rate: float = 1e-2  # highest learning rate, after the warm-up
    final: float = 1.0  # share of learning_rate left at the last step; the decay is exponential
    background: Amount = 0.1  # the background's learning rate, as a share of learning_rate
    clip: Amount = 0.0  # largest norm of all gradients together; 0: no limit
    ema: float = 0.0  # decay of the averaged weights, which make the finished asset; 0: the last step's weights do
    warmup: Annotated[int, Within(0, MOST_STEPS)] = 10  # steps in which the learning rate rises from 0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not 0 <= self.ema < 1:
            raise ValueError(f"learning_rate is {self.learning_rate:g}, ema {self.ema:g}: above 0, and in [0, 1)")
        if not 0 < self.final <= 1:
            raise ValueError(f"final is {self.final:g}: give the share of learning_rate left at the end, in (0, 1]")

    def share(self, step: int, steps: int) -> float:
        """Factor on the learning rate at `step` of `steps`: linear warm-up times exponential decay to `final`."""
        return min(1.0, (step + 1) / max(self.warmup, 1)) * self.final ** (step / max(steps - 1, 1))


class Average:
    """Exponential moving average m ← d m + (1 − d) θ of parameters θ with decay d; its first value is θ.

    Where the shape of θ has changed, m starts anew from θ; also in the rows that a scene's `renewed()` returns, a list
    of (parameter, rows) that have become something else since it was last asked, as splats that moved.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.parameters, self.decay = model, list(model.parameters()), decay
        self.means: list[Tensor] = []  # empty before the first step

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current values."""
        self.means = self.means or [p.clone() for p in self.parameters]
        for i, (mean, p) in enumerate(zip(self.means, self.parameters, strict=True)):
            self.means[i] = mean.lerp_(p, 1 - self.decay) if mean.shape == p.shape else p.clone()
        own = {id(p): mean for p, mean in zip(self.parameters, self.means, strict=True)}
        for scene in self.model.modules():
            for p, rows in scene.renewed() if hasattr(scene, "renewed") else ():
                own[id(p)][rows] = p[rows]

    def state_dict(self) -> dict[str, Any]:
        """The means; one that will start anew, as its parameter has another shape by now, is empty."""
        fits = [mean.shape == p.shape for mean, p in zip(self.means, self.parameters, strict=False)]
        return {"means": [mean if fit else mean.new_empty(0) for mean, fit in zip(self.means, fits, strict=True)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict`; ValueError names the first mean that does not fit its parameter."""
        means = state["means"]
        if len(means) not in (0, len(self.parameters)):
            raise ValueError(f"means: are {len(means)}, expected one for each of {len(self.parameters)} parameters")
        for i, (mean, p) in enumerate(zip(means, self.parameters, strict=False)):
            if not (isinstance(mean, Tensor) and mean.is_floating_point() and mean.shape in (p.shape, (0,))):
                found = f"{mean.dtype} {tuple(mean.shape)}" if isinstance(mean, Tensor) else type(mean).__name__
                raise ValueError(f"means/{i}: is {found}, expected floating numbers {tuple(p.shape)}")
        self.means = [mean.to(p.device) for mean, p in zip(means, self.parameters, strict=False)]


@torch.no_grad()
def averaged(model: Assets, average: Average | None) -> Assets:
    """A copy of the assets, with their averaged parameters if there are any."""
    found = copy.deepcopy(model)
    for own, mean in zip(found.parameters(), average.means if average else (), strict=False):
        if own.shape == mean.shape:  # otherwise it has changed since the last finite step
            own.copy_(mean)
    return found


def asset_optimiser(model: Assets, config: OptimConfig) -> torch.optim.Adam:
    """Return Adam for `fit.descend`, with the learning rates at share 1 as the groups' "rate"."""
    rates = {"scene": config.learning_rate, "background": config.learning_rate * config.background}
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name in rates:
        for scene in model.models:
            for parameter in scene.parameter_groups()[name]:
                share = scene.rate_of(parameter) if hasattr(scene, "rate_of") else 1.0
                groups.setdefault((name, share), []).append(parameter)
    listed = [{"params": found, "rate": rates[name] * share} for (name, share), found in groups.items()]
    return torch.optim.Adam(listed, betas=(0.9, 0.99), eps=1e-15)
