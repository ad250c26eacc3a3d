"""The command lines' parser: a mistake is told in one line, with the nearest name, and ends the program with 2."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from csd3d.errors import InputError, closest, error_line


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line without the usage; `hint` is added to those about unknown arguments."""

    hint = ""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{error_line(f'{message}; see {self.prog} --help')}\n")

    def print_help(self, file: TextIO | None = None) -> None:
        """Print the help by `show`, which has an answer to every kind of output."""
        if file is None:
            try:
                show(self.format_help().rstrip("\n"))
            except InputError as error:
                self.exit(2, f"{error_line(str(error))}\n")
        else:
            super().print_help(file)

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


def path_of(text: str) -> Path:
    """A path from the command line, as argparse's `type`: one that files can have and that can be written as UTF-8."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got nothing")  # it would be the current folder
    if not is_utf8(text):
        raise argparse.ArgumentTypeError(f"{text!r:.200} is not UTF-8; rename it")
    if max(len(part.encode()) for part in text.split("/")) > 255 or len(text.encode()) > 4000:
        raise argparse.ArgumentTypeError(f"{text[:40]}… cannot be a path: it is too long")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: there is no such user, whose home this would be in") from None


def is_utf8(text: str) -> bool:
    """Whether the bytes of a word of the command line are UTF-8; Python keeps others as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def check_new_file(path: Path | None, option: str) -> None:
    """Raise InputError unless a file can be written there, new or in place of another; nothing is written."""
    if path is None:
        return
    if not path.name or path.is_dir():
        raise InputError(f"{option}: {str(path)!r} is a folder; give the name of a file")
    place = path.absolute().parent.resolve()
    if (path.exists() and not path.is_file()) or place == Path("/dev") or place.is_relative_to("/proc"):
        # a file is written whole beside its place and then renamed to it, which would replace a pipe or a device
        raise InputError(f"{option}: {path} is a pipe or a device; give the name of a file")
    if not place.is_dir():
        raise InputError(f"{option}: {path.parent} is no folder; make it first, or choose another")
    if not os.access(place, os.W_OK):
        raise InputError(f"{option}: {path}: cannot be written ({path.parent} is read-only)")


def show(text: str) -> None:
    """Print a text; a reader that stops early, as in `csd3d methods | head`, is not an error.

    Characters that the output cannot show become "?". Raises InputError where it cannot be written, as to a full disk.
    """
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError as error:
            print(text.encode(error.encoding, "replace").decode(error.encoding), flush=True)
    except BrokenPipeError:
        _give_up_output()
    except OSError as error:
        _give_up_output()
        raise InputError(f"standard output: cannot be written ({error.strerror}); write it to another place") from None


def _give_up_output() -> None:
    """Let what is still to be printed go nowhere; Python flushes once more at its end, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
