"""Output of a GPU run: networks in files of bounded size, a sheet of samples."""

import copy
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from csd3d.files import write_whole
from csd3d.priors.camera_embedding import camera_embedding
from tools.train_shipped.diffusion import Denoiser, noise_schedule
from tools.train_shipped.loop import autocast
from tools.train_shipped.sheet import save_sheet

if TYPE_CHECKING:
    from tools.train_shipped.learner import Learner
    from tools.train_shipped.rows import Batch, Encoder, Store

SHARD = "15MB"
STEPS, GUIDANCE = 20, 3.0
PROMPTS = (
    "a red chair with yellow stripes",
    "a blue mug with white checks, grey background",
    "a green duck with pink dots, on a plate, white background",
    "a yellow car, sky blue background",
)
EDITS = 18  # held-out edits on the sheet
CAMERAS = ((0, 15), (60, 15), (120, 15), (180, 15), (270, 15), (45, 60))  # azimuth, elevation in degrees


def export(model: Denoiser, out: Path) -> None:
    """Write both networks in fp16 for diffusers and transformers, no file over `SHARD`.

    Written elsewhere and moved in file by file, so that a run cut off here leaves the last whole ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = copy.deepcopy(model).half().cpu()
        model.unet.to(memory_format=torch.contiguous_format).save_pretrained(f"{folder}/unet", max_shard_size=SHARD)
        model.text_encoder.save_pretrained(f"{folder}/text_encoder")
        for source in sorted(Path(folder).glob("*/*")):
            target = out / source.relative_to(folder)
            write_whole(target, partial(shutil.copyfile, source))


@torch.no_grad()
def sample(
    learner: "Learner", model: Denoiser, tokens: Tensor, camera: Tensor | None, source: Tensor | None = None
) -> Tensor:
    """Latents [n,4,h,w], unscaled, of DDIM by classifier-free guidance; unguided rows have no text and no camera.

    `source` [n,4,h,w] is seen by both: the text alone is guided by. Every row starts from the same noise.
    """
    scheduler, count = noise_schedule(), len(tokens)
    scheduler.set_timesteps(STEPS)
    size = model.unet.config.sample_size
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0))
    z = noise.repeat(count, 1, 1, 1).to(tokens.device)
    tokens = torch.cat([learner.empty.expand_as(tokens), tokens])
    told = None if camera is None else torch.cat([torch.zeros_like(camera), camera])
    twice = None if source is None else source.repeat(2, 1, 1, 1)
    for t in scheduler.timesteps.tolist():
        with autocast(learner.config):
            levels = torch.full((2 * count,), t, device=z.device)
            null, full = model(z.repeat(2, 1, 1, 1), twice, levels, tokens, told).float().chunk(2)
        z = scheduler.step(null + GUIDANCE * (full - null), t, z).prev_sample
    return z / learner.scaling


@torch.no_grad()
def sheet(learner: "Learner", model: Denoiser, encoder: "Encoder", held: "Store", path: Path) -> None:
    """Write a PNG of samples: a row a prompt with all `CAMERAS`, or for the editor sources and edits."""
    if "sources" in held.fields:
        words, latents = _edits(learner, model, encoder, held.all())
    else:
        words, latents = PROMPTS, _views(learner, model, encoder)
    with autocast(learner.config):
        images = encoder.vae.decode(latents).sample
    images = (images.float().cpu() + 1) / 2
    save_sheet(path, list(zip(words, images.chunk(len(words)), strict=True)))


def _views(learner: "Learner", model: Denoiser, encoder: "Encoder") -> Tensor:
    """Latents of every prompt at every camera, the cameras of the first prompt first."""
    device = learner.empty.device
    azimuth, elevation = torch.tensor(CAMERAS * len(PROMPTS), device=device).float().unbind(1)
    camera = camera_embedding(azimuth, elevation, torch.full_like(azimuth, 4.0))
    texts = [[prompt] for prompt in PROMPTS for _ in CAMERAS]
    return sample(learner, model, encoder.tokens(texts)[:, 0].to(device).long(), camera)


def _edits(learner: "Learner", model: Denoiser, encoder: "Encoder", rows: "Batch") -> tuple[list[str], Tensor]:
    """Instructions, and the latents of held-out sources, each with its edit after it."""
    tokens, source = rows["tokens"][:EDITS, 0].long(), rows["sources"][:EDITS].float()
    edited = sample(learner, model, tokens, None, source)
    return encoder.tokenizer.batch_decode(tokens.cpu(), skip_special_tokens=True), torch.stack(
        [source, edited], 1
    ).flatten(0, 1)
