"""Pictures of any size through a prior's autoencoder, in bounded memory and without seams.

A picture of at most `pixels` is processed whole. A larger one is cut into tiles that overlap by the receptive field of
the network, and only the middle of each tile is kept. Tiles end at the picture's borders, so padding acts as it would
on the whole picture. Two kinds of layers look at all pixels at once and need care:

- GroupNorm, which Qwen's autoencoder has not. If each tile normalised itself, tiles would differ in tint. Every
  GroupNorm uses one mean and variance for all tiles, measured on `samples` tiles together, over their kept parts. If
  these are all tiles, the result equals that of the whole picture up to rounding. Otherwise the statistics are
  estimates from evenly spread tiles; they are the same everywhere, so there are no seams.
- Attention in the middle block, in Stable Diffusion's autoencoders but not in the shipped one: it stays within a tile.

Lengths are in latent pixels, each `downscale` pixels of the picture.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csd3d.priors.prior import Prior

Statistics = dict[nn.GroupNorm, tuple[Tensor, Tensor]]  # mean and variance of every channel
Network = Callable[[Tensor], Tensor]


class TiledVae:
    """Encodes and decodes batches of pictures of one size; `wrap`: the right border continues at the left.

    `pixels`: most pixels at once, None for a number by the autoencoder's width; larger pictures are cut into tiles of
    `tile` pixels, of which `samples` are measured together. Raises ValueError for a prior without an autoencoder.
    """

    def __init__(
        self,
        prior: Prior,
        pixels: int | None = None,
        wrap: bool = False,
        *,
        tile: int | None = None,
        samples: int = 4,
    ):
        if not hasattr(prior.codec, "vae"):
            raise ValueError("this prior works on pixels: it has no autoencoder to tile")
        self.prior, self.wrap, self.samples = prior, wrap, samples
        self.pixels = pixels or min(2**21, max(2**20, 2**25 // _sizes(prior.vae)[2]))
        self.tile = tile or self.pixels // samples
        self.unit, self.multiple = prior.codec.downscale, prior.codec.multiple

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """z [B, C, h, w] of images [B, 3, H, W] in [0, 1], padded by reflection to whole latent pixels.

        ValueError where pictures wrap around and their width is not a whole number of latent pixels.
        """
        if self.wrap and images.shape[-1] % self.multiple:
            raise ValueError(f"a picture that wraps around must be a multiple of {self.multiple} wide: {images.shape}")
        if whole := self._whole(*images.shape[-2:]):
            return torch.cat([self.prior.encode(part) for part in images.split(whole)])
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple), mode="reflect")
        vae = self.prior.vae
        measure, reach = (lambda x: vae.encoder(x * 2 - 1)), encoder_reach(vae)
        return torch.stack([self._tiled(x, vae.encoder, measure, self.prior.encode, reach, self.unit) for x in images])

    @torch.no_grad()
    def decode(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of z [B, C, h, w], cropped to `size`."""
        if whole := self._whole(z.shape[-2] * self.unit, z.shape[-1] * self.unit):
            return torch.cat([self.prior.decode(part, size) for part in z.split(whole)])
        vae = self.prior.vae

        def measure(part: Tensor) -> Tensor:
            inner = self.prior.codec.unscaled(part)
            return vae.decoder(inner if vae.post_quant_conv is None else vae.post_quant_conv(inner))

        parts = vae.decoder, measure, self.prior.decode, decoder_reach(vae), 1
        return torch.stack([self._tiled(one, *parts)[:, : size[0], : size[1]] for one in z])

    def _whole(self, height: int, width: int) -> int:
        """How many whole pictures are processed at once; 0: they need tiles."""
        return 0 if self.wrap else self.pixels // (height * width)

    def _tiled(self, x: Tensor, network: nn.Module, measure: Network, run: Network, reach: int, unit: int) -> Tensor:
        """`run` of x [C, H, W] tile by tile; `unit` of its pixels are a latent pixel.

        `measure` sends tiles through `network` to measure its norms; `reach` is the network's receptive field.
        """
        x = x.to(self.prior.device, torch.float32)
        height, width = (side // unit for side in x.shape[1:])
        rows, columns = self._split(height, width, reach)
        tiles = list(product(rows, columns))
        whole = None
        with shared_norms(network) as norms:
            sample = [tiles[int((i + 0.5) * len(tiles) / self.samples)] for i in range(self.samples)]
            sample = list(dict.fromkeys(sample if len(tiles) > self.samples else tiles))
            kept = [(row.kept, column.kept) for row, column in sample]
            if norms.used:
                with norms.measuring(kept, (rows[0].size, columns[0].size)):
                    measure(torch.stack([_cut(x, row, column, unit) for row, column in sample]))
            for row, column in tiles:
                tile = run(_cut(x, row, column, unit)[None])[0]
                scale = tile.shape[1] // row.size
                if whole is None:
                    whole = tile.new_empty(len(tile), height * scale, width * scale)
                inner = tile[:, _times(row.kept, scale), _times(column.kept, scale)]
                whole[:, _times(row.target, scale), _times(column.target, scale)] = inner
        return whole

    def _split(self, height: int, width: int, reach: int) -> tuple[list["Tile"], list["Tile"]]:
        """Tiles along both sides, of at most `tile` pixels; whole multiples, as the codec would pad others."""
        area, whole = max(16, self.tile // self.unit**2), self.multiple // self.unit
        tall = min(height, max(math.isqrt(area), area // width))
        tall -= tall % whole
        wide = area // tall // whole * whole
        return split_side(height, tall, reach, False), split_side(width, wide, reach, self.wrap)


@dataclass(frozen=True)
class Tile:
    """Along one side: `size` latent pixels from `start`; positions `begin` to `end` of the side are kept.

    On a side of `length` that wraps around, `start` may be negative and the tile may cross the border.
    """

    start: int
    size: int
    begin: int
    end: int
    length: int

    @property
    def kept(self) -> slice:
        """The kept part, as positions in the tile."""
        return slice(self.begin - self.start, self.end - self.start)

    @property
    def target(self) -> slice:
        """The kept part, as positions on the side."""
        return slice(self.begin, self.end)


def split_side(length: int, size: int, reach: int, wrap: bool) -> list[Tile]:
    """Tiles of one size ≤ `size` that keep every pixel once, with `reach` pixels around it unless the side ends there.

    The reach is at most a quarter of a tile.
    """
    if wrap:
        margin = min(reach, size // 4)
        count = math.ceil(length / (size - 2 * margin))
        cuts = [round(i * length / count) for i in range(count + 1)]
        size = max(end - begin for begin, end in pairwise(cuts)) + 2 * margin
        return [Tile(cuts[i] - margin, size, cuts[i], cuts[i + 1], length) for i in range(count)]
    if length <= size:
        return [Tile(0, length, 0, length, length)]
    steps = math.ceil((length - size) / (size - 2 * min(reach, size // 4)))
    starts = [round(i * (length - size) / steps) for i in range(steps + 1)]
    middles = [(left + size + right) // 2 for left, right in pairwise(starts)]
    ends = zip(starts, [0, *middles], [*middles, length], strict=True)
    return [Tile(start, size, begin, end, length) for start, begin, end in ends]


def _sizes(vae: nn.Module) -> tuple[int, int, int]:
    """Levels, blocks in a level of the encoder, and channels of the first, of a VAE of pictures or Qwen's of videos."""
    config = vae.config
    if hasattr(config, "dim_mult"):
        return len(config.dim_mult), config.num_res_blocks, config.base_dim
    return len(config.block_out_channels), config.layers_per_block, config.block_out_channels[0]


def encoder_reach(vae: nn.Module) -> int:
    """Receptive field of the encoder in latent pixels; every 3×3 convolution adds one pixel of its level."""
    levels, layers, _ = _sizes(vae)
    blocks = 2 * layers
    pixels = 1 + sum(2**i * blocks for i in range(levels)) + sum(2 * 2**i for i in range(levels - 1))
    return math.ceil(pixels / 2 ** (levels - 1)) + 4 + 1


def decoder_reach(vae: nn.Module) -> int:
    """Receptive field of the decoder in latent pixels."""
    levels, layers, _ = _sizes(vae)
    blocks = 2 * (layers + 1)
    reach = sum(blocks / 2**i for i in range(levels)) + sum(1 / 2**i for i in range(1, levels))
    return math.ceil(1 + 4 + reach + 1 / 2 ** (levels - 1))


class SharedNorms:
    """One mean and variance for each GroupNorm of a network, whatever its input."""

    def __init__(self) -> None:
        self.statistics: Statistics = {}
        self.used = True  # whether the network has any
        self.kept: Sequence[tuple[slice, slice]] = ()
        self.size = (0, 0)

    @contextmanager
    def measuring(self, kept: Sequence[tuple[slice, slice]], size: tuple[int, int]) -> Iterator[None]:
        """Calls inside the block set the statistics: tiles of `size`, pooled over the `kept` part of each."""
        self.kept, self.size = kept, size
        try:
            yield
        finally:
            self.kept = ()

    def forward(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """Replaces norm.forward for x [B, C, ...]."""
        if self.kept:
            self.statistics[norm] = self._measure(norm, x)
        mean, variance = self.statistics[norm]
        return F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)

    def _measure(self, norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group over tiles x [N, C, ...], repeated for its channels [C]."""
        scale = math.sqrt(x[0, 0].numel() / (self.size[0] * self.size[1]))  # attention flattens the pixels
        height, width = (round(side * scale) for side in self.size)
        tiles = x.float().reshape(len(x), norm.num_groups, -1, height, width)
        parts = zip(tiles, self.kept, strict=True)
        pooled = torch.cat(
            [t[..., _times(row, scale), _times(column, scale)].flatten(1) for t, (row, column) in parts], 1
        )
        each = x.shape[1] // norm.num_groups
        variance, mean = torch.var_mean(pooled, 1, correction=0)
        return mean.repeat_interleave(each), variance.repeat_interleave(each)


@contextmanager
def shared_norms(network: nn.Module) -> Iterator[SharedNorms]:
    """Let a network's GroupNorms use the statistics of a `SharedNorms` inside the block."""
    norms, modules = SharedNorms(), [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    norms.used = bool(modules)
    try:
        for module in modules:
            module.forward = partial(norms.forward, module)
        yield norms
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _times(part: slice, scale: float) -> slice:
    return slice(round(part.start * scale), round(part.stop * scale))


def _cut(x: Tensor, row: Tile, column: Tile, unit: int) -> Tensor:
    """The tile of x [C, H, W]; `unit` of its pixels are a latent pixel."""
    rows, columns = (
        torch.arange(tile.start * unit, (tile.start + tile.size) * unit) % (tile.length * unit)
        for tile in (row, column)
    )
    return x[:, rows[:, None].to(x.device), columns.to(x.device)]
