"""Footage as a prior works on it: at a size that suits the prior, as latents, and back to the footage's own pixels.

Symbols: F frames of H x W pixels; the working size (H', W'); z [F, C, h, w] their latents, float32 on the CPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.canvas.clip import Footage
from csd3d.canvas.detail import NEIGHBOURHOOD, restore_detail
from csd3d.engine.logs import progress
from csd3d.errors import InputError
from csd3d.media import MAX_PIXELS
from csd3d.priors import DiffusersPrior
from csd3d.priors.tiled import TiledVae

FRAMES_AT_ONCE = 16
PIXELS_AT_ONCE = 2**20


@dataclass
class Workspace:
    """The footage, the latents of its frames as they were, and how to come back from edited ones.

    `keep_detail`: see `restore_detail`; `inside` [H, W]: how much of each pixel may be edited, None for all.
    """

    footage: Footage
    size: tuple[int, int]
    codec: TiledVae
    z: Tensor
    keep_detail: bool = True
    inside: Tensor | None = None

    @torch.no_grad()
    def pictures(self, z: Tensor, indices: Sequence[int]) -> Tensor:
        """Frames `indices` of an edited canvas z [F, C, h, w], [n, 3, H, W] in [0, 1], in the footage's own pixels."""
        edited, source = self.decode(z, indices), self.footage.read(indices)
        if self.keep_detail:
            edited = self._restored(edited, self.decode(self.z, indices), source)
        return edited if self.inside is None else source + self.inside * (edited - source)

    @torch.no_grad()
    def decode(self, z: Tensor, indices: Sequence[int]) -> Tensor:
        """What the autoencoder makes of frames `indices` of a canvas, [n, 3, H, W] in [0, 1]."""
        decoded = self.codec.decode(z[list(indices)].to(self.codec.prior.device), self.size).cpu()
        return resize(decoded, self.footage.size)

    def chunks(self) -> Iterator[list[int]]:
        """All frames, so many at a time as are to be in memory."""
        return frame_chunks(self.footage)

    def _restored(self, *pictures: Tensor) -> Tensor:
        if not self.codec.wrap:
            return restore_detail(*(p.permute(0, 2, 3, 1) for p in pictures)).permute(0, 3, 1, 2)
        pad = min(NEIGHBOURHOOD // 2, self.footage.width)
        rolled = (F.pad(p, (pad, pad, 0, 0), mode="circular").permute(0, 2, 3, 1) for p in pictures)
        return restore_detail(*rolled).permute(0, 3, 1, 2)[..., pad:-pad]


@torch.no_grad()
def encode_footage(
    prior: DiffusersPrior, footage: Footage, size: tuple[int, int], wrap: bool, pixels: int | None
) -> Workspace:
    """Encodes all frames at a working size; `pixels`: see `TiledVae`."""
    codec = TiledVae(prior, pixels, wrap)
    z = None
    for indices in progress(frame_chunks(footage), "encode", total=len(list(frame_chunks(footage)))):
        part = codec.encode(resize(footage.read(indices), size).to(prior.device)).cpu()
        z = part.new_empty(footage.count, *part.shape[1:]) if z is None else z
        z[indices] = part
    return Workspace(footage, size, codec, z)


def frame_chunks(footage: Footage) -> Iterator[list[int]]:
    """All frames' numbers, so many at a time as are to be in memory."""
    count = max(1, min(FRAMES_AT_ONCE, PIXELS_AT_ONCE // (footage.height * footage.width)))
    return (list(range(i, min(i + count, footage.count))) for i in range(0, footage.count, count))


def working_size(footage: Footage, window: int, unit: int, wrap: bool) -> tuple[int, int]:
    """(H', W') for windows of `window` latent pixels, `unit` pixels each: the footage's own size where that is large.

    What would fit into one window is enlarged to fill it along its longer side; what is narrower than a window is
    enlarged until it is not, so that the prior sees objects at the size that it knows. Where it wraps around, W' is a
    whole number of latent pixels. Raises InputError where that would be more than `MAX_PIXELS`.
    """
    own, (short, long) = window * unit, sorted(footage.size)
    scale = own / long if long <= own else max(1, own / short)
    height, width = (max(unit, round(side * scale)) for side in footage.size)
    width = max(1, round(width / unit)) * unit if wrap else width
    if height * width > MAX_PIXELS:
        raise InputError(
            f"{footage.name}: {footage.width}x{footage.height} is too narrow: enlarged for a prior of {own} pixels it "
            f"would be {width}x{height}; crop it"
        )
    return height, width


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of another size, bicubic and antialiased."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
