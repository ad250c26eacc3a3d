"""A network that is opened when it is first needed, so that the text encoders can be freed before.

Its files are checked at once, by their headers, so that a broken model is told before any work.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from csd3d.errors import InputError


class Later:
    """A network to be opened by `open`; until then there is its `outline`, without weights, and its `config`."""

    def __init__(self, outline: nn.Module, load: Callable[[], nn.Module]):
        self.outline, self.config = outline, outline.config
        self._load = load
        self._changes: list[Callable[[nn.Module], None]] = []

    def then(self, change: Callable[[nn.Module], None]) -> None:
        """Apply `change` to the network once it is open."""
        self._changes.append(change)

    def open(self) -> nn.Module:
        """The network."""
        network = self._load()
        for change in self._changes:
            change(network)
        return network


def without_weights(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers network of class `cls` on the meta device."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return cls.from_config(config)


def check_tensors(network: nn.Module, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise InputError unless tensors of these names and shapes make the whole `network`."""
    given: dict[str, Any] = dict(shapes)
    if hasattr(network, "_fix_state_dict_keys_on_load"):  # renames what diffusers called otherwise before 2023
        network._fix_state_dict_keys_on_load(given)
    needed = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if lacking := sorted(set(needed) - set(given)):
        raise InputError(f"{where}: its weights lack {len(lacking)} of the tensors, {lacking[0]} first")
    if wrong := next((name for name, shape in needed.items() if given[name] != shape), None):
        raise InputError(f"{where}: {wrong} has the shape {given[wrong]}, its config says {needed[wrong]}")
