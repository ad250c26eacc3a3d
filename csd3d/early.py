"""Warnings that are given before a run has its log: kept, so that they can be told in it."""

import contextlib
import logging
from collections.abc import Iterator

logger = logging.getLogger("csd3d")


@contextlib.contextmanager
def kept_warnings() -> Iterator[list[str]]:
    """Keep the warnings that are given inside, in the list; after an error they are told at once."""
    kept: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        kept.append(record.getMessage())
        return False

    logger.addFilter(keep)
    try:
        yield kept
    except BaseException:
        logger.removeFilter(keep)
        for line in kept:
            logger.warning("%s", line)
        raise
    finally:
        logger.removeFilter(keep)
