"""This process's place among those that torchrun started together; imports no torch."""

import os

from csd3d.errors import InputError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them


class RankLost(InputError):
    """Another rank cannot be reached any more."""


def count() -> int:
    """How many processes torchrun started together; 1 without torchrun."""
    return _number("WORLD_SIZE") if all(os.environ.get(name) for name in VARIABLES) else 1


def rank() -> int:
    """This process's number among them."""
    return _number("RANK") if count() > 1 else 0


def _number(variable: str) -> int:
    text = os.environ[variable]
    if not text.isdecimal():
        raise InputError(f"environment variable {variable}: {text!r} is no number; torchrun sets it")
    return int(text)
