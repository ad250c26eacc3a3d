"""Edits the latents of several views, patches or frames together: gradient descent on `step`'s G.

Symbols: z [N, ...] target latents, z̃ source latents, M ≤ N the particles of this step. It works with any method that
edits; the paper's is CSD-Edit (`methods.csd_edit`, arXiv 2307.04787, section 3.2). Canvases, whose particles are other
windows in every step, call `step.step_gradient` themselves.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from csd3d.distillation.kernel import OF_MODEL, SVGDConfig
from csd3d.distillation.method import Method, Network, Predict
from csd3d.distillation.noise import NOISES, draw_noise, implied_noise
from csd3d.distillation.schedule import scheduled_timestep
from csd3d.distillation.step import DistillConfig, configured, finish_step, new_step, noised
from csd3d.schema import MOST_STEPS, Steps, Within

MAX_SKIPPED = 3  # non-finite steps in a row before giving up
PER_PARTICLE = ("pose", "view", "groups", "features", "camera_noise")  # context with one row per particle


@dataclass
class CollaborativeEditConfig(DistillConfig):
    """Settings of `collaborative_edit`; defaults are the paper's for images."""

    MIN_STEPS: ClassVar[int] = 0
    PLACE: ClassVar[str] = "editors.csd_edit.edit"

    steps: Annotated[int, Within(0, MOST_STEPS)] = 200  # optimisation steps
    t_max: float | None = 0.5  # highest noise level, a fraction of the schedule; null: the model's
    noise: str = "independent"  # ε: independent, or shared by all particles
    svgd: SVGDConfig | None = field(default_factory=SVGDConfig)  # how particles collaborate; null: they do not
    lr: float = 2.0  # step size, in units of z per unit of w Δ
    lr_decay: float = 0.9  # factor of lr after every lr_decay_every steps
    lr_decay_every: Steps = 20  # steps between decays of lr
    init: str = "source"  # where target latents start: source, or noise (standard normal)
    batch: Annotated[int, Within(1, MOST_STEPS)] | None = None  # particles per step, drawn at random; null: all
    share_above: float = 0.0  # noise level, a fraction of the schedule, below which particles no longer share
    settle: float = 0.0  # noise level, likewise, below which they also keep their noise, as DDIM does

    def at(self, level: float) -> "CollaborativeEditConfig":
        """These settings at a noise level, a fraction of the schedule: without SVGD below share_above."""
        return replace(self, svgd=None) if level < self.share_above else self

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in ("source", "noise"):
            raise ValueError(f"init is {self.init!r}: choose one of source, noise")
        if self.noise not in NOISES:
            raise ValueError(f"noise is {self.noise!r}: choose one of {', '.join(NOISES)}")
        for key, (holds, allowed) in _RULES.items():
            if not holds(getattr(self, key)):
                raise ValueError(f"{key} is {getattr(self, key)}: give {allowed}")
        if self.settle and self.batch is not None:
            raise ValueError(
                f"settle is {self.settle} and batch {self.batch}: noise is kept of all particles; drop one"
            )
        if self.svgd is not None and self.svgd.space in ("coarse", "features"):
            raise ValueError(
                f'svgd.space is "{self.svgd.space}", which is for assets of a text: choose noisy, scaled or clean'
            )


_RULES = {
    "lr": (lambda x: 0 < x < math.inf, "a number above 0"),
    "lr_decay": (lambda x: 0 < x <= 1, "a factor in (0, 1]"),
    "lr_decay_every": (lambda x: x >= 1, "a whole number of at least 1"),
    "share_above": (lambda x: 0 <= x <= 1, "a fraction of the schedule"),
    "settle": (lambda x: 0 <= x <= 1, "a fraction of the schedule"),
    "batch": (lambda x: x is None or x >= 1, "a whole number of at least 1, or null for all particles"),
}


def inner_edit(batch: int | None = None) -> CollaborativeEditConfig:
    """Settings for one round of an edit that starts at the source: t falls, so that the descent acts as a sampler.

    Noise levels and the kernel's width are the model's: `suits.suited` must put them in.
    """
    return CollaborativeEditConfig(
        steps=24,
        lr=1.0,
        lr_decay=1.0,
        weight="x0",
        schedule="annealed",
        t_max=None,
        t_min=None,
        batch=batch,
        noise="shared",
        svgd=SVGDConfig(bandwidth=OF_MODEL, normalize="row", repulsion=0.0),
    )


@torch.no_grad()
def collaborative_edit(
    predict: Predict,
    method: Method,
    z_source: Tensor,
    image: Tensor | None,
    config: CollaborativeEditConfig,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    *,
    prompts: Sequence[str] | str = "",
    callback: Callable[[int, Tensor, dict[str, float]], None] | None = None,
    z_start: Tensor | None = None,
    **options,
) -> Tensor:
    """Edit `z_source` [N, ...] by config.steps of z ← z − lr G; returns the edited latents [N, ...].

    `image` [N, ...]: the source pictures from `Prior.encode_condition`; `prompts`: the instruction. The target starts
    at `z_start` [N, ...] if given (a later round of a scene's edit), else by config.init. `options`: see `edit_step`.

    `callback(number, z, report)` is called after each step with the report of `distill_step`, "lr", and "skipped", 1.0
    where the gradient was not finite and z did not change. There is no optimiser state: to resume, call `edit_step`
    with z and the generator's state. Raises FloatingPointError after three skipped steps in a row.
    """
    z = start_latents(z_source, config, generator) if z_start is None else z_start
    skipped, eps = 0, None
    for number in range(config.steps):
        z, eps, report = edit_step(
            predict, method, z, z_source, image, number, config, alphas_cumprod, generator, prompts=prompts, eps=eps,
            **options,
        )  # fmt: skip
        skipped = skipped + 1 if report["skipped"] else 0
        if skipped == MAX_SKIPPED:
            raise FloatingPointError(
                f"collaborative edit: gradient not finite {MAX_SKIPPED} steps in a row, at {number}"
            )
        if callback is not None:
            callback(number, z, report)
    return z


def start_latents(z_source: Tensor, config: CollaborativeEditConfig, generator: torch.Generator) -> Tensor:
    """The target latents before step 0: a copy of the source, or noise by config.noise."""
    if config.init == "source":
        return z_source.clone()
    return draw_noise(z_source, config.noise, generator).clone()


@torch.no_grad()
def edit_step(
    predict: Predict,
    method: Method,
    z: Tensor,
    z_source: Tensor,
    image: Tensor | None,
    number: int,
    config: CollaborativeEditConfig,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    *,
    prompts: Sequence[str] | str = "",
    source_prompts: Sequence[str] | str | None = None,
    networks: Mapping[str, Network] | None = None,
    eps: Tensor | None = None,
    adjust: Callable[[Tensor, float], Tensor] | None = None,
    **context,
) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """Step `number` of `collaborative_edit`, which depends only on its arguments: the new z [N, ...], ε and a report.

    `adjust(z, level)`, level being t as a fraction of the schedule, returns z as the step shall leave it. The returned
    ε is the noise that z_t and the new z imply, or None without config.settle. Given back as `eps`, it is
    the noise of the next step if that is below config.settle.

    `context`: other fields of `Step`, one row per particle.
    """
    config = configured(method, config)
    t = scheduled_timestep(config, number, len(alphas_cumprod), generator)
    level = t / len(alphas_cumprod)
    settled = eps is not None and level < config.settle
    config = replace(config, svgd=None) if settled else config.at(level)
    indices = draw_indices(z, config.batch, generator)
    step = new_step(
        z[indices], t, number, config, alphas_cumprod, generator,
        prompts=_taken(prompts, indices), source=z_source[indices], source_prompts=_taken(source_prompts, indices),
        image=None if image is None else image[indices],
        **{key: value[indices] if key in PER_PARTICLE else value for key, value in context.items()},
    )  # fmt: skip
    step = replace(step, eps=eps) if settled else noised(predict, method, step, config)
    gradient, report = finish_step(predict, method, step, config, networks)
    lr = learning_rate(config, number)
    if report["skipped"]:
        text = "collaborative edit: gradient not finite at step %d, t %d: skipped"
        logging.getLogger("csd3d").warning(text, number, t)
    else:
        z = z.index_add(0, indices, gradient.to(z.dtype), alpha=-lr)
    if adjust is not None:
        z = adjust(z, level)
    kept = implied_noise(step.z_t, z, step.alpha_bar) if config.settle else None
    return z, kept, {"t": float(t), "lr": lr, **report}


def learning_rate(config: CollaborativeEditConfig, number: int) -> float:
    """lr · lr_decay^⌊number / lr_decay_every⌋."""
    return config.lr * config.lr_decay ** (number // config.lr_decay_every)


def draw_indices(z: Tensor, batch: int | None, generator: torch.Generator) -> Tensor:
    """The particles of a step in rising order: all, or a random `batch`."""
    if batch is None or batch >= len(z):
        return torch.arange(len(z), device=z.device)
    drawn = torch.randperm(len(z), generator=generator, device=generator.device)[:batch]
    return drawn.sort().values.to(z.device)


def _taken(prompts: Sequence[str] | str | None, indices: Tensor) -> Sequence[str] | str | None:
    """The prompts of some particles; a single text for all is returned as it is."""
    return prompts if prompts is None or isinstance(prompts, str) else [prompts[i] for i in indices.tolist()]
