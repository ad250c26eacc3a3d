"""Encode a clip to latents at a working size for the prior, and decode edited latents to the clip's size.

Symbols: F frames of H x W pixels; the working size (H', W'); z [F, C, h, w] their latents, float32 on the CPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.cameras import pixel_centres
from csd3d.canvas.clip import Clip
from csd3d.canvas.detail import restore_frames
from csd3d.engine.logs import progress
from csd3d.errors import InputError
from csd3d.media import MAX_PIXELS
from csd3d.priors import Prior
from csd3d.priors.tiled import TiledVae

SEEN = 0.5  # share of a latent pixel that must be valid for its flow to count


@dataclass(eq=False)
class Latents:
    """The latents z [F, C, h, w] of a clip, and how to decode edited ones.

    size: the working size (H', W').  codec: encodes and decodes at that size.  keep_detail: see `restore_detail`.
    inside [H, W]: how much of each pixel may be edited; None: all.
    """

    clip: Clip
    size: tuple[int, int]
    codec: TiledVae
    z: Tensor
    keep_detail: bool = True
    inside: Tensor | None = None

    @torch.no_grad()
    def decode(self, z: Tensor, indices: Sequence[int]) -> Tensor:
        """Decode frames `indices` of z [F, C, h, w] to [n, 3, H, W] in [0, 1]."""
        decoded = self.codec.decode(z[list(indices)].to(self.codec.prior.device), self.size).cpu()
        return resize(decoded, self.clip.size)

    def finish(self, decoded: Tensor, decoded_source: Tensor | None, source: Tensor) -> Tensor:
        """Decoded frames [n, 3, H, W] with the source's detail restored, and the source itself outside `inside`."""
        edited = decoded
        if self.keep_detail:
            edited = restore_frames(decoded, decoded_source, source, self.codec.wrap)
        return edited if self.inside is None else source + self.inside * (edited - source)

    @property
    def needs_source(self) -> bool:
        """Whether the decoded source is needed to finish or judge a frame."""
        return self.keep_detail or self.inside is not None


@torch.no_grad()
def encode_clip(prior: Prior, clip: Clip, size: tuple[int, int], wrap: bool, pixels: int | None) -> Latents:
    """Encode all frames at the working size `size`; `pixels`: see `TiledVae`."""
    codec = TiledVae(prior, pixels, wrap)
    z = None
    for indices in progress(clip.chunks(), "encode", total=len(list(clip.chunks()))):
        part = codec.encode(resize(clip.read(indices), size).to(prior.device)).cpu()
        z = part.new_empty(clip.count, *part.shape[1:]) if z is None else z
        z[indices] = part
    return Latents(clip, size, codec, z)


@dataclass(frozen=True)
class EditedFrame:
    """A frame edited by one method, pictures [3, H, W] in [0, 1].

    picture: the result.  decoded: its decoded latents.  decoded_source: the source's; None if not needed.
    """

    picture: Tensor
    decoded: Tensor
    decoded_source: Tensor | None


def edited_frames(edits: Mapping[str, tuple[Latents, Tensor]]) -> Iterator[tuple[int, Tensor, dict[str, EditedFrame]]]:
    """Yield every frame: its number, its source [3, H, W], and {name: the frame edited by that method}.

    `edits`: {name: (source latents, edited z)}, all of one clip, whose frames are read once. Methods with the same
    source latents share the decoded source.
    """
    clip = next(iter(edits.values()))[0].clip
    for indices in clip.chunks():
        source = clip.read(indices)
        decoded_sources: dict[int, Tensor] = {}
        done: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        for name, (latents, z) in edits.items():
            if latents.needs_source and id(latents) not in decoded_sources:
                decoded_sources[id(latents)] = latents.decode(latents.z, indices)
            decoded, decoded_source = latents.decode(z, indices), decoded_sources.get(id(latents))
            done[name] = (latents.finish(decoded, decoded_source, source), decoded, decoded_source)
        for i, number in enumerate(indices):
            frames = {
                name: EditedFrame(*(None if images is None else images[i] for images in parts))
                for name, parts in done.items()
            }
            yield number, source[i], frames


def working_size(clip: Clip, window: int, unit: int, wrap: bool, multiple: int | None = None) -> tuple[int, int]:
    """The working size (H', W') for windows of `window` latent pixels of `unit` pixels: the clip's own size if large.

    A clip that fits into one window is enlarged until its longer side fills the window; a narrower one until its
    shorter side does, so that objects have the size that the prior was trained on. No side is below `multiple`
    pixels (`unit` by default); with `wrap`, W' is a multiple of them. Raises InputError if enlarging gives more than
    `MAX_PIXELS`.
    """
    own, multiple, (short, long) = window * unit, multiple or unit, sorted(clip.size)
    scale = own / long if long <= own else max(1, own / short)
    height, width = (max(multiple, round(side * scale)) for side in clip.size)
    width = max(1, round(width / multiple)) * multiple if wrap else width
    if scale > 1 and height * width > MAX_PIXELS:
        raise InputError(
            f"{clip.name}: {clip.width}x{clip.height} is too narrow: enlarged for a prior of {own} pixels it "
            f"would be {width}x{height}; crop it"
        )
    return height, width


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images [B, 3, H, W] in [0, 1], bicubic and antialiased."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def pixel_grid(h: int, w: int) -> Tensor:
    """(x, y) of every pixel's centre, [h, w, 2]; the first pixel is at (0, 0)."""
    return pixel_centres(w, h).view(h, w, 2) - 0.5


def to_latent(flow: Tensor, valid: Tensor, size: tuple[int, int], unit: int) -> tuple[Tensor, Tensor]:
    """Reduce a flow [H, W, 2] in pixels to latent pixels of `unit` pixels a side, `size` = (h, w) of them.

    Return the flow [h, w, 2] in latent pixels, the mean over the valid pixels, and the valid share [h, w] of each
    latent pixel, 0 below `SEEN`. Padding of the autoencoder at the right and bottom counts as invalid.
    """
    height, width = (side * unit for side in size)
    weight = valid.to(flow)
    stack = torch.cat([flow * weight[..., None], weight[..., None]], -1).movedim(-1, 0)
    stack = F.pad(stack, (0, width - flow.shape[1], 0, height - flow.shape[0]))
    pooled = F.avg_pool2d(stack[None], unit)[0].movedim(0, -1)
    share = torch.where(pooled[..., 2] >= SEEN, pooled[..., 2], 0.0)
    return torch.where(share[..., None] > 0, pooled[..., :2] / pooled[..., 2:] / unit, 0.0), share
