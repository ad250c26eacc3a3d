"""Whether something fits into this machine's memory, asked before it is made."""

import contextlib
import os
from pathlib import Path

from csd3d.errors import InputError

SHARE = 0.8  # of the memory that there is; the rest is the system's and the program's own


CONTAINER = Path("/sys/fs/cgroup/memory.max")  # its limit in bytes, or "max"


def memory_bytes() -> int:
    """The memory of this machine, or of the container that this process is in, in bytes."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        found = min(found, int(CONTAINER.read_text()))
    return found


def size_text(count: float) -> str:
    """A number of bytes in words, in the unit that gives it digits: "1.5 GiB", "40 KiB"."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            value = count / 2**power
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
    return f"{count:.0f} bytes"


def check_fits(needed: float, what: str, lower: str = "lower them") -> None:
    """Raise InputError if `needed` bytes do not fit; `what` needs them, as "KEY 3 with OTHER 5: a step"."""
    if needed > SHARE * memory_bytes():
        there = f"takes about {size_text(needed)}, this machine has {size_text(memory_bytes())}"
        raise InputError(f"{what} {there}; {lower}")
