"""The command lines' parser: a mistake is told in one line, with the nearest name, and ends the program with 2."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from csd3d.errors import closest


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line without the usage; `hint` is added to those about unknown arguments."""

    hint = ""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help\n")

    def parse_all(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse options and values in any order; an unknown option is told with the nearest there is."""
        argv = sys.argv[1:] if argv is None else list(argv)
        options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        for word in argv:
            name = word.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in options):
                self.error(f"unrecognized argument {word}; did you mean {closest(name, options)}?{self._hint}")
        args, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint and f';{self._hint}'}")
        return args

    @property
    def _hint(self) -> str:
        return f" {self.hint}" if self.hint else ""


def show(text: str) -> None:
    """Print a text; a reader that stops early, as in `csd3d methods | head`, is not an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
