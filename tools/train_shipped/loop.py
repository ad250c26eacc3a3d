"""The training loop: a budget in minutes or steps, atomic checkpoints, EMA, progress lines.

Under torchrun every process takes a batch of its own and a step follows the mean gradient; the first one writes.

Symbols: p in [0, 1] is the part of the budget already used; every schedule is a function of p, so that a resumed run
with a larger budget simply goes on.
"""

import copy
import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from csd3d.engine.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from csd3d.engine.state import pack, unpack
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest

LossFn = Callable[[torch.Generator, float], dict[str, Tensor]]
CHECKPOINT = "checkpoint"  # folder in the work folder
WEIGHTS, COUNTS = ("parameters", "ema"), ("step", "seconds", "skipped")  # attributes of a Trainer in the checkpoint


@dataclass(frozen=True)
class FitConfig:
    """How long and how to train; exactly one of minutes and steps is the budget."""

    work: Path
    minutes: float | None = None
    steps: int | None = None
    batch: int = 16
    lr: float = 1e-3
    schedule: str = "wsd"
    warmup: int = 300
    weight_decay: float = 1e-3
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    device: str = "cpu"
    precision: str = "bf16"
    resume: bool = True
    log_seconds: float = 20.0
    save_seconds: float = 180.0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise InputError("train: give exactly one of --minutes and --steps")
        if self.schedule not in ("wsd", "cosine"):
            raise InputError(f"train: --schedule {self.schedule}: use wsd or cosine")


def learning_rate(config: FitConfig, step: int, progress: float) -> float:
    """Linear warm-up, then a cosine to 0.005, over all of p (cosine) or its last 30 % (wsd: warm-up, stable, decay)."""
    start = 0.7 if config.schedule == "wsd" else 0.0
    decay = min(max((progress - start) / (1 - start), 0.0), 1.0)
    return config.lr * min(1.0, (step + 1) / config.warmup) * max(0.5 * (1 + math.cos(math.pi * decay)), 0.005)


class Source(Protocol):
    """A source of data: its state, tensors, numbers and text in nested dicts; facts for the progress lines."""

    def facts(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """A model in training: its EMA, optimiser, generator, step and seconds, which together are the checkpoint.

    The state of `feed`, where it draws its data from, is kept with them.
    """

    def __init__(self, model: nn.Module, config: FitConfig, feed: Source | None = None) -> None:
        self.model, self.config, self.feed = model.to(config.device), config, feed
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
        self.generator = torch.Generator().manual_seed(config.seed + 1_000_003 * process())
        self.step, self.seconds, self.skipped = 0, 0.0, 0

    @property
    def progress(self) -> float:
        """The used share p of the budget."""
        config = self.config
        return self.step / config.steps if config.steps else self.seconds / (60 * config.minutes)

    def ema_model(self) -> nn.Module:
        """A copy of the model with the averaged weights."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.ema, strict=False)
        return model.eval()

    def save(self) -> None:
        """Replace the checkpoint in the work folder atomically."""
        tree = {name: getattr(self, name) for name in (*WEIGHTS, *COUNTS)}
        tree |= {"optimiser": self.optimiser.state_dict()["state"], "generator": self.generator.get_state()}
        if self.feed:
            tree["feed"] = self.feed.state_dict()
        save_checkpoint(self.config.work, CHECKPOINT, *pack(tree), identity=self._shapes)

    def load(self) -> bool:
        """Continue from the work folder's checkpoint; False without one; InputError for another model's."""
        folder = self.config.work / CHECKPOINT
        if not has_checkpoint(folder):
            return False
        tree = unpack(*load_checkpoint(folder, identity=self._shapes))
        with torch.no_grad():
            for name in WEIGHTS:
                for key, value in getattr(self, name).items():
                    value.copy_(tree[name][key])
        # only the optimiser's moments: weight decay etc. come from the command line, which may have changed
        moments = self._laid_out(tree["optimiser"])
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": moments})
        self.generator.set_state(tree["generator"])
        if process():  # the checkpoint has the first one's state only
            self.generator.manual_seed(int(torch.randint(2**31, (), generator=self.generator)) + process())
        for name in COUNTS:
            setattr(self, name, tree[name])
        if self.feed and "feed" in tree:
            self.feed.load_state_dict(tree["feed"])
        return True

    def _laid_out(self, moments: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """Moments in the memory format of their parameters: the fused optimiser walks through both side by side, and
        would take those of a channels-last weight in another order without it."""
        laid_out = {}
        for i, parameter in enumerate(self.parameters.values()):
            state = moments.get(i, {})
            laid_out[i] = {k: torch.empty_like(parameter).copy_(v) if v.ndim else v for k, v in state.items()}
        return laid_out

    @property
    def _shapes(self) -> dict[str, list[int]]:
        """Values that must be equal in a checkpoint and this model."""
        return {name: list(parameter.shape) for name, parameter in self.parameters.items()}

    def update(self, loss_fn: LossFn) -> dict[str, float]:
        """One optimiser step; a step whose gradient is not finite is skipped and counted."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.progress)
        losses = loss_fn(self.generator, self.progress)
        self.optimiser.zero_grad(set_to_none=True)
        losses["loss"].backward()
        if dist.is_initialized():
            self._average()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        self.step += 1
        if not torch.isfinite(norm):
            self.skipped += 1
            return {}
        self.optimiser.step()
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - decay)
        return {name: value.item() for name, value in losses.items()} | {"grad": norm.item()}

    def _average(self) -> None:
        """Average gradients over the processes, and seconds, so that they stop at the same step."""
        gradients = [p.grad for p in self.parameters.values()]
        flat = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_tensor([self.seconds])])
        dist.all_reduce(flat)
        *parts, seconds = (flat / dist.get_world_size()).split([g.numel() for g in gradients] + [1])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        self.seconds = seconds.item()


def process() -> int:
    """The rank of this process; 0 if there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def fit(trainer: Trainer, loss_fn: LossFn, on_save: Callable[[], None] = lambda: None) -> None:
    """Train until the budget is used, logging and checkpointing by the clock.

    Ctrl+C and SIGTERM finish the step, save and return; a second one ends the process at once.
    """
    config = trainer.config
    config.work.mkdir(parents=True, exist_ok=True)
    if config.resume and trainer.load():
        print(f"resumed at step {trainer.step}, {trainer.seconds / 60:.1f} min", flush=True)
    meter = Meter(trainer)
    tick = saved = time.monotonic()
    with StopRequest(signal.SIGINT, signal.SIGTERM) as stop:
        while trainer.progress < 1 and not stop.requested:
            meter.add(trainer.update(loss_fn))
            now = time.monotonic()
            trainer.seconds, tick = trainer.seconds + now - tick, now
            if process():
                continue
            if now - meter.started >= config.log_seconds or trainer.progress >= 1:
                meter.report()
            if now - saved >= config.save_seconds:
                trainer.save()
                on_save()
                # Checkpoints do not count against the budget.
                saved = tick = time.monotonic()
        if not process():
            trainer.save()
            on_save()
    if stop.requested:
        print(f"stopped at step {trainer.step}; the same command continues", flush=True)


class Meter:
    """Means of the losses between two progress lines, which also go to `log.jsonl` (the learning curve)."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._restart()

    def _restart(self) -> None:
        self.started, self.first, self.sums, self.count = time.monotonic(), self.trainer.step, {}, 0

    def add(self, losses: dict[str, float]) -> None:
        if not losses and self.trainer.skipped > 50 + self.trainer.step // 50:
            raise RuntimeError(f"{self.trainer.skipped} steps had no finite gradient; lower --lr")
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += bool(losses)

    def report(self) -> None:
        trainer, config = self.trainer, self.trainer.config
        seconds = max(time.monotonic() - self.started, 1e-9)
        processes = dist.get_world_size() if dist.is_initialized() else 1
        rate = (trainer.step - self.first) * config.batch * processes / seconds
        p, steps = trainer.progress, trainer.step - self.first
        # by the speed since the last line: the process may have been stopped, or have had company, before
        left = (config.steps - trainer.step) / max(steps / seconds, 1e-9) if config.steps else None
        eta = 60 * config.minutes - trainer.seconds if left is None else left
        row = {"step": trainer.step, "minutes": trainer.seconds / 60, "images_per_s": rate}
        row |= {name: value / max(self.count, 1) for name, value in self.sums.items()}
        row |= trainer.feed.facts() if trainer.feed else {}
        line = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
        print(f"{100 * p:5.1f} %  {line}  eta {max(eta, 0) / 60:.1f} min  skipped {trainer.skipped}", flush=True)
        append_line(config.work, {k: round(v, 6) for k, v in row.items()}, show=False)
        self._restart()


def append_line(folder: Path, line: dict, show: bool = True) -> None:
    """Append a line to `folder`/log.jsonl, and print it."""
    text = json.dumps(line)
    if show:
        print(text, flush=True)
    with open(folder / "log.jsonl", "a") as file:
        file.write(text + "\n")


def autocast(config: FitConfig) -> torch.autocast:
    """bfloat16 arithmetic over float32 master weights, or plain float32."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.precision == "bf16")
