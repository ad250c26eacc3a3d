"""Whether something fits into this machine's memory, asked before it is made."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from csd3d.errors import InputError

if TYPE_CHECKING:
    import torch

SHARE = 0.8  # of the memory that there is; the rest is the system's and the program's own


CONTAINER = Path("/sys/fs/cgroup/memory.max")  # its limit in bytes, or "max"


def memory_bytes() -> int:
    """The memory of this machine, or of the container that this process is in, in bytes."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        found = min(found, int(CONTAINER.read_text()))
    return found


def card_bytes(device: "torch.device") -> int:
    """The memory of a graphics card, in bytes."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory


def size_text(count: float) -> str:
    """A number of bytes in words, in the unit that gives it digits: "1.5 GiB", "40 KiB"."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            value = count / 2**power
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
    return f"{count:.0f} bytes"


def check_fits(needed: float, what: str, lower: str = "lower them", device: "torch.device | None" = None) -> None:
    """Raise InputError if `needed` bytes do not fit; `what` needs them, as "KEY 3 with OTHER 5: a step".

    device: where they are needed; None: in this machine's own memory.
    """
    on_card = device is not None and device.type == "cuda"
    have = card_bytes(device) if on_card else memory_bytes()
    if needed > SHARE * have:
        place = "this card" if on_card else "this machine"
        there = f"takes about {size_text(needed)}, {place} has {size_text(have)}"
        raise InputError(f"{what} {there}; {lower}")
