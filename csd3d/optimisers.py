"""Loading the state of torch's optimisers, checked against their parameters, which torch does not do."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ADAM = ("step", "exp_avg", "exp_avg_sq")  # what Adam has of every parameter that it has moved


def load_optimiser(optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a `state_dict` in place; ValueError names the first tensor that does not fit its parameter.

    All tensors of the state are floating, and of the shape of their parameter or single numbers.
    """
    for number, own in state["state"].items():
        for key, value in own.items():
            if isinstance(value, Tensor) and not value.is_floating_point():
                raise ValueError(f"state/{number}/{key}: is of {value.dtype}, expected floating numbers")
    settings = [group.keys() for group in optimiser.param_groups]
    optimiser.load_state_dict(dict(state))
    for i, (wanted, group) in enumerate(zip(settings, optimiser.param_groups, strict=True)):
        if missing := sorted(wanted - group.keys()):
            raise ValueError(f"param_groups/{i}: has no {missing[0]}")
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    if len(optimiser.state.keys() - set(parameters)):
        raise ValueError(f"state: has entries for more than the {len(parameters)} parameters")
    for number, parameter in enumerate(parameters):
        _check_moments(optimiser, optimiser.state.get(parameter, {}), parameter, f"state/{number}")


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
