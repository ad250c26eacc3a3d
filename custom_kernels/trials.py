"""GPU libraries are tried once, for a moment, before anything relies on them.

What is installed may still not run: built for another torch, no compiler for its kernels, a card too new for it.
`auto` then takes another backend, and one line of the log says why.
"""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger("custom_kernels")


@dataclass(frozen=True)
class Library:
    """A package that computes on a GPU: the name to import, how to install it, and a trial that raises if it fails."""

    name: str
    install: str
    trial: Callable[[], None]


@functools.cache
def obstacle(library: Library) -> str | None:
    """Why the library cannot compute on this machine's GPU, in one line, or None if it can; tried at the first call."""
    if importlib.util.find_spec(library.name) is None:
        return f"{library.name} is not installed: {library.install}"
    if not torch.cuda.is_available():
        return f"{library.name} needs a GPU that torch sees (torch.cuda.is_available() is false)"
    try:
        library.trial()
    except Exception as error:  # whatever a foreign library raises, another backend takes over
        lines = str(error).strip().splitlines()
        return f"{library.name} is installed but failed its trial: {lines[0] if lines else type(error).__name__}"[:300]
    return None


def runs(library: Library, expected: bool = True) -> bool:
    """Whether the library works here; if not, one line of the log says so, unless it is merely not `expected`."""
    problem = obstacle(library)
    if problem is not None and (expected or importlib.util.find_spec(library.name) is not None):
        warn_once(f"{problem}; another backend is used instead")
    return problem is None


def require(library: Library, *tensors: Tensor, tried: bool = True) -> None:
    """Raise RuntimeError if the library, asked for by name, is not here or these tensors are not for it.

    Without `tried` it may fail its trial.
    """
    if importlib.util.find_spec(library.name) is None:
        raise RuntimeError(f"{library.name} was asked for and is not installed: {library.install}")
    if any(x.dtype != torch.float32 for x in tensors):
        raise RuntimeError(f"{library.name} takes float32 tensors, got {[x.dtype for x in tensors]}")
    if library.name == "triton" and interpreting():
        return
    if any(not x.is_cuda for x in tensors):
        raise RuntimeError(f"{library.name} computes on a GPU, got tensors on {tensors[0].device}")
    if tried and (problem := obstacle(library)) is not None:
        raise RuntimeError(f"{problem}; {library.install}")


@functools.cache
def warn_once(line: str) -> None:
    """Log a warning, once a process."""
    logger.warning("%s", line)


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: TRITON_INTERPRET=1, set before its import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one: Triton launches on that."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """Raise ArithmeticError if a trial's result is not the reference's, to a share of its largest value."""
    error = float((found - wanted).abs().max())
    if not error <= tolerance * max(1.0, float(wanted.abs().max())):
        raise ArithmeticError(f"its results differ from the reference by {error:.1e}")
