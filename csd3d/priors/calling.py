"""Calling a family's `forward`, which may be a plugin's, so that a mistake in it is told in one line."""

import inspect
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from csd3d.errors import InputError


def call_forward(forward: Callable[..., Tensor], family: str, *inputs: Any) -> Tensor:
    """Return forward(*inputs); an error in it becomes an InputError that names the family, the file and the line."""
    try:
        return forward(*inputs)
    except (InputError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
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
