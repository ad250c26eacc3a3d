"""The exception for a user's mistake: `launch.py` prints its one line and exits with 2."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator

LONGEST = 1000  # characters of the line that tells a mistake


class InputError(ValueError):
    """Bad input from outside. The message says in one line what is wrong, where (file and key), and what is right."""


class InputErrors(InputError):
    """Several mistakes at once, one a line."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


@contextlib.contextmanager
def at_key(key: str) -> Iterator[None]:
    """Put the config's key in front of every InputError raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def one_line(error: BaseException, most: int = 200) -> str:
    """The error's message on one line, cut after `most` characters."""
    return " ".join(str(error).split())[:most]


def short(text: str, most: int = 60) -> str:
    """A text for a message: if it is longer than `most` characters, two thirds of it from its start, the rest its end.

    So a line keeps what it begins with (file and key) and what it ends with (what would be right).
    """
    return text if len(text) <= most else f"{text[: most - most // 3]} … {text[3 - most // 3 :]}"


def error_line(text: str) -> str:
    """The line that a mistake is told in: one line, whatever value is in it, and however long that is."""
    return f"error: {short(' '.join(text.split()), LONGEST)}"


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the one of `known` that is spelt most like `name`, None if `known` is empty.

    Swapped letters count as nearly equal, and capitals as small letters.
    """
    name = name.casefold()

    def likeness(other: str) -> float:
        other = other.casefold()
        ratio = difflib.SequenceMatcher(None, other, name).ratio()
        return ratio + (1 - ratio) / 2 if sorted(other) == sorted(name) else ratio

    return max(known, key=likeness, default=None)
