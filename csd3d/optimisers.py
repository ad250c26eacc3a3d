"""Loading the state of torch's optimisers, checked against their parameters, which torch does not do."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ADAM = ("step", "exp_avg", "exp_avg_sq")  # what Adam has of every parameter that it has moved
COUNTED = ("step", "exp_avg_sq")  # of these, a number of steps and a mean of squares: not negative
RATES = ("lr", "rate")  # the settings of a group that steps change


def load_optimiser(optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a `state_dict` in place; ValueError names the first tensor that does not fit its parameter.

    All tensors of the state are floating, and of the shape of their parameter or single numbers. Of the settings only
    the learning rates are loaded: the others (β, ε, decay, …) stay those of this run.
    """
    for number, own in state["state"].items():
        for key, value in own.items():
            if isinstance(value, Tensor) and not value.is_floating_point():
                raise ValueError(f"state/{number}/{key}: is of {value.dtype}, expected floating numbers")
    optimiser.load_state_dict({**state, "param_groups": _groups(optimiser, state["param_groups"])})
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    if len(optimiser.state.keys() - set(parameters)):
        raise ValueError(f"state: has entries for more than the {len(parameters)} parameters")
    betas = [group.get("betas") for group in optimiser.param_groups for _ in group["params"]]
    for number, parameter in enumerate(parameters):
        own, path = optimiser.state.get(parameter, {}), f"state/{number}"
        _check_moments(optimiser, own, parameter, path)
        if betas[number] and own.keys() >= set(ADAM):
            _check_mean(own["exp_avg"].double(), own["exp_avg_sq"].double(), *betas[number], path)


def _groups(optimiser: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The optimiser's own groups with the saved learning rates, of which none is negative."""
    groups = optimiser.state_dict()["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(f"param_groups: are {len(saved)}, expected {len(groups)}")
    for i, (own, given) in enumerate(zip(groups, saved, strict=True)):
        for key in own.keys() & RATES:
            if not given.get(key, -1) >= 0:
                raise ValueError(f"param_groups/{i}/{key}: is {given.get(key)}, expected a number from 0")
        own.update((key, given[key]) for key in own.keys() & {"params", *RATES})
    return groups


def _check_moments(optimiser: torch.optim.Optimizer, own: Mapping[str, Any], parameter: Tensor, path: str) -> None:
    adam = ADAM if isinstance(optimiser, (torch.optim.Adam, torch.optim.AdamW)) and own else ()
    for key in adam:
        if not isinstance(own.get(key), Tensor):
            raise ValueError(f"{path}/{key}: is no tensor")
    for key, value in own.items():
        if not isinstance(value, Tensor):
            continue
        shape = torch.Size() if key == "step" else parameter.shape
        if value.shape != shape and (value.dim() or key in ADAM):
            raise ValueError(f"{path}/{key}: is of shape {tuple(value.shape)}, expected {tuple(shape)}")
        if key in COUNTED and (value < 0).any():
            raise ValueError(f"{path}/{key}: is negative")


def _check_mean(m: Tensor, v: Tensor, beta1: float, beta2: float, path: str) -> None:
    """Raise ValueError for a mean m of gradients that no gradients with the mean square v have.

        m² ≤ v (1 − β₁)² / ((1 − β₂) (1 − β₁²/β₂))    for β₁² < β₂, by Cauchy and Schwarz

    Beyond it a step, of the size m/√v, would throw the parameters far away. Twice as much is allowed, for rounding.
    """
    if beta1**2 >= beta2:
        return
    most = (1 - beta1) ** 2 / ((1 - beta2) * (1 - beta1**2 / beta2))
    if (m.square() > 2 * most * v + 1e-30).any():
        raise ValueError(f"{path}/exp_avg: is larger than exp_avg_sq allows")
