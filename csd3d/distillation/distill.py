"""Score distillation of particles towards a text: every method as one step, with or without SVGD between the particles.

Symbols: z [N, ...] latents of the particles (renders of one NeRF, of N NeRFs, or images), z̃ those of a source that is
edited, ε their noise, t one timestep for all. The network is reached through one callable, one batched call a
prediction:

    predict(z_stack [B*N, ...], t, branches) -> eps [B*N, ...]

Rows come in B groups of N, group b under branches[b]: "null" (empty prompt), "text", "negative" (NFSD's negative
prompt), "good" and "bad" (SDS-Bridge's descriptions), "lora" (VSD's network of the renders), "away" and "away2"
(Perp-Neg's other views); all at z_t, but "source_null" and "source_text" (DDS, PDS) at z̃_t, noised with the same ε.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from csd3d.distillation.correspondence import Correspondence
from csd3d.distillation.ddim import ddim_invert, ddim_timesteps
from csd3d.distillation.directions import bridge, dds, lmc, nfsd, pds, pds_coefficients, sds, vsd
from csd3d.distillation.guidance import cfg, perp_neg
from csd3d.distillation.noise import NOISES, add_noise, draw_noise, implied_noise
from csd3d.distillation.schedule import (
    WEIGHTS,
    annealed_fraction,
    check_timesteps,
    scheduled_timestep,
    stage,
    step_weight,
)
from csd3d.distillation.svgd import SVGDConfig, combine, feature_force

PredictBranches = Callable[[Tensor, int, tuple[str, ...]], Tensor]
METHODS = ("sds", "bridge", "nfsd", "vsd", "lmc", "dds", "pds")
SOURCES = (*NOISES, "camera", "inverted")
GUIDED = ("sds", "vsd", "lmc")  # methods that use one guided prediction, which Perp-Neg can shape
EDITS = ("dds", "pds")  # methods that compare the particles with a source


@dataclass
class DistillConfig:
    """Settings of `distill_step`; times are fractions of the schedule.

    `method`: "sds", "bridge" (SDS-Bridge), "nfsd", "vsd", "lmc", "dds", "pds". Two more methods are a noise source
    under "sds": FSD is noise "camera", SDI is noise "inverted" with weight "x0". `guidance_final`: what
    guidance_scale comes to at the last step, linearly (null: it stays); strong guidance finds the shape, and at low
    noise burns the colours. `schedule`: as CSD-Edit's; SDS-Bridge changes its stage at `switch` of the steps whatever
    the schedule. `inversion_*`: DDIM steps up to t at most, the guidance scale they use, and the share of fresh noise
    mixed in afterwards. `perp_neg`: views that a particle is not are held away from it. `psi`: how strongly PDS holds z
    to z̃, Δ = ψ (z − z̃) + DDS's (the paper's ψ/χ); 0 is DDS, null the authors' own, 0.06 at t = 900 and 2.7 at 100.
    `svgd` null: every particle for itself.
    """

    method: str = "sds"
    steps: int = 1000
    guidance_scale: float = 7.5
    guidance_final: float | None = None
    weight: str = "sigma2"
    schedule: str = "uniform"
    t_min: float = 0.02
    t_max: float = 0.98
    t_late: float = 0.5
    switch: float = 0.5
    noise: str = "independent"
    inversion_steps: int = 10
    inversion_scale: float = -7.5
    inversion_noise: float = 0.3
    perp_neg: bool = False
    psi: float | None = None
    svgd: SVGDConfig | None = None

    def __post_init__(self):
        for key, known in {"method": METHODS, "weight": WEIGHTS, "noise": SOURCES}.items():
            if getattr(self, key) not in known:
                raise ValueError(f"{key} is {getattr(self, key)!r}: choose one of {', '.join(known)}")
        for key in ("steps", "inversion_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a whole number of at least 1")
        if not 0 <= self.inversion_noise <= 1:
            raise ValueError(f"inversion_noise is {self.inversion_noise}: give a share in [0, 1]")
        if self.perp_neg and self.method not in GUIDED:
            raise ValueError(f"perp_neg is for {', '.join(GUIDED)}: with method {self.method} set it to false")
        if self.noise == "inverted" and self.method in EDITS:
            raise ValueError(f'noise is "inverted", each particle\'s own, and {self.method} needs one that its source '
                             'can share: choose independent, shared or camera')  # fmt: skip
        if self.psi is not None and not 0 <= self.psi < math.inf:
            raise ValueError(f"psi is {self.psi}: give a number of at least 0, or null for the authors'")
        check_timesteps(self)

    def guidance(self, step: int) -> float:
        """The guidance scale of a step."""
        if self.guidance_final is None:
            return self.guidance_scale
        return annealed_fraction(step, self.steps, self.guidance_final, self.guidance_scale)


@dataclass(frozen=True)
class Extras:
    """What only some methods need: `camera_noise` [N, ...], the ε of noise "camera" (`world_noise`); `expected(z, t)`,
    LMC's b_ψ; `away` [N, 2], Perp-Neg's weights of "away" and "away2"; `source` [N, ...], the z̃ of DDS and PDS;
    `groups` [N], within which particles share; `correspondence` of all N, which of their pixels share (None: those at
    the same address); `features` [N, ...], what the kernel of svgd.space "features" compares."""

    camera_noise: Tensor | None = None
    expected: Callable[[Tensor, int], Tensor] | None = None
    away: Tensor | None = None
    source: Tensor | None = None
    groups: Tensor | None = None
    correspondence: Correspondence | None = None
    features: Tensor | None = None


@torch.no_grad()
def distill_step(
    predict: PredictBranches,
    z: Tensor,
    step: int,
    config: DistillConfig,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    extras: Extras = Extras(),
) -> tuple[Tensor, dict[str, float]]:
    """G [N, ...], to be descended by z and through it by whatever made z, and diagnostics.

    A step is a function of its arguments: with the generator's state, a resumed run goes on as an unbroken one.
    ValueError where the method needs an extra that is not given.
    """
    config = replace(config, guidance_scale=config.guidance(step), guidance_final=None)
    t = scheduled_timestep(config, step, len(alphas_cumprod), generator)
    alpha_bar = alphas_cumprod[t].item()
    eps = particle_noise(predict, z, t, config, alphas_cumprod, generator, extras.camera_noise)
    noisy = add_noise(z, eps, alpha_bar)
    names = branches(config, step, t, len(alphas_cumprod))
    source = add_noise(_source(config, extras, z), eps, alpha_bar) if config.method in EDITS else noisy
    stack = torch.cat([source if name.startswith("source") else noisy for name in names])
    found = dict(zip(names, predict(stack, t, names).chunk(len(names)), strict=True))
    delta = _direction(config, found, extras, z, eps, noisy, t, alphas_cumprod)
    # z_t without the shared noise: brought to other pixels it would not cancel
    noise_free = config.noise == "shared" and extras.correspondence is not None
    seen = alpha_bar**0.5 * z if noise_free else noisy
    shared, report = _share(delta, seen, z, alpha_bar, config.svgd, extras)
    gradient = step_weight(config.weight, alpha_bar) * shared
    return gradient, {"t": float(t), "gradient_rms": gradient.float().square().mean().sqrt().item(), **report}


@torch.no_grad()
def feature_gradient(
    features: Tensor, t: int, config: DistillConfig, alphas_cumprod: Tensor, groups: Tensor | None = None
) -> Tensor:
    """w(t) `feature_force` within each group: what the features [N, ...] are to descend beside `distill_step`'s G.

    For svgd.space "features"; t is the timestep that `distill_step` reported.
    """
    alpha_bar = alphas_cumprod[t].item()
    force = torch.empty_like(features)
    for own in _members(groups, features):
        force[own] = feature_force(features[own], alpha_bar=alpha_bar, config=config.svgd)
    return step_weight(config.weight, alpha_bar) * force


def _members(groups: Tensor | None, particles: Tensor) -> list[Tensor]:
    """Which of the particles are in each group, [N] bool each; all where there are none."""
    groups = torch.zeros(len(particles), dtype=torch.long) if groups is None else groups
    return [(groups == group).to(particles.device) for group in groups.unique()]


def _share(
    delta: Tensor, noisy: Tensor, z: Tensor, alpha_bar: float, config: SVGDConfig | None, extras: Extras
) -> tuple[Tensor, dict[str, float]]:
    """The combiner's G without w(t), within each group, and the mean of the groups' diagnostics."""
    shared, reports = torch.empty_like(delta), []
    for own in _members(extras.groups, z):
        among = None if extras.correspondence is None else extras.correspondence.select(own)
        features = None if extras.features is None else extras.features[own]
        options = {"alpha_bar": alpha_bar, "config": config, "sharing": among, "features": features}
        shared[own], report = combine(delta[own], noisy[own], z[own], **options)
        reports.append(report)
    return shared, {key: sum(report[key] for report in reports) / len(reports) for key in reports[0]}


def branches(config: DistillConfig, step: int, t: int, num_train_timesteps: int = 1000) -> tuple[str, ...]:
    """What the network is asked for at a step; nothing that the method would multiply by zero."""
    if config.method == "bridge" and stage(step, config.steps, config.switch) == 2:
        return ("good", "bad")
    if config.method == "nfsd":
        return ("null", "text") if 1000 * t < 200 * num_train_timesteps else ("null", "text", "negative")
    guided = ("text",) if config.guidance(step) == 1 and not config.perp_neg else ("null", "text")
    guided += ("away", "away2") if config.perp_neg else ()
    guided += tuple(f"source_{name}" for name in guided) if config.method in EDITS else ()
    return (*guided, "lora") if config.method == "vsd" else guided


def possible_branches(config: DistillConfig) -> set[str]:
    """Every prompt that the network may be asked for at any step, "lora" apart: it has the text's."""
    ends = ((step, t) for step in (0, config.steps - 1) for t in (0, 1000))
    found = {"null", "text"}.union(*(branches(config, step, t) for step, t in ends))
    return found - {"lora"}


def particle_noise(
    predict: PredictBranches,
    z: Tensor,
    t: int,
    config: DistillConfig,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    camera_noise: Tensor | None = None,
) -> Tensor:
    """ε [N, ...] of the step by config.noise; ValueError where "camera" has no `camera_noise`.

    "inverted" is SDI's (arXiv 2405.15891): the ε whose z_t is z's own DDIM inversion, √(1 − η²) of it and η of fresh
    noise.
    """
    if config.noise == "camera":
        if camera_noise is None:
            raise ValueError('noise is "camera": it needs camera_noise, a function of the views')
        return camera_noise.to(z)
    if config.noise != "inverted":
        return draw_noise(z, config.noise, generator)

    def guided(z_t: Tensor, at: int) -> Tensor:
        null, text = predict(torch.cat([z_t] * 2), at, ("null", "text")).chunk(2)
        return cfg(null, text, config.inversion_scale)

    z_t = ddim_invert(guided, z, alphas_cumprod, ddim_timesteps(t, config.inversion_steps)[::-1])
    inverted, eta = implied_noise(z_t, z, alphas_cumprod[t].item()), config.inversion_noise
    return math.sqrt(1 - eta**2) * inverted + eta * draw_noise(z, "independent", generator)


def _direction(
    config: DistillConfig,
    found: dict[str, Tensor],
    extras: Extras,
    z: Tensor,
    eps: Tensor,
    noisy: Tensor,
    t: int,
    alphas_cumprod: Tensor,
) -> Tensor:
    """Δ [N, ...] of config.method from the predictions `found`."""
    if "good" in found:
        return bridge(found["good"], found["bad"])
    if config.method == "nfsd":
        return nfsd(found["null"], found["text"], found.get("negative"), config.guidance_scale)
    guided = _guided(config, found, extras.away)
    if config.method == "vsd":
        return vsd(guided, found["lora"])
    if config.method == "lmc":
        return lmc(guided, _expected(extras, z, t), noisy, alphas_cumprod[t].item())
    if config.method not in EDITS:
        return sds(guided, eps)
    guided_source = _guided(config, found, None, "source_")
    if config.method == "dds":
        return dds(guided, guided_source)
    return pds(z, extras.source.to(z), guided, guided_source, _psi(config, t, alphas_cumprod), 1.0)


def _guided(config: DistillConfig, found: dict[str, Tensor], away: Tensor | None, of: str = "") -> Tensor:
    """ε^ω [N, ...] under the text, of the particles or "source_"."""
    if f"{of}null" not in found:
        return found[f"{of}text"]
    if not config.perp_neg:
        return cfg(found[f"{of}null"], found[f"{of}text"], config.guidance_scale)
    if away is None:
        raise ValueError("perp_neg is on: it needs away, the weights [N, 2] of the other views")
    others = [found["away"], found["away2"]]
    return perp_neg(found["null"], found["text"], others, away, config.guidance_scale)


def _expected(extras: Extras, z: Tensor, t: int) -> Tensor:
    """b_ψ(z, t) [N, ...]."""
    if extras.expected is None:
        raise ValueError("method is lmc: it needs expected(z, t), its trained b_ψ")
    return extras.expected(z, t)


def _source(config: DistillConfig, extras: Extras, z: Tensor) -> Tensor:
    """z̃ [N, ...]."""
    if extras.source is None or extras.source.shape != z.shape:
        found = "nothing" if extras.source is None else tuple(extras.source.shape)
        raise ValueError(f"method is {config.method}: it needs source, latents {tuple(z.shape)} to edit, got {found}")
    return extras.source.to(z)


def _psi(config: DistillConfig, t: int, alphas_cumprod: Tensor) -> float:
    """config.psi, or the authors' ψ/χ at t, with their t' = t − 2 and the α of one step (at t < 2 that of t = 2).

    Their Δ over χ is in units of ε, as every method's; χ, which as a weight is lost, is about 0.1 from t = 100 on.
    """
    if config.psi is not None:
        return config.psi
    t = max(t, 2)
    before, previous, now = alphas_cumprod[t - 2 : t + 1].tolist()
    psi, chi = pds_coefficients(now, before, now / previous)
    return psi / chi
