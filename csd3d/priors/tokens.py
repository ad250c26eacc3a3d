"""Latents as the tokens of a transformer, 2 x 2 latent pixels each, for models that append the source picture's tokens.

Symbols as in `prior`. A token's channels are in diffusers' order: the latent's channel, then its row and column.
"""

import torch.nn.functional as F
from torch import Tensor

from csd3d.errors import InputError
from csd3d.priors.autoencoder import BRANCHES, VaeCodec
from csd3d.priors.opening import ModelFolder, read_config
from csd3d.priors.prior import Options

PATCH = 2  # latent pixels along a token's side


class SourceTokens:
    """The source picture's z, whose tokens follow those of z_t; without a picture there are no more tokens."""

    branches = BRANCHES

    def encode(self, codec: VaeCodec, x: Tensor, micro_batch: int) -> Tensor:
        return codec.encode(x, None, micro_batch)

    def from_latent(self, codec: VaeCodec, z: Tensor) -> Tensor:
        return z

    def null(self, z_t: Tensor) -> None:
        return None


def pack(z: Tensor) -> Tensor:
    """The tokens [B, h/2 · w/2, 4C] of latents [B, C, h, w], row by row. ValueError for odd sides."""
    if z.shape[2] % PATCH or z.shape[3] % PATCH:
        raise ValueError(f"latents must have even sides, one token being 2x2 of them; got {tuple(z.shape)}")
    return F.pixel_unshuffle(z, PATCH).flatten(2).mT


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The latents [B, C, h, w] of their tokens, without those that follow; `size` = (h, w)."""
    rows, columns = (side // PATCH for side in size)
    return F.pixel_shuffle(tokens[:, : rows * columns].mT.unflatten(2, (rows, columns)), PATCH)


def check_packed_channels(folder: ModelFolder, latent: object) -> None:
    """Raise InputError, by the configs alone, unless the transformer takes tokens of a VAE of `latent` channels.

    FLUX's models for filling, depth and edges take more channels.
    """
    takes = read_config(folder, "transformer").get("in_channels", 64)
    if not isinstance(latent, int) or takes != PATCH**2 * latent:
        raise InputError(
            f"{folder}/transformer/config.json: in_channels {takes!r} does not suit a VAE of {latent!r} channels, "
            f"{PATCH**2} times as many would: models that take masks, depth or edges are not supported"
        )


def check_attention(folder: ModelFolder, options: Options) -> None:
    """Raise InputError for a way of computing attention that is for UNets."""
    if options.attention == "sliced":
        raise InputError(f"prior.attention: sliced is for UNets, {folder} holds a transformer; use auto or sdpa")


def check_options(folder: ModelFolder, options: Options) -> None:
    """Raise InputError for options that are for UNets, or for transformers of one input."""
    check_attention(folder, options)
    if options.runtime != "torch":
        raise InputError(f"prior.runtime: {options.runtime} cannot compute the transformer of {folder}; use torch")
