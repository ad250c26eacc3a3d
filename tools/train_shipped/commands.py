"""`python -m tools.train_shipped PART`: train the shipped models (vae, tokenizer, ip2p, t2i, clip, lmc), judge them.

t2i, ip2p and lmc are trained on rows rendered meanwhile (`tools.train_shipped.feed`), the others on pairs on disk.
"""

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import transformers
from diffusers import AutoencoderKL

from csd3d.arguments import check_new_file
from csd3d.errors import InputError, error_line
from tools.train_shipped import feed, held_out, judge, judge_patterns, judge_text
from tools.train_shipped.clip import train_clip
from tools.train_shipped.data import open_pairs
from tools.train_shipped.denoising import train_denoiser
from tools.train_shipped.ip2p import write_tokenizer
from tools.train_shipped.lmc import train_lmc
from tools.train_shipped.loop import FitConfig
from tools.train_shipped.start import ASSETS, Start
from tools.train_shipped.vae import build_vae, freeze_encoder, train_vae

STREAMED = {"batch": 64, "save_seconds": 600.0}  # their checkpoints hold the rows too
# Processor-milliseconds a picture on a Sapphire Rapids core that was shared: 30 in float32, 42 in bfloat16
DIFFUSION = {"lr": 3e-4, "precision": "fp32", **STREAMED}
DEFAULTS = {
    "vae": {"batch": 16, "lr": 2e-3},
    "ip2p": DIFFUSION,
    "t2i": DIFFUSION,
    "clip": {"batch": 128, "lr": 1e-3},
    "lmc": {"lr": 1e-3, **STREAMED},
}


GPU = "gpu trains t2i or ip2p on a graphics card in minutes: python -m tools.train_shipped gpu --help"


def parser() -> argparse.ArgumentParser:
    """The command line; every FitConfig field is an option of the parts that train."""
    root = argparse.ArgumentParser(prog="python -m tools.train_shipped", description=__doc__, epilog=GPU)
    parts = root.add_subparsers(dest="part_name", required=True)
    for name, defaults in DEFAULTS.items():
        part = parts.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        _fit_options(part, defaults)
        if "save_seconds" in defaults:
            feed.add_options(part)
        else:
            part.add_argument("--pairs", type=Path, required=True, help="folder written by csd3d.world.pairs")
    vae, ip2p, t2i, clip, lmc = (parts.choices[name] for name in DEFAULTS)
    vae.add_argument("--channels", type=_integers, default=(16, 32, 64, 96))
    vae.add_argument("--kl", type=float, default=1e-4, help="weight of the mean KL a latent element")
    vae.add_argument("--init", type=Path, help="folder of a VAE to start from")
    vae.add_argument("--freeze-encoder", action="store_true", help="train the decoder alone; needs --init")
    for part, name in ((ip2p, "ip2p"), (t2i, "t2i")):
        part.add_argument("--init", type=Path, default=ASSETS / name, help="pipeline folder to go on from")
        part.add_argument("--held-out", type=int, default=1024, help="rows to judge by at the end")
    ip2p.add_argument("--vae", type=Path, help="folder of a VAE, for new networks")
    ip2p.add_argument("--tokenizer", type=Path, help="folder of a tokenizer, for new networks")
    ip2p.add_argument("--channels", type=_integers, default=(64, 128, 192), help="of new networks")
    clip.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder of the shipped pipelines")
    lmc.add_argument("--base", type=Path, required=True, help="text-to-image pipeline that b_psi is trained for")
    for part in (ip2p, t2i, clip, lmc):
        part.add_argument("--out", type=Path, required=True, help="where the finished folder is written")
    tokenizer = parts.add_parser("tokenizer")
    tokenizer.add_argument("--pairs", type=Path, required=True)
    tokenizer.add_argument("--work", type=Path, required=True)
    judges = {"judge": judge, "judge-text": judge_text, "judge-rows": held_out, "judge-patterns": judge_patterns}
    for name, module in judges.items():
        module.add_options(parts.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    return root


HELP = {
    "minutes": "train for so long by the clock; give this or --steps",
    "steps": "train so many steps",
    "batch": "pictures a step",
    "lr": "the highest learning rate",
    "schedule": "wsd: warm up, stay, fall over the last 30 %%; cosine: warm up, fall",
    "warmup": "steps in which the learning rate rises",
    "weight_decay": "AdamW's",
    "ema": "decay of the average of the weights, which is what is written",
    "clip": "largest norm of a step's gradient",
    "seed": "of weights, batches and noise",
    "device": "cpu or cuda",
    "precision": "bf16 or fp32",
    "log_seconds": "between two lines of progress",
    "save_seconds": "between two checkpoints",
}


def _fit_options(part: argparse.ArgumentParser, defaults: dict) -> None:
    part.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    kinds = {"work": Path, "minutes": float, "steps": int}
    for field in fields(FitConfig):
        option = "--" + field.name.replace("_", "-")
        if field.name == "resume":
            part.add_argument(option, action=argparse.BooleanOptionalAction, default=True)
        elif field.name == "work":
            part.add_argument(option, type=Path, required=True, help="checkpoints and logs")
        else:
            kind = kinds.get(field.name, field.type)
            part.add_argument(option, type=kind, default=defaults.get(field.name, field.default), help=HELP[field.name])


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def fit_config(options: argparse.Namespace) -> FitConfig:
    """The FitConfig of the options."""
    return FitConfig(**{field.name: getattr(options, field.name) for field in fields(FitConfig)})


def run_vae(options: argparse.Namespace) -> None:
    if options.freeze_encoder and not options.init:
        raise InputError("train vae: --freeze-encoder needs --init FOLDER, the VAE whose latents are to stay valid")
    vae = AutoencoderKL.from_pretrained(options.init) if options.init else build_vae(options.channels)
    if options.freeze_encoder:
        freeze_encoder(vae)
    train_vae(open_pairs(options.pairs), fit_config(options), vae, options.kl, anchored=not options.init)


def run_ip2p(options: argparse.Namespace) -> None:
    start = Start(options.init, options.vae, options.tokenizer, options.channels)
    train_denoiser("ip2p", fit_config(options), feed.feed_config(options), start, options.out, options.held_out)


def run_t2i(options: argparse.Namespace) -> None:
    start = Start(options.init)
    train_denoiser("t2i", fit_config(options), feed.feed_config(options), start, options.out, options.held_out)


def run_clip(options: argparse.Namespace) -> None:
    train_clip(open_pairs(options.pairs), fit_config(options), options.tokenizer, options.out)


def run_lmc(options: argparse.Namespace) -> None:
    train_lmc(fit_config(options), feed.feed_config(options), options.base, options.out)


def run_tokenizer(options: argparse.Namespace) -> None:
    write_tokenizer(open_pairs(options.pairs), options.work)


RUNS = {
    "vae": run_vae,
    "tokenizer": run_tokenizer,
    "ip2p": run_ip2p,
    "t2i": run_t2i,
    "clip": run_clip,
    "lmc": run_lmc,
    "judge": judge.run,
    "judge-text": judge_text.run,
    "judge-rows": held_out.run,
    "judge-patterns": judge_patterns.run,
}


def _check(options: argparse.Namespace) -> None:
    """InputError before any work: for numbers that torch refuses, and files of a judge that cannot be written."""
    for name, least, most in (("seed", 0, 2**63 - 1), ("threads", 1, 1024)):
        value = getattr(options, name, None)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name} is {value}; give a whole number from {least} to {most}")
    for name in ("json", "sheet"):
        check_new_file(getattr(options, name, None), f"--{name}")


def main(arguments: list[str] | None = None) -> int:
    """Parse and run one part; user errors end in one line and exit code 2."""
    options = parser().parse_args(arguments)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()  # of a dozen files at every checkpoint
    try:
        _check(options)
        # torch.nn initialises weights from the global generator, so it is seeded here, at the program's start
        torch.manual_seed(getattr(options, "seed", 0))
        if getattr(options, "threads", None):
            torch.set_num_threads(options.threads)
        if "RANK" in os.environ:  # torchrun
            dist.init_process_group("gloo")
        return RUNS[options.part_name](options) or 0
    except InputError as error:
        print(error_line(str(error)), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
