"""Random pictures to stand behind renders, so that nothing of an asset can hide in its background.

DreamFields (arXiv 2112.01455), section 3.3: noise, chequerboards and random waves, blurred.
"""

import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor

SQUARES = 8  # of a chequerboard, along a side
MOST_BLUR = 10 / 168  # standard deviation of the blur as a share of the side: the authors' 10 pixels of 168
DECAY = 1.5  # the amplitude of a wave falls with its frequency to this power


def textured(count: int, side: int, generator: torch.Generator) -> Tensor:
    """`count` backgrounds [count, 3, side, side] in [0, 1], each noise, a chequerboard or waves; drawn on the CPU."""
    return torch.stack([_one(side, generator) for _ in range(count)])


def _one(side: int, generator: torch.Generator) -> Tensor:
    kind = int(torch.randint(3, (), generator=generator))
    made = (_noise, _chequerboard, _waves)[kind](side, generator)
    sigma = MOST_BLUR * side * torch.rand((), generator=generator).item()
    width = 2 * min(int(3 * sigma), side - 1) + 1
    return gaussian_blur2d(made[None], (width, width), (sigma, sigma))[0] if width > 1 else made


def _noise(side: int, generator: torch.Generator) -> Tensor:
    return torch.rand(3, side, side, generator=generator)


def _chequerboard(side: int, generator: torch.Generator) -> Tensor:
    first, second = torch.rand(2, 3, 1, 1, generator=generator)
    square = torch.arange(side) * SQUARES // side
    return torch.where((square[:, None] + square) % 2 == 0, first, second)


def _waves(side: int, generator: torch.Generator) -> Tensor:
    """White noise with its spectrum divided by a power of the frequency, stretched to [0, 1] in each channel."""
    white = torch.randn(3, side, side, generator=generator)
    frequency = (torch.fft.fftfreq(side)[:, None].square() + torch.fft.rfftfreq(side).square()).sqrt()
    smooth = torch.fft.irfft2(torch.fft.rfft2(white) / frequency.clamp(min=1 / side) ** DECAY, s=(side, side))
    low, high = smooth.amin((1, 2), keepdim=True), smooth.amax((1, 2), keepdim=True)
    return (smooth - low) / (high - low).clamp(min=1e-6)
