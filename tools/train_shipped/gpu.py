"""`python -m tools.train_shipped gpu`: train a shipped model further on one GPU in minutes, on rows rendered meanwhile.

Worker processes render scenes (`tools.train_shipped.stream`); this one encodes the pictures, keeps their latents on the
device and trains on draws of all that are there. Into --out go the averaged networks in fp16 (renewed every minute),
log.jsonl, whose last line has the held-out figures, and sheet.png; nothing else. --part t2i makes the text-to-image
model camera-aware (`csd3d.priors.camera_embedding`); --part ip2p trains the editor.

`python -m tools.train_shipped t2i` trains the same losses on the same rows on a CPU, for hours and resumable.
"""

import argparse
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from csd3d.priors.camera_embedding import CAMERA_WIDTH
from tools.train_shipped import results
from tools.train_shipped.diffusion import for_training, load_denoiser, noise_schedule
from tools.train_shipped.held_out import compare
from tools.train_shipped.learner import Learner
from tools.train_shipped.loop import FitConfig, Trainer, append_line, learning_rate
from tools.train_shipped.rows import Batch, Encoder, Store
from tools.train_shipped.start import ASSETS, Start
from tools.train_shipped.stream import CHUNK, Stream


class ClockedTrainer(Trainer):
    """A Trainer with a deadline, which draws random numbers on the device and never makes the host wait."""

    def __init__(self, model: nn.Module, config: FitConfig, ends: float) -> None:
        super().__init__(model, config)
        self.began, self.ends = time.monotonic(), ends
        self.generator = torch.Generator(config.device).manual_seed(config.seed)
        self.sums = torch.zeros(3, device=config.device)

    @property
    def progress(self) -> float:
        """The share of the time between the first step and the deadline that has passed."""
        return min(1.0, (time.monotonic() - self.began) / max(self.ends - self.began, 1e-6))

    def update(self, loss_fn: Callable[[torch.Generator, float], Tensor]) -> None:
        """One step; loss, gradient norm and skipped steps are added to `sums` on the device."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.progress)
        loss = loss_fn(self.generator, self.progress)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        skipped = (~norm.isfinite()).float()
        # the fused optimiser skips the step by this flag, as for a GradScaler, without reading it back
        self.optimiser.found_inf = skipped
        self.optimiser.step()
        self.step += 1
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - decay)
        self.sums += torch.stack([loss.detach(), norm, skipped]).nan_to_num(0, 0, 0)

    def means(self, steps: int) -> dict[str, float]:
        """Return means over the last `steps` steps and reset them; the host waits here."""
        loss, grad, skipped = self.sums.tolist()
        self.sums.zero_()
        return {"loss": loss / max(steps, 1), "grad": grad / max(steps, 1), "skipped": skipped}


def compile_unet(trainer: ClockedTrainer, step: Callable[[], Tensor], mode: str) -> None:
    """Compile the UNet by a first forward and backward pass; if that fails, print a line and go on without."""
    unet, started = trainer.model.unet, time.monotonic()
    try:
        unet.compile(mode=mode, dynamic=False)
        step().backward()
        if trainer.config.device.startswith("cuda"):
            torch.cuda.synchronize()
        print(f"compiled the UNet in {time.monotonic() - started:.0f} s", flush=True)
    except Exception as error:  # an eager model still trains
        unet._compiled_call_impl = None
        print(f"going on without torch.compile: {type(error).__name__}: {str(error)[:300]}", flush=True)
    trainer.optimiser.zero_grad(set_to_none=True)


def like_stored(part: str, encoder: Encoder, batch: int) -> Batch:
    """Rows of the shapes that the store will hold, for compiling before there are any."""
    size = encoder.vae.config.sample_size
    texts = [[""] * (5 if part == "t2i" else 2)] * batch
    blank = encoder.modes(np.zeros((1, size, size, 3), np.uint8)).repeat(batch, 1, 1, 1)
    rows = {"modes": blank, "tokens": encoder.tokens(texts).to(blank.device)}
    if part == "t2i":
        return rows | {"camera": torch.zeros(batch, CAMERA_WIDTH, device=blank.device)}
    return rows | {"sources": blank}


class Run:
    """One training run: the stream, the stores, the trainer, and the output."""

    def __init__(self, options: argparse.Namespace, started: float, stream: Stream) -> None:
        self.options, self.started, self.stream = options, started, stream
        base = ASSETS / options.part
        self.config = FitConfig(
            work=options.out, minutes=options.minutes, batch=options.batch, lr=options.lr, ema=options.ema,
            warmup=options.warmup, seed=options.seed, device=options.device, precision=options.precision,
        )  # fmt: skip
        vae, self.tokenizer, denoiser = Start(options.init or base).open(options.part)
        self.encoder = Encoder(vae, self.tokenizer, self.config)
        denoiser = denoiser.eval() if options.device.startswith("cuda") else for_training(denoiser)
        denoiser.unet.to(memory_format=torch.channels_last)
        ends = started + 60 * options.minutes - options.reserve_seconds
        self.trainer = ClockedTrainer(denoiser, self.config, ends)
        alphas_cumprod = noise_schedule().alphas_cumprod.to(options.device)
        scaling = vae.config.scaling_factor
        self.learner = Learner(denoiser, alphas_cumprod, scaling, self.encoder.empty, self.config)
        self.loss = partial(self.learner.part_loss, options.part)
        self.store, self.held = Store(options.capacity), Store(max(options.held_out, CHUNK))
        self.logged_at, self.logged = time.monotonic(), (0, 0)

    def take(self, most: int, seconds: float = 0.0) -> None:
        """Encode and store up to `most` waiting chunks."""
        for chunk, rows in self.stream.take(most, seconds):
            (self.held if chunk is None else self.store).add(self.encoder(rows))

    def train(self) -> None:
        """Compile, wait for the first rows, and train until the deadline."""
        options, trainer = self.options, self.trainer
        if options.compile != "none":
            fake, generator = like_stored(options.part, self.encoder, options.batch), trainer.generator
            compile_unet(trainer, lambda: self.loss(fake, generator, 0.0), options.compile)
        while len(self.store) < options.first_rows and time.monotonic() < trainer.ends:
            self.take(16, seconds=1.0)
        trainer.began = self.logged_at = saved = time.monotonic()
        self.logged = (0, self.store.written)
        print(f"first step at {(trainer.began - self.started) / 60:.2f} min, {len(self.store)} rows", flush=True)
        while trainer.progress < 1:
            self.take(8)
            trainer.update(lambda generator, p: self.loss(self.store.draw(options.batch, generator), generator, p))
            now = time.monotonic()
            if now - self.logged_at >= options.log_seconds:
                self.log()
            if now - saved >= options.save_seconds:
                results.export(trainer.ema_model(), options.out)
                saved = now

    def log(self) -> None:
        """Print a line of progress and append it to log.jsonl."""
        trainer, now = self.trainer, time.monotonic()
        steps, rows = trainer.step - self.logged[0], self.store.written - self.logged[1]
        means = trainer.means(steps)  # waits for the device, so the rates below are true
        seconds = max(time.monotonic() - self.logged_at, 1e-6)
        line = {
            "step": trainer.step,
            "minutes": (now - self.started) / 60,
            "images_per_s": steps * self.config.batch / seconds,
        }
        line |= {**means, "lr": trainer.optimiser.param_groups[0]["lr"], "rows": self.store.written}
        line |= {"rows_per_s": rows / seconds, "workers": self.stream.alive}
        append_line(self.options.out, {name: round(value, 6) for name, value in line.items()})
        self.logged_at, self.logged = now, (trainer.step, self.store.written)

    def finish(self) -> None:
        """Write the networks first, in case time runs out, then held-out figures and the sheet."""
        trained = self.trainer.ema_model()
        results.export(trained, self.options.out)
        shipped = load_denoiser(ASSETS / self.options.part).eval().to(self.options.device)
        if len(self.held):
            rows = self.held.all()
            append_line(self.options.out, {"figures": compare(self.learner, shipped, trained, rows)})
        results.sheet(self.learner, trained, self.encoder, self.held, self.options.out / "sheet.png")
        print(f"done at {(time.monotonic() - self.started) / 60:.2f} min, {self.trainer.step} steps", flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="python -m tools.train_shipped gpu", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    root.add_argument("--out", type=Path, required=True, help="where the networks, log and sheet are written")
    root.add_argument("--part", choices=("t2i", "ip2p"), default="t2i")
    root.add_argument("--minutes", type=float, default=7.5, help="wall-clock from the program's start to its end")
    root.add_argument("--reserve-seconds", type=float, default=25.0, help="of these, for the figures and the sheet")
    root.add_argument("--init", type=Path, help="folder to go on from (unet/, text_encoder/); else the shipped model")
    root.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    root.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    root.add_argument("--compile", choices=("none", "default", "max-autotune-no-cudagraphs"), default="default")
    root.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 1, 1), help="processes that render")
    root.add_argument("--batch", type=int, default=1024)
    root.add_argument("--lr", type=float, default=1e-3)
    root.add_argument("--warmup", type=int, default=300, help="steps")
    root.add_argument("--ema", type=float, default=0.999)
    root.add_argument("--seed", type=int, default=0)
    root.add_argument("--capacity", type=int, default=600_000, help="rows kept on the device")
    root.add_argument("--first-rows", type=int, default=8192, help="rows to wait for before the first step")
    root.add_argument("--held-out", type=int, default=2048, help="rows for the figures")
    root.add_argument("--log-seconds", type=float, default=10.0)
    root.add_argument("--save-seconds", type=float, default=60.0)
    return root


def main(arguments: list[str] | None, started: float) -> int:
    """Train by the command line; `started` is the moment of `time.monotonic` that the budget counts from."""
    options = parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)  # the camera embedding's first layer starts from the global generator
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # shapes do not change
    signal.signal(signal.SIGTERM, _interrupt)
    with Stream(options.part, options.workers, options.seed, -(-options.held_out // CHUNK)) as stream:
        run = Run(options, started, stream)
        try:
            run.train()
            run.log()
        except KeyboardInterrupt:
            results.export(run.trainer.ema_model(), options.out)
            print(f"stopped at step {run.trainer.step}; its networks are in {options.out}", flush=True)
            return 1
    run.finish()
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
