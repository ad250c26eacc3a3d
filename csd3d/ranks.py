"""This process's place among those that torchrun started together; imports no torch."""

import os

from csd3d.errors import InputError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them


class RankLost(InputError):
    """Another rank cannot be reached, or this one's place is not known; every rank tells it."""


def count() -> int:
    """How many processes torchrun started together; 1 without torchrun. RankLost for values that it never sets."""
    if not all(os.environ.get(name) for name in VARIABLES):
        return 1
    found, place = _number("WORLD_SIZE"), _number("RANK")
    if place >= found:
        raise RankLost(f"environment variable RANK: {place} is not below WORLD_SIZE, {found}; torchrun sets both")
    return found


def rank() -> int:
    """This process's number among them."""
    return _number("RANK") if count() > 1 else 0


def _number(variable: str) -> int:
    text = os.environ[variable]
    if not (text.isascii() and text.isdecimal()):
        raise RankLost(f"environment variable {variable}: {text!r} is no number; torchrun sets it")
    return int(text)
