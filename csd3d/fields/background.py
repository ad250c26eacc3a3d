"""The background: the colour of rays that leave the scene."""

import torch
from torch import Tensor, nn

from csd3d.errors import InputError
from csd3d.fields.encoding import mlp, spherical_harmonics

_COLOURS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}
_SH_DEGREE = 4
_HIDDEN = 32


class Background(nn.Module):
    """Colour by direction: a small network on spherical harmonics (`learned`), or constant: `white`, `black`, or a
    colour, rgb in [0, 1]."""

    def __init__(
        self, kind: str | tuple[float, float, float] = "learned", generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if isinstance(kind, str) and kind != "learned" and kind not in _COLOURS:
            raise InputError(f"background {kind!r} is unknown: choose one of learned, {', '.join(_COLOURS)}")
        self.colour = _COLOURS.get(kind, kind)
        self.net = mlp([_SH_DEGREE**2, _HIDDEN, 3], generator) if kind == "learned" else None

    def forward(self, directions: Tensor) -> Tensor:
        """directions [R, 3] of unit length -> rgb [R, 3] in [0, 1]."""
        if self.net is None:
            return directions.new_tensor(self.colour).expand_as(directions)
        return torch.sigmoid(self.net(spherical_harmonics(directions, _SH_DEGREE)))
