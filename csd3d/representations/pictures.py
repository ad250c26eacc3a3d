"""Pictures as parameters, for text to image: latents of the prior or logits of pixels."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from csd3d.priors import Prior


class PictureParticles(nn.Module):
    """N pictures of S² pixels, S = `size`, in `space` "latent" or "pixel".

    They start from noise, or all from `source` [1, 3, S, S].
    """

    def __init__(
        self,
        prior: "Prior",
        count: int,
        size: int,
        space: str,
        generator: torch.Generator,
        source: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.space, self.size = space, size
        if source is None:
            shape = prior.latent_shape(size, size) if space == "latent" else (3, size, size)
            start = 0.1 * torch.randn(count, *shape, generator=generator)
        else:
            start = prior.encode(source) if space == "latent" else source.logit(1 / 256)
            start = start.repeat(count, 1, 1, 1)
        self.values = nn.Parameter(start.to(prior.device))

    def latents(self, prior: "Prior") -> Tensor:
        """z [N, C, h, w], differentiable."""
        return self.values if self.space == "latent" else prior.encode(self.values.sigmoid())

    def images(self, prior: "Prior") -> Tensor:
        """[N, 3, S, S] in [0, 1], differentiable."""
        if self.space == "pixel":
            return self.values.sigmoid()
        return prior.decode(self.values, (self.size, self.size)).clamp(0, 1)
