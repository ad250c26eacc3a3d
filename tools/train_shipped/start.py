"""Open what a training of a shipped diffusion model starts from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from csd3d.errors import InputError
from csd3d.priors.opening import ModelFolder
from tools.train_shipped.diffusion import Denoiser, load_denoiser
from tools.train_shipped.ip2p import build_denoiser
from tools.train_shipped.rows import picture_size
from tools.train_shipped.t2i import camera_unet, text_unet

ASSETS = Path(__file__).parents[2] / "csd3d" / "assets"


@dataclass(frozen=True)
class Start:
    """What a training starts from: the networks of the pipeline folder `init`, or, of the editor, new ones of
    `channels` for the folders `vae` and `tokenizer`.

    The text-to-image model can start from an editor's folder. A folder that `gpu` wrote holds networks only; the VAE
    and the tokenizer are then the shipped ones.
    """

    init: Path
    vae: Path | None = None
    tokenizer: Path | None = None
    channels: tuple[int, ...] = (64, 128, 192)

    def __post_init__(self) -> None:
        if (self.vae is None) != (self.tokenizer is None):
            raise InputError("train ip2p: new networks need both --vae FOLDER and --tokenizer FOLDER")
        needed = [(self.vae, "config.json"), (self.tokenizer, "tokenizer_config.json")]
        if not self.vae:
            needed += [(self.init / part, "config.json") for part in ("unet", "text_encoder")]
        for folder, file in needed:
            if folder and not (folder / file).is_file():
                raise InputError(f"{folder / file}: missing; give a folder that a diffusers pipeline wrote")

    def home(self, part: str) -> Path:
        """The pipeline folder whose VAE and tokenizer are used: `init`, or of one with networks only the shipped."""
        return self.init if ModelFolder(self.init).has("vae") else ASSETS / part

    def vae_folder(self, part: str) -> Path:
        return self.vae or ModelFolder(self.home(part)).part("vae")

    def open(self, part: str) -> tuple[AutoencoderKL, CLIPTokenizer, Denoiser]:
        """The VAE, the tokenizer and the networks to train."""
        vae = AutoencoderKL.from_pretrained(self.vae_folder(part), torch_dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(self.tokenizer or self.home(part) / "tokenizer")
        if self.vae:
            side = vae.config.sample_size // picture_size(vae, 1)
            denoiser = build_denoiser(tokenizer, self.channels, side, vae.config.scaling_factor)
        else:
            denoiser = load_denoiser(self.init)
        if part == "t2i":
            denoiser.unet = camera_unet(text_unet(denoiser.unet))
        return vae, tokenizer, denoiser
