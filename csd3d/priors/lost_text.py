"""The text of prompts that a text encoder does not take: what is cut off, and characters that it does not know.

It is collected while several prompts are embedded, and told in one warning for all of them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from csd3d.errors import short

logger = logging.getLogger("csd3d")


@dataclass(frozen=True)
class Lost:
    """What one text encoder loses of one prompt."""

    prompt: str
    limit: int  # most tokens that the encoder takes; 0: nothing is cut off, but it holds unknown characters
    kept: tuple[int, ...] = ()  # tokens before the cut
    cut: str = ""  # the text behind it


_found: ContextVar[list[Lost] | None] = ContextVar("lost_text", default=None)


@contextmanager
def told_once() -> Iterator[None]:
    """Warn of the text that is lost inside at the end, once for all prompts of an encoder."""
    found: list[Lost] = []
    token = _found.set(found)
    try:
        yield
    finally:
        _found.reset(token)
    tell(found)


def note_lost_text(tokenizer: Any, prompt: str, limit: int) -> None:
    """Note what a text encoder of `limit` tokens loses of a prompt; outside `told_once` it is told at once."""
    ids = tokenizer(prompt, verbose=False).input_ids
    lost = []
    if len(ids) > limit:
        lost.append(Lost(prompt, limit, tuple(ids[: limit - 1]), tokenizer.decode(ids[limit - 1 : -1])))
    if tokenizer.unk_token_id in ids[:-1]:
        lost.append(Lost(prompt, 0))
    if (found := _found.get()) is None:
        tell(lost)
    else:
        found += lost


def tell(lost: list[Lost]) -> None:
    """Warn of lost text in one line for each limit."""
    for limit in dict.fromkeys(one.limit for one in lost):
        these = [one for one in lost if one.limit == limit]
        count, first = len(these), these[0]
        prompt = repr(short(first.prompt))
        are = f"prompt {prompt} is" if count == 1 else f"{count} prompts, as {prompt}, are"
        if not limit:
            logger.warning("%s with characters that the text encoder's vocabulary lacks", are)
            continue
        different = len({one.kept for one in these})
        same = f"; without it they are only {different}, so the words for the view or the background may be lost"
        end = f"{same if different < count else ''}; shorten the prompt"
        cut = short(first.cut)
        logger.warning("%s longer than the text encoder takes (%d tokens): cut off %r%s", are, limit, cut, end)
