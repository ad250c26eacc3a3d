"""One step of score distillation, the same for every method: draw t and noise, ask the prior once, combine, weigh.

    G = w(t) SVGD(Δ),   Δ = method.direction(predict(method.queries(step)), step)

Symbols as in `method`. The prior is reached through one callable, `predict(queries) -> answers`, which computes equal
queries once and batches the others; nothing here knows what a network is.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from csd3d import registry
from csd3d.distillation.method import Method, Network, Predict, Query, Step
from csd3d.distillation.noise import NOISES, draw_noise
from csd3d.distillation.schedule import WEIGHTS, annealed_fraction, check_timesteps, scheduled_timestep, step_weight
from csd3d.distillation.svgd import SVGDConfig, combine, feature_force

BLIND = 0.01  # mean off-diagonal kernel below which particles do not really collaborate


@dataclass
class DistillConfig:
    """What every method shares; what only one has are fields of its own. Times are fractions of the schedule."""

    MIN_STEPS: ClassVar[int] = 1

    steps: int = 1000  # steps of the run, which schedules count in
    guidance_scale: float = 7.5  # ω of ε_∅ + ω (ε_y − ε_∅)
    guidance_final: float | None = None  # ω at the last step, linearly from guidance_scale; null: it stays
    weight: str = "sigma2"  # w(t): sigma2 (σ_t²), one, or x0 (σ_t/√ᾱ_t, steps in units of the latent)
    schedule: str = "uniform"  # t: uniform or logit_normal in [t_min, t_max]; annealed, t_max falling to t_min; staged
    t_min: float = 0.02  # least noise
    t_max: float = 0.98  # most noise
    t_late: float = 0.5  # most noise of schedule "staged" from `switch` on
    switch: float = 0.5  # share of the steps after which schedule "staged" changes
    noise: str = "independent"  # ε: independent, shared by all particles, or camera (given, a function of the view)
    null_prompt: str = ""  # what the unconditional branch is told: a negative prompt
    perp_neg: bool = False  # hold each view away from what other views are told (Perp-Neg)
    svgd: SVGDConfig | None = None  # how particles collaborate; null: every particle for itself

    def __post_init__(self) -> None:
        for key, known in {"weight": WEIGHTS, "noise": (*NOISES, "camera")}.items():
            if getattr(self, key) not in known:
                raise ValueError(f"{key} is {getattr(self, key)!r}: choose one of {', '.join(known)}")
        if self.steps < self.MIN_STEPS:
            raise ValueError(f"steps is {self.steps}: give a whole number of at least {self.MIN_STEPS}")
        for key in ("guidance_scale", "guidance_final"):
            if (value := getattr(self, key)) is not None and not math.isfinite(value):
                raise ValueError(f"{key} is {value}: give a finite number")
        check_timesteps(self)

    def guidance(self, number: int) -> float:
        """The guidance scale of a step."""
        if self.guidance_final is None:
            return self.guidance_scale
        return annealed_fraction(number, self.steps, self.guidance_final, self.guidance_scale)


@torch.no_grad()
def distill_step(
    predict: Predict,
    method: Method,
    z: Tensor,
    number: int,
    config: DistillConfig,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    networks: Mapping[str, Network] | None = None,
    **context,
) -> tuple[Tensor, dict[str, float]]:
    """G [N, ...], to be descended by z and through it by whatever made z, and what to log. `context`: fields of `Step`.

    A step is a function of its arguments: with the generator's state, a resumed run goes on as an unbroken one. The
    method's `networks` learn from the particles after it. ValueError where the method needs what is not given.
    """
    config = configured(method, config)
    t = scheduled_timestep(config, number, len(alphas_cumprod), generator)
    step = noised(predict, method, new_step(z, t, number, config, alphas_cumprod, generator, **context), config)
    gradient, report = step_gradient(predict, method, step, config)
    if networks and hasattr(method, "after"):
        report |= method.after(step, networks)
    return gradient, {"t": float(t), **report}


def new_step(
    z: Tensor,
    t: int,
    number: int,
    config: DistillConfig,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    *,
    prompts: Sequence[str] | str = "",
    source: Tensor | None = None,
    source_prompts: Sequence[str] | str | None = None,
    away: Iterable[tuple[Sequence[str], Tensor]] = (),
    **context,
) -> Step:
    """A `Step` without its noise. A single text is that of all particles; a source without any has the null prompt."""
    source_prompts = config.null_prompt if source_prompts is None or source_prompts == "" else source_prompts
    settings = {"steps": config.steps, "guidance_scale": config.guidance(number), "null_prompt": config.null_prompt}
    return Step(
        z, None, t, alphas_cumprod, _texts(prompts, len(z)), generator, number, **settings,
        source=None if source is None else source.to(z),
        source_prompts=None if source is None else _texts(source_prompts, len(z)),
        away=tuple((tuple(texts), weights) for texts, weights in away) if config.perp_neg else (), **context,
    )  # fmt: skip


def noised(predict: Predict, method: Method, step: Step, config: DistillConfig) -> Step:
    """The step with its noise: the method's own where it has any, else by config.noise."""
    if hasattr(method, "noise"):
        return method.noise(step, predict)
    if config.noise != "camera":
        return replace(step, eps=draw_noise(step.z, config.noise, step.generator))
    if step.camera_noise is None:
        raise ValueError('noise is "camera": it needs camera_noise, a function of the views')
    return replace(step, eps=step.camera_noise.to(step.z))


@torch.no_grad()
def step_gradient(
    predict: Predict, method: Method, step: Step, config: DistillConfig
) -> tuple[Tensor, dict[str, float]]:
    """G [N, ...] of a step whose noise is drawn, and what to log; "skipped" is 1 where G is not finite.

    With K instructions G = w(t) [Σ_k s_k SVGD_k(Δ_k) + (1 − Σ_k s_k) (√ᾱ_t/σ_t)(z − z̃)], s the shares: each is
    combined among the particles that it has a part of, so that none leaks into another's region, and the rest is drawn
    to the source as if a prior that knows nothing else denoised it.
    """
    _check_step(method, step, config)
    tellings = [step]
    if step.shares is not None:
        _ = step.z_t, step.source_t  # once, before they are told apart
        rows = [share.flatten(1).any(1).nonzero()[:, 0] for share in step.shares]
        tellings = [step.told(prompts, own) for prompts, own in zip(step.instructions, rows, strict=True)]
    asked = [method.queries(telling) for telling in tellings]
    answers = predict({f"{k}/{name}": query for k, some in enumerate(asked) for name, query in some.items()})
    deltas = [
        method.direction({name: answers[f"{k}/{name}"] for name in some}, telling)
        for k, (some, telling) in enumerate(zip(asked, tellings, strict=True))
    ]
    shared, reports = _combined(deltas, tellings, step, config)
    gradient = step_weight(config.weight, step.alpha_bar) * shared
    report = {key: sum(one[key] for one in reports) / len(reports) for key in reports[0]}
    _warn_if_blind(report, step, config)
    return gradient, {
        "gradient_rms": gradient.float().square().mean().sqrt().item(),
        "skipped": float(not torch.isfinite(gradient).all()),
        **report,
    }


def _combined(
    deltas: list[Tensor], tellings: list[Step], step: Step, config: DistillConfig
) -> tuple[Tensor, list[dict[str, float]]]:
    """G without w(t), and the diagnostics of every set of particles that was combined."""
    sharing, seen = step.sharing if config.svgd is not None else None, step.z_t
    if sharing is not None:
        if config.noise == "shared":  # brought to other pixels, noise that is the same by address would not cancel
            seen = step.alpha_bar**0.5 * step.z
        if step.source is not None:  # σ_t²: the variance of a unit latent given z_t
            sharing = sharing.weighed(step.source, 1 - step.alpha_bar)
    reports = []

    def combined(delta: Tensor, rows: Tensor) -> Tensor:
        among = None if sharing is None else sharing.select(rows)
        features = None if step.features is None else step.features[rows]
        options = {"alpha_bar": step.alpha_bar, "config": config.svgd, "features": features, "sharing": among}
        found, report = combine(delta[rows], seen[rows], step.z[rows], **options)
        reports.append(report)
        return found

    if step.shares is None:
        total = torch.empty_like(deltas[0])
        for rows in _members(step.groups, step.z):
            total[rows] = combined(deltas[0], rows)
        return total, reports
    rest = 1 - step.shares.sum(0)
    total = rest * math.sqrt(step.alpha_bar / (1 - step.alpha_bar)) * (step.z - step.source)
    for delta, telling, share in zip(deltas, tellings, step.shares, strict=True):
        if len(telling.rows):
            total[telling.rows] += share[telling.rows] * combined(delta, telling.rows)
    return total, reports or [combine(deltas[0][:1], seen[:1], step.z[:1], alpha_bar=step.alpha_bar, config=None)[1]]


@torch.no_grad()
def feature_gradient(
    features: Tensor, t: int, config: DistillConfig, alphas_cumprod: Tensor, groups: Tensor | None = None
) -> Tensor:
    """w(t) `feature_force` within each group: what the features [N, ...] are to descend beside `distill_step`'s G.

    For svgd.space "features"; t is the timestep that `distill_step` reported, `config` as `configured` has it.
    """
    alpha_bar = alphas_cumprod[t].item()
    force = torch.empty_like(features)
    for rows in _members(groups, features):
        force[rows] = feature_force(features[rows], alpha_bar=alpha_bar, config=config.svgd)
    return step_weight(config.weight, alpha_bar) * force


def configured(method: Method, config: DistillConfig) -> DistillConfig:
    """`config` as the method wants it: its own keys win. ValueError where the two do not go together."""
    fixed = dict(getattr(method, "fixed", {}))
    if isinstance(fixed.get("svgd"), Mapping):
        fixed["svgd"] = replace(config.svgd or SVGDConfig(), **fixed["svgd"])
    if config.perp_neg and not getattr(method, "perp_neg", False):
        raise ValueError(f"perp_neg is for methods with one guided prediction: with {_name(method)} set it to false")
    return replace(config, **fixed) if fixed else config


def possible_prompts(
    method: Method,
    config: DistillConfig,
    prompts: Sequence[str],
    source_prompts: Sequence[str] | None = None,
    away: Sequence[str] = (),
) -> list[str]:
    """Every text that the prior may be asked for in a run, each once, so that its text encoder can be dropped.

    `prompts`: what particles may show; `away`: Perp-Neg's other views; `source_prompts`: what sources show, where the
    method edits. Found by asking the method for its queries at both ends of the run and of the schedule.
    """
    config, found = configured(method, config), {config.null_prompt: None}
    alphas, generator, z = torch.linspace(0.99, 0.01, 1000), torch.Generator(), torch.zeros(len(prompts), 1, 8, 8)

    def listen(asked: dict[str, Query]) -> dict[str, Tensor]:
        found.update(dict.fromkeys(text for query in asked.values() for text in query.prompts))
        return {name: torch.zeros_like(query.z_t) for name, query in asked.items()}

    edits = "source" in getattr(method, "needs", ())
    texts = ([*source_prompts] * len(prompts))[: len(prompts)] if source_prompts else None
    for number in (0, config.steps - 1):
        for t in (0, 500, 999):
            step = new_step(
                z, t, number, config, alphas, generator, prompts=prompts, source=z if edits else None,
                source_prompts=texts, image=z,
                away=[(prompts, z[:, 0, 0, 0])] if config.perp_neg else (), camera_noise=z,
            )  # fmt: skip
            listen(method.queries(noised(listen, method, step, config)))
    found |= dict.fromkeys([*(source_prompts or []), *(away if config.perp_neg else [])])
    return list(found)


def _texts(prompts: Sequence[str] | str, count: int) -> tuple[str, ...]:
    return (prompts,) * count if isinstance(prompts, str) else tuple(prompts)


def _members(groups: Tensor | None, particles: Tensor) -> list[Tensor]:
    """The rows of the particles in each group; all of them where there are none."""
    if groups is None:
        return [torch.arange(len(particles), device=particles.device)]
    return [(groups == group).nonzero()[:, 0].to(particles.device) for group in groups.unique()]


def _check_step(method: Method, step: Step, config: DistillConfig) -> None:
    needs = getattr(method, "needs", ())
    edits = "source" in needs or step.shares is not None
    if edits and (step.source is None or step.source.shape != step.z.shape):
        found = "nothing" if step.source is None else tuple(step.source.shape)
        raise ValueError(f"method {_name(method)} needs source, latents {tuple(step.z.shape)} to edit, got {found}")
    if "image" in needs and step.image is None:
        raise ValueError(f"method {_name(method)} needs image, the source as an editing model takes it")
    if config.perp_neg and not step.away:
        raise ValueError("perp_neg is on: it needs away, the prompts of other views and their weights [N]")


def _warn_if_blind(report: dict[str, float], step: Step, config: DistillConfig) -> None:
    """Collaboration that is off without a word is a setting that nobody wanted."""
    shares = config.svgd is not None and config.svgd.share and not isinstance(config.svgd.bandwidth, str)
    if step.number == 0 and len(step.z) > 1 and shares and report["kernel_mean"] < BLIND:
        text = "svgd: particles hardly share (mean kernel %.1e at the first step): make svgd.bandwidth smaller"
        logging.getLogger("csd3d").warning(text, report["kernel_mean"])


def _name(method: Method) -> str:
    """Its name in configs."""
    entry = registry.entry_of("method", method)
    return type(method).__name__ if entry is None else entry.name
