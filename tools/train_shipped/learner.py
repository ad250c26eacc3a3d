"""The losses of the shipped diffusion models on stored rows.

Symbols: z latents [B,4,h,w], B the batch, L the length of a prompt in tokens, K the width of a camera's vector.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.train_shipped.diffusion import Denoiser, blur, draw_noised, high_share
from tools.train_shipped.loop import FitConfig, autocast
from tools.train_shipped.rows import Batch

DROP_TEXT, DROP_CAMERA, BLURRED = 0.1, 0.15, 0.05  # shares of a batch of captions
DROP_EDIT = 0.05  # probability of dropping the instruction, the source, or both, each


@dataclass(frozen=True)
class Learner:
    """Constants of a step; `alphas_cumprod` and the `empty` prompt's tokens [L] are on the device."""

    denoiser: Denoiser
    alphas_cumprod: Tensor
    scaling: float
    empty: Tensor
    config: FitConfig

    def loss(self, z: Tensor, generator: torch.Generator, high: float, **condition: Tensor | None) -> Tensor:
        """The weighted velocity error of z scaled; `condition` are the arguments of the denoiser."""
        noised = draw_noised(z, self.alphas_cumprod, generator, high)
        z_t = noised.z_t.contiguous(memory_format=torch.channels_last)
        with autocast(self.config):
            predicted = self.denoiser(z_t, t=noised.t, **condition)
        return (noised.weight * noised.error(predicted)).mean()

    def text_loss(self, rows: Batch, generator: torch.Generator, progress: float) -> Tensor:
        """Loss of pictures under one of their captions, some blurred; texts and cameras are dropped independently."""
        chance, no_camera = _uniform(2, len(rows["modes"]), generator)
        modes, tokens = rows["modes"].float(), choose(rows["tokens"][:, :-1], generator)
        blurred = chance >= 1 - BLURRED
        modes = torch.where(blurred[:, None, None, None], blur(modes), modes)
        tokens = torch.where(blurred[:, None], rows["tokens"][:, -1].long(), tokens)
        tokens = torch.where((chance < DROP_TEXT)[:, None], self.empty, tokens)
        camera = rows["camera"] * (no_camera >= DROP_CAMERA)[:, None]
        shown = {"condition": None, "tokens": tokens, "camera": camera}
        return self.loss(self.scaling * modes, generator, high_share(progress), **shown)

    def edit_loss(self, rows: Batch, generator: torch.Generator, progress: float) -> Tensor:
        """Loss of edited pictures under source and instruction; one text in ten is the edited picture's caption."""
        drop, captioned = _uniform(2, len(rows["modes"]), generator)
        instruction, caption = rows["tokens"].long().unbind(1)
        tokens = torch.where((captioned < 0.1)[:, None], caption, instruction)
        both = (drop >= 2 * DROP_EDIT) & (drop < 3 * DROP_EDIT)
        no_text, no_image = (drop < DROP_EDIT) | both, ((drop >= DROP_EDIT) & (drop < 2 * DROP_EDIT)) | both
        tokens = torch.where(no_text[:, None], self.empty, tokens)
        source = rows["sources"].float().masked_fill(no_image[:, None, None, None], 0)
        return self.loss(self.scaling * rows["modes"].float(), generator, 0.0, condition=source, tokens=tokens)

    def part_loss(self, part: str, rows: Batch, generator: torch.Generator, progress: float) -> Tensor:
        """`text_loss` of "t2i", `edit_loss` of "ip2p"."""
        return (self.text_loss if part == "t2i" else self.edit_loss)(rows, generator, progress)


def _uniform(count: int, batch: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, batch, generator=generator, device=generator.device)


def choose(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Choose one of each row's sentences: [B,k,L] to [B,L]."""
    batch, count, length = tokens.shape
    pick = torch.randint(count, (batch, 1, 1), generator=generator, device=generator.device)
    return tokens.long().gather(1, pick.expand(batch, 1, length))[:, 0]
