"""Calling a family's `forward`, which may be a plugin's, so that a mistake in it is told in one line.

And calling a network by tensors alone, for what exports it.
"""

import inspect
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from csd3d.errors import InputError
from csd3d.priors.libraries import MISFITS

Inputs = dict[str, Tensor]  # by name, "added_cond_kwargs.text_embeds" for one in a dict; the first side is the batch


def call_forward(forward: Callable[..., Tensor], family: str, *inputs: Any) -> Tensor:
    """Return forward(*inputs); an error in it becomes an InputError that names the family, the file and the line."""
    try:
        return forward(*inputs)
    except (InputError, torch.OutOfMemoryError):
        raise
    except MISFITS as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = getattr(forward, "func", inspect.unwrap(forward))  # of a partial
        file = getattr(own, "__code__", call_forward.__code__).co_filename
        frame = [frame for frame in frames if frame.filename == file][-1]
        lines = str(error).strip().splitlines() or [""]
        # a TypeError may begin with the text of the whole network, whose last line is the reason
        reason = lines[-1].lstrip(") ") if isinstance(error, TypeError) else lines[0]
        raise InputError(
            f"prior.model: {family or 'its family'}: forward failed at {frame.filename}:{frame.lineno} "
            f"({type(error).__name__}: {reason[:160]})"
        ) from error


class FlatCall(nn.Module):
    """A network that takes its inputs as a row of tensors called `names`, and gives one tensor."""

    def __init__(self, network: nn.Module, names: tuple[str, ...], fixed: tuple):
        super().__init__()
        self.network, self.names, self.fixed = network, names, fixed

    def forward(self, *inputs: Tensor) -> Tensor:
        options: dict[str, Any] = dict(self.fixed)
        for name, value in zip(self.names, inputs, strict=True):
            outer, _, inner = name.partition(".")
            if inner:
                options.setdefault(outer, {})[inner] = value
            else:
                options[outer] = value
        return self.network(**options, return_dict=False)[0]


def flattened(network: nn.Module, args: tuple, options: Mapping[str, Any]) -> tuple[Inputs, tuple]:
    """The tensors among the arguments of a network by name, and its other arguments that are set."""
    bound = inspect.signature(network.forward).bind(*args, **options).arguments
    inputs, fixed = {}, []
    for name, value in bound.items():
        if isinstance(value, Tensor):
            inputs[name] = value.contiguous()
        elif isinstance(value, Mapping):
            inputs |= {f"{name}.{inner}": x.contiguous() for inner, x in value.items()}
        elif value is not None:
            fixed.append((name, value))
    return inputs, tuple(fixed)
