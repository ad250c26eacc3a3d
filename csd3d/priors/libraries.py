"""Calling diffusers and transformers: quietly, and with their errors in one line.

Both take seconds to import, so they are imported where a model is opened.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from csd3d.errors import InputError

# what a network raises whose config or weights do not fit; a lack of memory, told otherwise, is a RuntimeError too
MISFITS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


def opened(path: Path, load: Callable[[], Any]) -> Any:
    """The result of `load`; any error but a lack of memory becomes an InputError that names `path`."""
    try:
        return load()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a broken file can raise the errors of a dozen libraries
        raise InputError(f"{path}: could not be opened ({one_line(error)})") from None


def one_line(error: Exception) -> str:
    """An error in at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars, tables and errors of the loaders: what matters is checked here, and told in a line."""
    import diffusers
    import transformers

    logs = (transformers.utils.logging, diffusers.utils.logging)
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity(logging.CRITICAL)
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level, bars in before:
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()
