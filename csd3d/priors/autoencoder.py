"""Images to latents and back: through a VAE, or as small pictures for a pixel-space model.

Symbols as in `prior`, and: x [B, 3, H, W] in [−1, 1] float32, the images as networks take them. Every function of a
codec is differentiable, and sends at most `micro_batch` elements through a network at once, and no more pixels than
`VaeCodec.pixels_at_once`.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csd3d.threads import divided, in_threads

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

GRAPH_BYTES = 56  # measured, of a pixel and channel of the first level, to encode with a graph
LEAST_PIXELS, MOST_PIXELS = 2**18, 2**21  # at once, however wide or narrow the VAE is


BRANCHES = ("null", "image", "full")  # of an editing model's guidance: (∅, ∅), (x̃, ∅), (x̃, y)


class VaeCodec:
    """Latents of a VAE, z = (E(x) − shift_factor) · scaling_factor; SD3's and FLUX's VAEs have a shift_factor.

    Images of any size are padded at the right and bottom by reflection to whole multiples of `multiple` pixels (the
    VAE's factor times the denoiser's patch); `decode(z, size)` crops the padding.
    """

    def __init__(self, vae: "AutoencoderKL", patch: int = 1, slicing: bool = False):
        if slicing:  # the VAE takes one image at a time
            vae.enable_slicing()
        self.vae = vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.channels = vae.config.latent_channels
        self.downscale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple = self.downscale * patch
        self.scale, self.shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0

    @property
    def width(self) -> int:
        """Channels of the first level."""
        return self.vae.config.block_out_channels[0]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of `height` x `width` pixels, padding included."""
        h, w = (-(-side // self.multiple) * self.multiple // self.downscale for side in (height, width))
        return self.channels, h, w

    def encode(self, x: Tensor, generator: torch.Generator | None, micro_batch: int) -> Tensor:
        """z of images: the posterior's mode, or a sample with a generator. ValueError for too small images."""
        posterior = self._posterior(self.pad(x), micro_batch)
        z = posterior.mode() if generator is None else posterior.sample(generator)
        return (z - self.shift) * self.scale

    def encode_condition(self, x: Tensor, micro_batch: int) -> Tensor:
        """The posterior's mode, not scaled."""
        return self._posterior(self.pad(x), micro_batch).mode()

    def unscaled(self, z: Tensor) -> Tensor:
        """Latents in the VAE's own scale."""
        return z / self.scale + self.shift

    def decode(self, z: Tensor, size: tuple[int, int] | None, micro_batch: int) -> Tensor:
        """x of latents, cropped to `size` if given; ValueError for a `size` larger than the decoded images."""
        (x,) = self._in_chunks(self._decoded, self.unscaled(z), micro_batch, self.downscale)
        return x.float() if size is None else _crop(x.float(), size)

    def features(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the encoder: `conv_in`, then each down block."""
        return list(self._in_chunks(self._maps, x, len(x), 1))

    def pixels_at_once(self, gradient: bool) -> int:
        """Most pixels that go through the VAE at once; a larger picture goes alone.

        Activations take about 20 bytes a pixel and channel of the first level, and four times that with a graph:
        Stable Diffusion's VAE needs 1.6 GiB for the 2^19 pixels that it may take, and 3.3 GiB for 2^18 with a graph.
        """
        return min(MOST_PIXELS, max(LEAST_PIXELS, 2 ** (25 if gradient else 26) // self.width))

    def graph_bytes(self, height: int, width: int) -> int:
        """About the memory that it takes to encode one picture of this size, differentiably; others wait for it."""
        return GRAPH_BYTES * self.width * height * width

    def _in_chunks(
        self, run: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, most: int, unit: int
    ) -> tuple[Tensor, ...]:
        """`run` of x [B, C, h, w] in chunks of at most `most` elements; a pixel of x is `unit` pixels wide.

        With a graph, the backward pass computes the activations of each chunk again: only one chunk's are in memory.
        """
        graph = torch.is_grad_enabled() and x.requires_grad
        count = self.pixels_at_once(graph) // (x.shape[-2] * x.shape[-1] * unit**2)
        chunks = [x[rows] for rows in divided(len(x), max(1, min(most, count)))]
        if graph and len(chunks) > 1:
            found = [checkpoint(run, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        else:
            together = len(x) <= count  # all may be in memory at once
            found = in_threads(run, chunks) if together else [run(chunk) for chunk in chunks]
        return found[0] if len(found) == 1 else tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _decoded(self, z: Tensor) -> tuple[Tensor]:
        return (self.vae.decode(z, return_dict=False)[0],)

    def _parameters(self, x: Tensor) -> tuple[Tensor]:
        return (self.vae.encode(x).latent_dist.parameters,)

    def _maps(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = [self.vae.encoder.conv_in(x)]
        for block in self.vae.encoder.down_blocks:
            maps.append(block(maps[-1]))
        return tuple(maps)

    def _posterior(self, x: Tensor, micro_batch: int) -> "DiagonalGaussianDistribution":
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        (parameters,) = self._in_chunks(self._parameters, x, micro_batch, 1)
        return DiagonalGaussianDistribution(parameters.float())

    def pad(self, x: Tensor) -> Tensor:
        """Images padded to whole multiples; ValueError for images smaller than one."""
        height, width = x.shape[-2:]
        if min(height, width) < self.multiple:
            raise ValueError(f"images must be at least {self.multiple} pixels a side, got {height}x{width}")
        if height % self.multiple == 0 and width % self.multiple == 0:
            return x
        return F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="reflect")


class SourcePicture(Protocol):
    """How an editing model takes its source picture; `UnscaledLatent` is InstructPix2Pix's.

    encode(codec, x, micro_batch): the condition of images x in [−1, 1].  from_latent(codec, z): the condition of images
    with a known z.  null(z_t): the null condition; None where the model then takes no image at all.
    branches: those of `Prior.edit_conditions` that the model has; `null` raises InputError for a model without "null".
    """

    branches: tuple[str, ...]

    def encode(self, codec: VaeCodec, x: Tensor, micro_batch: int) -> Tensor: ...

    def from_latent(self, codec: VaeCodec, z: Tensor) -> Tensor: ...

    def null(self, z_t: Tensor) -> Tensor | None: ...


class UnscaledLatent:
    """InstructPix2Pix's source picture: the posterior's unscaled mode, concatenated to z_t as more channels.

    The null image is a zero latent (arXiv 2211.09800, section 3.2.1).
    """

    branches = BRANCHES

    def encode(self, codec: VaeCodec, x: Tensor, micro_batch: int) -> Tensor:
        return codec.encode_condition(x, micro_batch)

    def from_latent(self, codec: VaeCodec, z: Tensor) -> Tensor:
        return codec.unscaled(z)

    def null(self, z_t: Tensor) -> Tensor:
        return torch.zeros_like(z_t)


class PixelCodec:
    """z is the picture itself in [−1, 1], its shorter side resized to `sample_size` pixels (DeepFloyd IF's stage I).

    Sides are rounded to the nearest multiple of `multiple`, the UNet's factor. Resizing is bilinear and antialiased in
    both directions.
    """

    def __init__(self, sample_size: int, multiple: int = 1):
        self.channels, self.sample_size, self.multiple = 3, sample_size, multiple

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(3, h, w) that a picture of `height` x `width` pixels is resized to."""
        scale = self.sample_size / min(height, width)
        units = (math.floor(side * scale / self.multiple + 0.5) for side in (height, width))
        return self.channels, *(max(1, unit) * self.multiple for unit in units)

    def encode(self, x: Tensor, generator: torch.Generator | None, micro_batch: int) -> Tensor:
        """The resized pictures; the generator is not used, because there is no posterior."""
        return _resize(x, self.latent_shape(*x.shape[-2:])[1:])

    def graph_bytes(self, height: int, width: int) -> int:
        """See `VaeCodec.graph_bytes`; resizing takes hardly any."""
        return 0

    def decode(self, z: Tensor, size: tuple[int, int] | None, micro_batch: int) -> Tensor:
        """The pictures, resized to `size` if given."""
        return z if size is None else _resize(z, size)

    def features(self, x: Tensor) -> list[Tensor]:
        raise ValueError(
            "a pixel-space prior has no VAE, so no features to compare by: use LPIPS (csd3d.priors.load_lpips)"
        )


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)


def _crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    if height > images.shape[-2] or width > images.shape[-1]:
        raise ValueError(f"size {height}x{width} is larger than the {images.shape[-2]}x{images.shape[-1]} decoded")
    return images[..., :height, :width]
