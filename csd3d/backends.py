"""Whether the kernel backends that a config names can run on its device: checked before any work is done."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from csd3d.errors import InputError
from csd3d.schema import Chosen, join


def check_backends(config: Any, device: torch.device) -> None:
    """Call `check_backend(device)` of every part of a config that has it; a RuntimeError becomes an InputError.

    It names the key, and says how to install what is missing.
    """
    for key, part in _parts(config):
        check = getattr(part, "check_backend", None)
        if check is None:
            continue
        try:
            check(device)
        except RuntimeError as error:
            raise InputError(f"{join(key, 'backend')}={part.backend}: {error}") from None


def _parts(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every dataclass in a config, with its dotted key."""
    if isinstance(config, Chosen):
        yield from _parts(config.thing, key)
    elif isinstance(config, dict):
        for name, item in config.items():
            yield from _parts(item, join(key, str(name)))
    elif isinstance(config, (list, tuple)):
        for number, item in enumerate(config):
            yield from _parts(item, f"{key}[{number}]")
    elif dataclasses.is_dataclass(config):
        yield key, config
        for field in dataclasses.fields(config):
            yield from _parts(getattr(config, field.name), join(key, field.name))
