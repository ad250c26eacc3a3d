"""Errors of the shipped diffusion models on held-out rows, and `judge-rows`, which says whether to ship a new one.

The error is the unweighted mean square of the velocity, over noise levels that are the same for every model. The rows
are the same in every run (`stream.held_out_rows`).
"""

import argparse
import json
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from csd3d.errors import InputError
from csd3d.files import write_text
from csd3d.priors.opening import ModelFolder
from tools.train_shipped.diffusion import Denoiser, draw_noised, for_training, load_denoiser, noise_schedule
from tools.train_shipped.learner import Learner
from tools.train_shipped.loop import FitConfig, autocast
from tools.train_shipped.rows import Batch, Encoder, Store, picture_size
from tools.train_shipped.start import ASSETS
from tools.train_shipped.stream import CHUNK, held_out_rows
from tools.train_shipped.vae import fingerprint

DRAWS = 4  # noise levels per held-out row
CAMERA = ", camera"  # follows a model's name where the model is told the camera


@torch.no_grad()
def errors(learner: Learner, model: Denoiser, rows: Batch, camera: Tensor | None) -> Tensor:
    """Unweighted velocity error of each row [n], mean over `DRAWS` noise levels that are the same for every model."""
    device = rows["modes"].device
    generator = torch.Generator(device).manual_seed(0)
    total = torch.zeros(len(rows["modes"]), device=device)
    for _ in range(DRAWS):
        for first in range(0, len(total), 256):
            some = slice(first, first + 256)
            noised = draw_noised(learner.scaling * rows["modes"][some].float(), learner.alphas_cumprod, generator)
            source = rows["sources"][some].float() if "sources" in rows else None
            told = None if camera is None else camera[some]
            with autocast(learner.config):
                predicted = model(noised.z_t, source, noised.t, rows["tokens"][some, 0].long(), told)
            total[some] += noised.error(predicted) / DRAWS
    return total


def row_errors(learner: Learner, models: dict[str, Denoiser], rows: Batch) -> dict[str, Tensor]:
    """`errors` of every model by name; of a model that takes a camera also told it (`CAMERA`)."""
    found = {}
    for name, model in models.items():
        found[name] = errors(learner, model, rows, None)
        if model.unet.class_embedding is not None:
            found[name + CAMERA] = errors(learner, model, rows, rows["camera"])
    return found


def _groups(rows: Batch) -> dict[str, Tensor]:
    patterned = rows["patterned"]
    return {"all": torch.ones_like(patterned), "patterned": patterned, "plain": ~patterned}


def compare(learner: Learner, shipped: Denoiser, trained: Denoiser, rows: Batch) -> dict:
    """Mean errors of both, of all rows, those with a pattern and the others; paired differences trained − shipped
    with their standard errors; whether to ship.

    `better` is true where every difference is below 0: with a pattern and without, told the camera and not. A model
    that takes no camera is compared as it is.
    """
    models = {"shipped": shipped, "trained": trained}
    found, groups = row_errors(learner, models, rows), _groups(rows)
    report: dict = {"rows": len(rows["patterned"])}
    for name, error in found.items():
        report[name] = {group: round(error[which].mean().item(), 6) for group, which in groups.items()}
    report["difference"] = {}
    for told in ("", CAMERA):
        if "trained" + told not in found:
            continue
        paired = found["trained" + told] - found.get("shipped" + told, found["shipped"])
        report["difference"]["camera told" if told else "no camera"] = {
            group: [round(paired[which].mean().item(), 6), round(_standard_error(paired[which]), 6)]
            for group, which in groups.items()
        }
    report["better"] = all(mean < 0 for row in report["difference"].values() for mean, _ in row.values())
    return report


def _standard_error(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def judge_folders(part: str, model: Path, against: Path, count: int, precision: str = "fp32") -> dict:
    """`compare` two pipeline folders on `count` held-out rows (rounded up to whole chunks), on the CPU.

    InputError where their latents or their words are not the same, so that the errors are of different things.
    """
    config = FitConfig(work=model, steps=1, precision=precision)
    folders = (against, model)
    for folder in folders:
        for part_folder in (
            folder / "unet",
            folder / "text_encoder",
            folder / "tokenizer",
            ModelFolder(folder).part("vae"),
        ):
            if not part_folder.is_dir():
                raise InputError(f"{part_folder}: missing; judge-rows needs a whole pipeline folder")
    vaes = [AutoencoderKL.from_pretrained(ModelFolder(folder).part("vae")).float() for folder in folders]
    tokenizers = [CLIPTokenizer.from_pretrained(folder / "tokenizer") for folder in folders]
    if fingerprint(vaes[0]) != fingerprint(vaes[1]) or tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise InputError(f"{model}: its autoencoder or tokenizer is not that of {against}; errors cannot be compared")
    shipped, trained = (for_training(load_denoiser(folder)) for folder in folders)
    encoder, size = Encoder(vaes[0], tokenizers[0], config), picture_size(vaes[0], shipped.unet.config.sample_size)
    held = Store(max(count, 1) + CHUNK)
    for chunk in range(-(-count // CHUNK)):
        held.add(encoder(held_out_rows(part, chunk, size)))
    scaling = vaes[0].config.scaling_factor
    learner = Learner(trained, noise_schedule().alphas_cumprod, scaling, encoder.empty, config)
    return compare(learner, shipped, trained, held.all())


def add_options(part: argparse.ArgumentParser) -> None:
    """The options of `judge-rows`."""
    part.add_argument("--part", choices=("t2i", "ip2p"), default="t2i")
    part.add_argument("--model", type=Path, required=True, help="pipeline folder that was trained")
    part.add_argument("--against", type=Path, help="pipeline folder to be better than (default: the shipped one)")
    part.add_argument("--rows", type=int, default=1024, help="held-out rows")
    part.add_argument("--json", type=Path, help="where the numbers go, too")
    part.add_argument("--threads", type=int)
    part.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))


def run(options: argparse.Namespace) -> int:
    """Print `compare` of the options; exit code 0 where the model is better, 1 where it is not."""
    if options.rows < 1:
        raise InputError("judge-rows: --rows must be at least 1")
    against = options.against or ASSETS / options.part
    report = judge_folders(options.part, options.model, against, options.rows, options.precision)
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        write_text(options.json, text + "\n")
    print("better on held-out rows: ship it" if report["better"] else "not better on all held-out rows: do not ship it")
    return 0 if report["better"] else 1
