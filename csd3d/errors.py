"""The exception that a user's mistake raises: `launch.py` prints its line and exits with 2."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from outside: says in one line what was wrong, where (file and key), and what would be right."""


class InputErrors(InputError):
    """Several mistakes at once, each in a line of its own."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def one_line(error: BaseException, most: int = 200) -> str:
    """The error's message on one line, cut after `most` characters."""
    return " ".join(str(error).split())[:most]


def closest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is spelt most like `name`, None where there are none. Swapped letters count as alike."""

    def likeness(other: str) -> float:
        ratio = difflib.SequenceMatcher(None, other, name).ratio()
        return ratio + (1 - ratio) / 2 if sorted(other) == sorted(name) else ratio

    return max(known, key=likeness, default=None)
