"""Training of the shipped diffusion models on streamed rows, on a CPU and for many hours.

`t2i`, the text-to-image model, is told the camera in most rows, and half of its pictures have no plate; `ip2p`, the
InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800), learns edits. Both learn UNet and text encoder; the VAE stays as
it is. Interrupted at any moment, the same command goes on. On a GPU `tools.train_shipped.gpu` trains the same losses on
the same rows, by the clock.
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from torch import Tensor

from csd3d.errors import InputError
from tools.train_shipped.diffusion import for_training, noise_schedule, save_pipeline
from tools.train_shipped.feed import Feed, FeedConfig
from tools.train_shipped.held_out import judge_folders
from tools.train_shipped.learner import Learner
from tools.train_shipped.loop import FitConfig, Trainer, append_line, fit, process
from tools.train_shipped.rows import Encoder, picture_size
from tools.train_shipped.start import ASSETS, Start

PIPELINES = {"t2i": StableDiffusionPipeline, "ip2p": StableDiffusionInstructPix2PixPipeline}


def train_denoiser(part: str, config: FitConfig, rows: FeedConfig, start: Start, out: Path, held_out: int) -> None:
    """Train "t2i" or "ip2p"; the whole pipeline, averaged weights in fp16, goes to `out` at every checkpoint.

    At the end the errors on `held_out` rows are held against the shipped model's and written to log.jsonl.
    """
    vae, tokenizer, denoiser = start.open(part)
    for_training(denoiser).unet.to(memory_format=torch.channels_last)
    encoder = Encoder(vae, tokenizer, config)
    size = picture_size(vae, denoiser.unet.config.sample_size)
    alphas_cumprod = noise_schedule().alphas_cumprod.to(config.device)
    learner = Learner(denoiser, alphas_cumprod, vae.config.scaling_factor, encoder.empty, config)
    with Feed(part, encoder, size, config.seed + 1_000_003 * process(), rows) as feed:
        trainer = Trainer(denoiser, config, feed)

        def loss_fn(generator: torch.Generator, progress: float) -> dict[str, Tensor]:
            drawn = feed.draw(config.batch, generator)
            return {"loss": learner.part_loss(part, drawn, generator, progress)}

        def export() -> None:
            trained = trainer.ema_model()
            trained.unet.to(memory_format=torch.contiguous_format)
            save_pipeline(PIPELINES[part], trained.unet, trained.text_encoder, tokenizer, start.vae_folder(part), out)

        fit(trainer, loss_fn, export)
    if held_out and trainer.progress >= 1 and not process():
        try:
            line = {"step": trainer.step, "figures": judge_folders(part, out, ASSETS / part, held_out)}
        except InputError as error:  # new networks may have another tokenizer, say
            print(f"no held-out figures: {error}", flush=True)
        else:
            append_line(config.work, line)
