"""Threads that do not change results: torch computes on one, whole parts of the work go to several.

torch splits a sum over its threads, so their number changes last bits, which grow to other pictures. In a `pinned` job
torch has one thread. The kernels of `custom_kernels`, whose results do not depend on their threads, have all; and so
have calls of a network on several rows, which `divided` cuts at places that depend on the number of rows alone.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from custom_kernels import native

Item = TypeVar("Item")
Result = TypeVar("Result")
FOUR_PARTS, TWO_PARTS = 32, 8  # rows from which a call is cut in that many; smaller parts cost more than they gain


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """While open, results do not depend on the number of threads; those that torch has now are used as told above."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    native.set_num_threads(before)
    try:
        yield
    finally:
        native.set_num_threads(None)
        torch.set_num_threads(before)


def release() -> None:
    """Give torch its threads back in a pinned job, whose results then depend on their number."""
    torch.set_num_threads(native.num_threads())
    native.set_num_threads(None)


def divided(rows: int, most: int) -> list[slice]:
    """Parts of `rows` rows, in order, each at most `most` rows: 1, 2 or at least 4 parts."""
    parts = 4 if rows >= FOUR_PARTS else 2 if rows >= TWO_PARTS else 1
    size = max(min(most, -(-rows // parts)), 1)
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """function(item) of every item in order; in a pinned job, and without gradients, several at a time."""
    count = min(native.num_threads(), len(items)) if native.is_set() else 1
    if count < 2 or torch.is_grad_enabled():
        return [function(item) for item in items]
    lower, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def apart(item: Item) -> Result:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=lower):  # settings of each thread
            return function(item)

    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(apart, items))
