"""CSD-Edit (arXiv 2307.04787, section 3.2): the latents of several views edited together, by an instruction.

Symbols: z [N, ...] target latents, z̃ source latents, ε noise, t one timestep for all, M ≤ N the particles of this
step. The network is reached through one callable, one batched call a step:

    predict(z_stack [B*M, ...], t, branches, indices [M]) -> eps [B*M, ...]

Rows come in B groups of M, group b to be predicted under branches[b]: "null" (no image, empty text), "image" (source
image, empty text) or "full" (source image, instruction); row m of each group is particle indices[m]. Where several
instructions share the latents there is a group "full/0", "full/1", … for each, of which only those rows need be right
that the instruction has a share of. The last group (or two) holds the noised source, whose prediction is the baseline
(but for baseline "noise"); what a branch's conditions are does not depend on that.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from csd3d.distillation.correspondence import Correspondence
from csd3d.distillation.directions import csd_edit
from csd3d.distillation.guidance import ip2p_guidance
from csd3d.distillation.noise import NOISES, add_noise, draw_noise
from csd3d.distillation.schedule import WEIGHTS, check_timesteps, scheduled_timestep, step_weight
from csd3d.distillation.svgd import SVGDConfig, combine, svgd_diagnostics

PredictBranches = Callable[[Tensor, int, tuple[str, ...], Tensor], Tensor]
Correspond = Callable[[Tensor], Correspondence]  # of the particles indices [M]; a Correspondence's `select` is one
MAX_SKIPPED = 3  # non-finite steps in a row before giving up


@dataclass
class CollaborativeEditConfig:
    """Settings of `collaborative_edit`; defaults are the paper's for images. Times are fractions of the schedule.

    `schedule`: "uniform" draws t from [t_min, t_max]; "annealed" falls linearly from t_max to t_min; "staged" draws
    from [t_min, t_max] before `switch` of the steps and from [t_min, t_late] after. `weight`: see `step_weight`. `lr`
    is in units of z per unit of w Δ and is multiplied by `lr_decay` every `lr_decay_every` steps. `init`: target
    latents start at the "source" or at standard normal "noise". `batch`: particles drawn a step, null for all.
    `baseline`: "image" is the paper's ε(z̃_t; x̃, ∅); "guided" guides it by image_scale as the authors' code does,
    one branch more; "noise" is ε itself, the paper's ablation, with which Δ is that of SDS. `svgd` null: no
    collaboration.
    """

    steps: int = 200
    lr: float = 2.0
    lr_decay: float = 0.9
    lr_decay_every: int = 20
    weight: str = "sigma2"
    text_scale: float = 7.5
    image_scale: float = 1.5
    baseline: str = "image"
    schedule: str = "uniform"
    t_min: float = 0.02
    t_max: float = 0.5
    t_late: float = 0.5
    switch: float = 0.5
    noise: str = "independent"
    init: str = "source"
    batch: int | None = None
    svgd: SVGDConfig | None = field(default_factory=SVGDConfig)

    def __post_init__(self):
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} is {getattr(self, key)!r}: choose one of {', '.join(choices)}")
        for key, (holds, wanted) in _RULES.items():
            if not holds(getattr(self, key)):
                raise ValueError(f"{key} is {getattr(self, key)}: give {wanted}")
        if self.svgd is not None and self.svgd.space in ("coarse", "features"):
            raise ValueError(
                f'svgd.space is "{self.svgd.space}", which keeps assets of a text apart: choose noisy or clean'
            )
        check_timesteps(self)


_CHOICES = {
    "weight": WEIGHTS,
    "noise": NOISES,
    "init": ("source", "noise"),
    "baseline": ("image", "guided", "noise"),
}
_COUNT = (lambda x: x >= 1, "a whole number of at least 1")
_FINITE = (math.isfinite, "a finite number")
_RULES = {
    "steps": (lambda x: x >= 0, "a whole number of at least 0"),
    "lr": (lambda x: 0 < x < math.inf, "a number above 0"),
    "lr_decay": (lambda x: 0 < x <= 1, "a factor in (0, 1]"),
    "lr_decay_every": _COUNT,
    "text_scale": _FINITE,
    "image_scale": _FINITE,
    "batch": (lambda x: x is None or x >= 1, "a whole number of at least 1, or null for all particles"),
}


@dataclass(frozen=True)
class Particles:
    """The particles of one step, of any larger whole: target latents `z` and `source` [M, ...], noised by `eps`.

    `shares` [K, M, 1, h, w] ≥ 0, summing over K to at most 1, is what each of K instructions has of each latent pixel;
    the source has what is left over. None: one instruction has all. `correspondence`: see `combine`; it counts as far
    as the source itself follows it (`Correspondence.weighed`).
    """

    z: Tensor
    source: Tensor
    eps: Tensor
    shares: Tensor | None = None
    correspondence: Correspondence | None = None


@torch.no_grad()
def collaborative_edit(
    predict: PredictBranches,
    z_source: Tensor,
    config: CollaborativeEditConfig,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    callback: Callable[[int, Tensor, dict[str, float]], None] | None = None,
    z_start: Tensor | None = None,
    correspond: Correspond | None = None,
) -> Tensor:
    """Edit `z_source` [N, ...] by config.steps of z ← z − lr G, G = w(t) SVGD(Δ); returns the edited latents [N, ...].

    The target starts at `z_start` [N, ...] if given (a later round of a scene's edit), else where config.init says.
    `correspond(indices [M])` tells which pixels of a step's particles show the same; None: those at one address.

    `callback(step, z, diagnostics)` is called after each step: "t", "lr", "gradient_rms", "skipped" (1.0 where the
    gradient was not finite and z was left alone), and those of `svgd_diagnostics`. There is no optimiser state: to
    resume, loop over `edit_step` from the step reached, with z and the generator's state. Raises FloatingPointError
    after three skipped steps in a row.
    """
    z = start_latents(z_source, config, generator) if z_start is None else z_start
    skipped = 0
    for step in range(config.steps):
        z, diagnostics = edit_step(predict, z, z_source, step, config, alphas_cumprod, generator, correspond)
        skipped = skipped + 1 if diagnostics["skipped"] else 0
        if skipped == MAX_SKIPPED:
            raise FloatingPointError(f"collaborative edit: gradient not finite {MAX_SKIPPED} steps in a row, at {step}")
        if callback is not None:
            callback(step, z, diagnostics)
    return z


def start_latents(z_source: Tensor, config: CollaborativeEditConfig, generator: torch.Generator) -> Tensor:
    """The target latents before step 0: a copy of the source's, or noise (independent or shared by config.noise)."""
    if config.init == "source":
        return z_source.clone()
    return draw_noise(z_source, config.noise, generator).clone()


@torch.no_grad()
def edit_step(
    predict: PredictBranches,
    z: Tensor,
    z_source: Tensor,
    step: int,
    config: CollaborativeEditConfig,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    correspond: Correspond | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Step `step` of `collaborative_edit`, a function of its arguments alone: the new z [N, ...] and diagnostics."""
    t = scheduled_timestep(config, step, len(alphas_cumprod), generator)
    indices = _draw_indices(z, config.batch, generator)
    clean = z[indices]
    eps = draw_noise(clean, config.noise, generator)
    among = None if correspond is None or config.svgd is None else correspond(indices)
    particles = Particles(clean, z_source[indices], eps, correspondence=among)
    gradient, report = edit_gradient(predict, particles, t, indices, config, alphas_cumprod[t].item())
    lr = learning_rate(config, step)
    if report["skipped"]:
        logging.getLogger("csd3d").warning("collaborative edit: gradient not finite at step %d, t %d: skipped", step, t)
    else:
        z = z.index_add(0, indices, gradient.to(z.dtype), alpha=-lr)
    return z, {"t": float(t), "lr": lr, **report}


def learning_rate(config: CollaborativeEditConfig, step: int) -> float:
    """lr · lr_decay^⌊step / lr_decay_every⌋."""
    return config.lr * config.lr_decay ** (step // config.lr_decay_every)


@torch.no_grad()
def edit_gradient(
    predict: PredictBranches,
    particles: Particles,
    t: int,
    indices: Tensor,
    config: CollaborativeEditConfig,
    alpha_bar: float,
) -> tuple[Tensor, dict[str, float]]:
    """G = w(t) SVGD(Δ) [M, ...] of some particles at timestep t, ᾱ_t = `alpha_bar`; and diagnostics.

    With K instructions G = w(t) [Σ_k s_k SVGD_k(Δ_k) + (1 − Σ_k s_k) (√ᾱ_t/σ_t)(z − z̃)], s the shares: each is shared
    among the particles that it has a part of, so that none leaks into another's region, and the rest is drawn to the
    source as if a prior that knows nothing else denoised it. The diagnostics have "skipped" 1 where G is not finite:
    the caller then leaves its latents alone.
    """
    noisy, noisy_source = (add_noise(z, particles.eps, alpha_bar) for z in (particles.z, particles.source))
    if particles.correspondence is not None:  # σ_t²: the variance of a unit latent given z_t
        trusted = particles.correspondence.weighed(particles.source, 1 - alpha_bar)
        particles = replace(particles, correspondence=trusted)
    directions = _directions(predict, particles, noisy, noisy_source, t, indices, config)
    noise_free = config.noise == "shared" and particles.correspondence is not None
    seen = alpha_bar**0.5 * particles.z if noise_free else noisy
    gradient = step_weight(config.weight, alpha_bar) * _combined(directions, particles, seen, alpha_bar, config)
    options = {"alpha_bar": alpha_bar, "config": config.svgd, "sharing": particles.correspondence}
    return gradient, {
        "gradient_rms": gradient.float().square().mean().sqrt().item(),
        "skipped": float(not torch.isfinite(gradient).all()),
        **svgd_diagnostics(directions[0], seen, particles.z, **options),
    }


def _combined(
    directions: list[Tensor], particles: Particles, noisy: Tensor, alpha_bar: float, config: CollaborativeEditConfig
) -> Tensor:
    """SVGD of one direction a particle, or the mix of K instructions, each combined over its own particles."""

    def shared(direction: Tensor, rows: Tensor | slice, among: Correspondence | None) -> Tensor:
        own = (direction[rows], noisy[rows], particles.z[rows])
        return combine(*own, alpha_bar=alpha_bar, config=config.svgd, sharing=among)[0]

    if particles.shares is None:
        return shared(directions[0], slice(None), particles.correspondence)
    rest = 1 - particles.shares.sum(0)
    total = rest * math.sqrt(alpha_bar / (1 - alpha_bar)) * (particles.z - particles.source)
    for direction, share in zip(directions, particles.shares, strict=True):
        rows = share.flatten(1).any(1).nonzero()[:, 0]
        if len(rows):
            among = None if particles.correspondence is None else particles.correspondence.select(rows)
            total[rows] += share[rows] * shared(direction, rows, among)
    return total


def guided_predictor(
    predict: PredictBranches, indices: Tensor, text_scale: float, image_scale: float
) -> Callable[[Tensor, int], Tensor]:
    """The `predict(z_t, t)` that `ddim_edit` takes: guided, for particles `indices`, one batched call each time."""
    branches = _target_branches(image_scale)

    def predict_guided(z_t: Tensor, t: int) -> Tensor:
        eps = predict(torch.cat([z_t] * len(branches)), t, branches, indices).chunk(len(branches))
        return _guide(branches, eps, text_scale, image_scale)

    return predict_guided


def unet_rows(config: CollaborativeEditConfig) -> int:
    """How many UNet batch elements one particle costs in one step."""
    target, source = _branches(config)
    return len(target) + len(source)


def _branches(config: CollaborativeEditConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    guided = config.baseline == "guided" and config.image_scale != 1
    source = () if config.baseline == "noise" else ("image", "null") if guided else ("image",)
    return _target_branches(config.image_scale), source


def _target_branches(image_scale: float) -> tuple[str, ...]:
    """At image scale 1 the null branch has weight 0 and is not evaluated."""
    return ("image", "full") if image_scale == 1 else ("image", "full", "null")


def _directions(
    predict: PredictBranches,
    particles: Particles,
    noisy: Tensor,
    noisy_source: Tensor,
    t: int,
    indices: Tensor,
    config: CollaborativeEditConfig,
) -> list[Tensor]:
    """Δ [M, ...] of each instruction from one network call."""
    target, source = _branches(config)
    texts = ("full",) if particles.shares is None else tuple(f"full/{k}" for k in range(len(particles.shares)))
    target = (target[0], *texts, *target[2:])
    stack = torch.cat([noisy] * len(target) + [noisy_source] * len(source))
    eps = predict(stack, t, target + source, indices).chunk(len(target + source))
    # Without "null" among the source's branches the baseline is the image branch alone, at scale 1.
    scale = config.image_scale if "null" in source else 1.0
    baseline = _guide(source, eps[len(target) :], 0.0, scale) if source else particles.eps
    scales = config.text_scale, config.image_scale
    return [csd_edit(_guide(target, eps[: len(target)], *scales, text), baseline) for text in texts]


def _guide(
    branches: tuple[str, ...], eps: tuple[Tensor, ...], text_scale: float, image_scale: float, text: str = "full"
) -> Tensor:
    """Guidance over the branches evaluated: one left out has weight 0, and the image branch stands in its place."""
    by_name = dict(zip(branches, eps, strict=True))
    image = by_name["image"]
    return ip2p_guidance(by_name.get("null", image), image, by_name.get(text, image), text_scale, image_scale)


def _draw_indices(z: Tensor, batch: int | None, generator: torch.Generator) -> Tensor:
    """Which particles take part, in rising order: all of them, or a random `batch`."""
    if batch is None or batch >= len(z):
        return torch.arange(len(z), device=z.device)
    drawn = torch.randperm(len(z), generator=generator, device=generator.device)[:batch]
    return drawn.sort().values.to(z.device)
