"""One step of score distillation for any method: draw t and noise, predict once, combine by SVGD, weigh.

    G = w(t) SVGD(Δ),   Δ = method.direction(predict(method.queries(step)), step)

Symbols as in `method`. `predict(queries) -> predictions` is the prior: it computes equal queries once and all others in
one batch.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from csd3d import registry
from csd3d.distillation.method import Method, Network, Predict, Query, Step
from csd3d.distillation.noise import GIVEN, NOISES, draw_noise
from csd3d.distillation.schedule import WEIGHTS, annealed_fraction, check_timesteps, scheduled_timestep, step_weight
from csd3d.distillation.svgd import SVGDConfig, combine, feature_force
from csd3d.schema import MOST_STEPS, Within
from csd3d.waits import to_host

BLIND = 0.01  # mean off-diagonal kernel below which particles hardly collaborate


@dataclass
class DistillConfig:
    """Settings that all methods share; a method's own are its fields. Times are fractions of the schedule."""

    MIN_STEPS: ClassVar[int] = 1
    PLACE: ClassVar[str] = "distill"  # its key in a config

    steps: Annotated[int, Within(0, MOST_STEPS)] = 1000  # optimisation steps; schedules span them
    guidance_scale: float | None = 7.5  # ω of classifier-free guidance, ε_∅ + ω (ε_y − ε_∅); null: the model's
    # ω at the last step, changing linearly; null: as guidance_scale, or the model's where that is null too
    guidance_final: float | None = None
    weight: str = "sigma2"  # w(t): sigma2 (σ_t²), one, or x0 (σ_t/√ᾱ_t, steps in units of the latent)
    schedule: str = "uniform"  # t: uniform or logit_normal in [t_min, t_max], annealed (t_max to t_min), or staged
    t_min: float | None = 0.02  # lowest noise level, a fraction of the schedule; null: the model's
    t_max: float | None = 0.98  # highest noise level, a fraction of the schedule; null: the model's
    t_late: float = 0.5  # with schedule staged: highest noise level from `switch` on
    switch: float = 0.5  # with schedule staged: fraction of the steps after which t_late replaces t_max
    # ε: independent, shared by all particles, camera (a function of the view) or surface (on what the view shows)
    noise: str = "independent"
    null_prompt: str = ""  # prompt of the unconditional branch; text here acts as a negative prompt
    perp_neg: bool = False  # Perp-Neg: push each view away from the prompts of other views
    svgd: SVGDConfig | None = None  # how particles collaborate; null: they do not

    def __post_init__(self) -> None:
        for key, known in {"weight": WEIGHTS, "noise": (*NOISES, *GIVEN)}.items():
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
    """The gradient G [N, ...] for z to descend, and what to log. `context`: fields of `Step`.

    A step depends only on its arguments and the generator's state, so runs can be resumed. The method's `networks` are
    trained on the particles afterwards. ValueError where the method needs something that is not given.
    """
    config = configured(method, config)
    t = scheduled_timestep(config, number, len(alphas_cumprod), generator)
    step = new_step(z, t, number, config, alphas_cumprod, generator, **context)
    return run_step(predict, method, step, config, networks)


@torch.no_grad()
def run_step(
    predict: Predict, method: Method, step: Step, config: DistillConfig, networks: Mapping[str, Network] | None
) -> tuple[Tensor, dict[str, float]]:
    """`distill_step` of a step that has no noise yet."""
    return finish_step(predict, method, noised(predict, method, step, config), config, networks)


@torch.no_grad()
def finish_step(
    predict: Predict, method: Method, step: Step, config: DistillConfig, networks: Mapping[str, Network] | None
) -> tuple[Tensor, dict[str, float]]:
    """`distill_step` of a step that has its noise."""
    gradient, report = step_gradient(predict, method, step, config)
    if networks and hasattr(method, "after"):
        report |= method.after(step, networks)
    return gradient, {"t": float(step.t), **report}


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
    """A `Step` without noise. One text applies to all particles; the source's default prompt is the null prompt."""
    source_prompts = config.null_prompt if source_prompts is None or source_prompts == "" else source_prompts
    settings = {"steps": config.steps, "guidance_scale": config.guidance(number), "null_prompt": config.null_prompt}
    return Step(
        z, None, t, alphas_cumprod, _texts(prompts, len(z)), generator, number, **settings,
        source=None if source is None else source.to(z),
        source_prompts=None if source is None else _texts(source_prompts, len(z)),
        away=tuple((tuple(texts), weights) for texts, weights in away) if config.perp_neg else (), **context,
    )  # fmt: skip


def noised(predict: Predict, method: Method, step: Step, config: DistillConfig) -> Step:
    """The step with its noise: the method's own, else by config.noise."""
    if hasattr(method, "noise"):
        return method.noise(step, predict)
    if config.noise not in GIVEN:
        return replace(step, eps=draw_noise(step.z, config.noise, step.generator))
    if step.camera_noise is None:
        raise ValueError(f'noise is "{config.noise}": it needs camera_noise, a function of the views')
    return replace(step, eps=step.camera_noise.to(step.z))


@torch.no_grad()
def step_gradient(
    predict: Predict, method: Method, step: Step, config: DistillConfig
) -> tuple[Tensor, dict[str, float]]:
    """G [N, ...] of a step with noise, and what to log; "skipped" is 1 where G is not finite.

    With K instructions G = w(t) [Σ_k s_k SVGD_k(Δ_k) + (1 − Σ_k s_k) (√ᾱ_t/σ_t)(z − z̃)], s the shares. SVGD_k combines
    only the particles in which instruction k has a share, so that no instruction leaks into another's region. The rest
    is drawn to the source.
    """
    _check_step(method, step, config)
    steps = [step]  # one for each instruction
    if step.shares is not None:
        _ = step.z_t, step.source_t  # computed once, so that equal queries of the instructions share them
        rows = [share.flatten(1).any(1).nonzero()[:, 0] for share in step.shares]
        steps = [step.with_prompts(prompts, own) for prompts, own in zip(step.instructions, rows, strict=True)]
    queries = [_queries(method, one) for one in steps]
    answers = predict({f"{k}/{name}": query for k, asked in enumerate(queries) for name, query in asked.items()})
    named = [{name: answers[f"{k}/{name}"] for name in asked} for k, asked in enumerate(queries)]
    found = [method.direction(eps, one) for eps, one in zip(named, steps, strict=True)]
    deltas = [registry.returned("method", method, "direction", delta, Tensor) for delta in found]
    shared, reports = _combined(deltas, steps, step, config)
    gradient = step_weight(config.weight, step.alpha_bar) * shared
    found = {(k, key): value for k, one in enumerate(reports) for key, value in one.items()}
    found |= {"rms": gradient.float().square().mean().sqrt(), "finite": torch.isfinite(gradient).all()}
    found = to_host(found)
    report = {key: sum(found[k, key] for k in range(len(reports))) / len(reports) for key in reports[0]}
    together = config.svgd is not None and config.svgd.share and len(step.z) > 1
    if together and step.number == 0:
        _warn_if_blind(report, config)
    return gradient, {
        "together": float(together),
        "gradient_rms": found["rms"],
        "skipped": 1 - found["finite"],
        **report,
    }


def _combined(
    deltas: list[Tensor], steps: list[Step], step: Step, config: DistillConfig
) -> tuple[Tensor, list[dict[str, float | Tensor]]]:
    """G without w(t), and the diagnostics of every set of particles that was combined."""
    reports = []

    def combined(delta: Tensor, rows: Tensor) -> Tensor:
        features = None if step.features is None else step.features[rows]
        shared, report = combine(
            delta[rows], step.z_t[rows], step.z[rows], alpha_bar=step.alpha_bar, config=config.svgd, features=features
        )
        reports.append(report)
        return shared

    if step.shares is None:
        total = torch.empty_like(deltas[0])
        for rows in _members(step.groups, step.z):
            total[rows] = combined(deltas[0], rows)
        return total, reports
    rest = 1 - step.shares.sum(0)
    total = rest * math.sqrt(step.alpha_bar / (1 - step.alpha_bar)) * (step.z - step.source)
    for delta, one, share in zip(deltas, steps, step.shares, strict=True):
        if len(one.rows):
            total[one.rows] += share[one.rows] * combined(delta, one.rows)
    return total, reports or [
        combine(deltas[0][:1], step.z_t[:1], step.z[:1], alpha_bar=step.alpha_bar, config=None)[1]
    ]


@torch.no_grad()
def feature_gradient(
    features: Tensor, t: int, config: DistillConfig, alphas_cumprod: Tensor, groups: Tensor | None = None
) -> Tensor:
    """w(t) `feature_force` within each group: a gradient for the features [N, ...], beside `distill_step`'s G for z.

    For svgd.space "features"; t is the timestep that `distill_step` reported, `config` comes from `configured`.
    """
    alpha_bar = alphas_cumprod[t].item()
    force = torch.empty_like(features)
    for rows in _members(groups, features):
        force[rows] = feature_force(features[rows], alpha_bar=alpha_bar, config=config.svgd)
    return step_weight(config.weight, alpha_bar) * force


def _queries(method: Method, step: Step) -> dict[str, Query]:
    return registry.returned("method", method, "queries", method.queries(step), dict)


def configured(method: Method, config: DistillConfig) -> DistillConfig:
    """`config` with the method's `fixed` keys. ValueError where they do not go together."""
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
    """Every text that the prior may need in a run, each once, so that its text encoder can be dropped.

    `prompts`: those of particles; `away`: those of Perp-Neg's other views; `source_prompts`: those of sources. They are
    collected from the method's queries at both ends of the run and of the schedule.
    """
    config, texts = configured(method, config), {config.null_prompt: None}
    alphas, generator, z = torch.linspace(0.99, 0.01, 1000), torch.Generator(), torch.zeros(len(prompts), 1, 8, 8)

    def collect(queries: dict[str, Query]) -> dict[str, Tensor]:
        texts.update(dict.fromkeys(text for query in queries.values() for text in query.prompts))
        return {name: torch.zeros_like(query.z_t) for name, query in queries.items()}

    edits = "source" in getattr(method, "needs", ())
    sources = ([*source_prompts] * len(prompts))[: len(prompts)] if source_prompts else None
    for number in (0, config.steps - 1):
        for t in (0, 500, 999):
            step = new_step(
                z, t, number, config, alphas, generator, prompts=prompts, source=z if edits else None,
                source_prompts=sources, image=z,
                away=[(prompts, z[:, 0, 0, 0])] if config.perp_neg else (), camera_noise=z,
            )  # fmt: skip
            collect(_queries(method, noised(collect, method, step, config)))
    texts |= dict.fromkeys([*(source_prompts or []), *(away if config.perp_neg else [])])
    return list(texts)


def _texts(prompts: Sequence[str] | str, count: int) -> tuple[str, ...]:
    return (prompts,) * count if isinstance(prompts, str) else tuple(prompts)


def _members(groups: Tensor | None, particles: Tensor) -> list[Tensor]:
    """The rows of the particles in each group; without groups, all rows."""
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


def _warn_if_blind(report: dict[str, float], config: DistillConfig) -> None:
    """Warn where a given bandwidth makes all kernel values nearly 0, which switches sharing off."""
    if not isinstance(config.svgd.bandwidth, str) and report["kernel_mean"] < BLIND:
        text = "particles hardly share: mean kernel %.1e at the first step; lower %s.svgd.bandwidth, which is %g"
        logging.getLogger("csd3d").warning(text, report["kernel_mean"], config.PLACE, config.svgd.bandwidth)


def _name(method: Method) -> str:
    """The method's name in configs."""
    entry = registry.entry_of("method", method)
    return type(method).__name__ if entry is None else entry.name
