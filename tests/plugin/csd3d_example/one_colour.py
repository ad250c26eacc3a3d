"""A family of models. This one needs no weights: the score of its pictures is a formula."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from csd3d.priors import Condition, Defaults, Prior, scaled_linear_alphas
from csd3d.priors.autoencoder import PixelCodec
from csd3d.priors.opening import ModelFolder
from csd3d.priors.prior import Options
from csd3d.priors.text import TextEncoder
from csd3d.registry import register

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "white": (1.0, 1.0, 1.0)}
GREY = (0.5, 0.5, 0.5)


@register("family", "one_colour", title="Pictures of one colour")
class OneColour:
    """Pictures of the colour that the prompt names, of grey where it names none; each pixel is N(μ, s²).

        ε(z_t; y) = σ_t (z_t − √ᾱ_t μ(y)) / (ᾱ_t s² + σ_t²)

    Its folder holds transformer/config.json alone, which says `spread`, s. Pixels are in [−1, 1].

        prior: {model: one_colour_model}
    """

    parts: Mapping[str, type] = {}

    @staticmethod
    def matches(folder: ModelFolder) -> bool:
        return folder.config("transformer").get("_class_name") == "OneColour"

    @staticmethod
    def load(folder: ModelFolder, options: Options) -> Prior:
        config = folder.config("transformer")
        tokenizers = {"tokenizer": str.split}
        return Prior(
            codec=PixelCodec(config["sample_size"]),
            unet=Spread(config["spread"]).to(options.device),
            text=TextEncoder(folder, tokenizers, embed, "one_colour", options.device, options.embedding_cache),
            alphas_cumprod=scaled_linear_alphas(),
            forward=forward,
            defaults=Defaults(guidance_scale=1.0, working_size=config["sample_size"]),
            options=options,
        )


class Spread(nn.Module):
    """s, as a network: called as diffusers' networks are, with a parameter that says on which device it is."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.tensor(spread))

    def forward(self, z_t: Tensor, mean: Tensor, alpha_bar: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        variance = alpha_bar * self.spread**2 + 1 - alpha_bar
        return ((1 - alpha_bar).sqrt() * (z_t - alpha_bar.sqrt() * mean) / variance,)


def embed(parts: Mapping[str, Any], prompt: str) -> dict[str, Tensor]:
    """The colour itself, a text of one token: [1, 3] in [−1, 1]."""
    words = parts["tokenizer"](prompt.lower())
    named = next((COLOURS[word] for word in words if word in COLOURS), GREY)
    return {"text": torch.tensor([named]) * 2 - 1}


def forward(network: Callable[..., Tensor], z_t: Tensor, t: Tensor, alpha_bar: Tensor, condition: Condition) -> Tensor:
    """ε of z_t [B, 3, h, w] at the noise levels ᾱ [B]."""
    return network(z_t, condition.text[:, 0, :, None, None], alpha_bar.view(-1, 1, 1, 1))
