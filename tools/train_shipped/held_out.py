"""Errors of the shipped diffusion models on held-out rows, and `judge-rows`, which says whether to ship a new one.

The error is the unweighted mean square of the velocity, over noise levels that are the same for every model. The rows
are the same in every run (`stream.held_out_rows`).
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from csd3d.arguments import path_of
from csd3d.errors import InputError
from csd3d.files import write_text
from csd3d.priors.camera_embedding import mirrored
from tools.train_shipped.diffusion import Denoiser, draw_noised, for_training, noise_schedule
from tools.train_shipped.learner import Learner
from tools.train_shipped.loop import FitConfig, autocast
from tools.train_shipped.rows import Batch, Encoder, Store, picture_size
from tools.train_shipped.start import ASSETS, Start
from tools.train_shipped.stream import CHUNK, held_out_rows
from tools.train_shipped.vae import fingerprint

DRAWS = 4  # noise levels per held-out row
CAMERA, MIRRORED = ", camera", ", mirrored camera"  # follow a model's name where the model is told one


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
    """`errors` of every model by name; of a model that takes a camera also told it, and told the mirrored one: where
    that is no worse, the model has not learned which side is which."""
    found = {}
    for name, model in models.items():
        found[name] = errors(learner, model, rows, None)
        if model.unet.class_embedding is not None:
            found[name + CAMERA] = errors(learner, model, rows, rows["camera"])
            found[name + MIRRORED] = errors(learner, model, rows, mirrored(rows["camera"]))
    return found


def _groups(rows: Batch) -> dict[str, Tensor]:
    """Which rows are in which group; groups of one row or none are left out."""
    patterned = rows["patterned"]
    groups = {"all": torch.ones_like(patterned), "patterned": patterned, "plain": ~patterned}
    return {name: which for name, which in groups.items() if which.sum() > 1}


def compare(learner: Learner, shipped: Denoiser, trained: Denoiser, rows: Batch) -> dict:
    """Mean errors of both, of all rows, those with a pattern and the others; paired differences trained − shipped
    with their standard errors; whether to ship.

    `better` is true where every difference is below 0 by two standard errors: with a pattern and without, told the
    camera and not. A model that takes no camera is compared as it is.
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
            group: [round(value.item(), 6) for value in _mean_and_error(paired[which])]
            for group, which in groups.items()
        }
    report["better"] = all(mean < -2 * error for row in report["difference"].values() for mean, error in row.values())
    return report


def _mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error of two values or more."""
    return values.mean(), values.std() / math.sqrt(len(values))


def judge_folders(part: str, model: Path, against: Path, count: int, precision: str = "fp32") -> dict:
    """`compare` two pipeline folders on `count` held-out rows (rounded up to whole chunks), on the CPU.

    InputError where their latents or their words are not the same, so that the errors are of different things.
    """
    config = FitConfig(work=model, steps=1, precision=precision)
    (vae, tokenizer, shipped), (its_vae, its_tokenizer, trained) = (Start(each).open(part) for each in (against, model))
    if fingerprint(vae) != fingerprint(its_vae) or tokenizer.get_vocab() != its_tokenizer.get_vocab():
        raise InputError(f"{model}: its autoencoder or tokenizer is not that of {against}; errors cannot be compared")
    for denoiser in (shipped, trained):
        for_training(denoiser)  # for its speed
    encoder, size = Encoder(vae, tokenizer, config), picture_size(vae, shipped.unet.config.sample_size)
    held = Store(max(count, 1) + CHUNK)
    for chunk in range(-(-count // CHUNK)):
        held.add(encoder(held_out_rows(part, chunk, size)))
    learner = Learner(trained, noise_schedule().alphas_cumprod, vae.config.scaling_factor, encoder.empty, config)
    return compare(learner, shipped, trained, held.all())


def add_options(part: argparse.ArgumentParser) -> None:
    """The options of `judge-rows`."""
    part.add_argument("--part", choices=("t2i", "ip2p"), default="t2i")
    part.add_argument("--model", type=Path, required=True, help="pipeline folder that was trained")
    part.add_argument("--against", type=Path, help="pipeline folder to be better than (default: the shipped one)")
    part.add_argument("--rows", type=int, default=1024, help="held-out rows")
    part.add_argument("--json", type=path_of, help="where the numbers go, too")
    part.add_argument("--threads", type=int)
    part.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))


def print_report(report: dict, path: Path | None) -> None:
    """Print a judge's numbers as JSON, and write them to `path` if there is one."""
    text = json.dumps(report, indent=1)
    print(text)
    if path:
        write_text(path, text + "\n")


def run(options: argparse.Namespace) -> int:
    """Print `compare` of the options; exit code 0 where the model is better, 1 where it is not."""
    if options.rows < 2:
        raise InputError("judge-rows: --rows must be at least 2")
    against = options.against or ASSETS / options.part
    report = judge_folders(options.part, options.model, against, options.rows, options.precision)
    print_report(report, options.json)
    print("better on held-out rows: ship it" if report["better"] else "not better on all held-out rows: do not ship it")
    return 0 if report["better"] else 1
