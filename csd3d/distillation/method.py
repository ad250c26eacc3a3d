"""A method of score distillation: the predictions it needs, and the direction it computes from them.

Symbols in all of `csd3d.distillation`: N particles, z [N, ...] their clean latents, t one timestep, ᾱ_t =
`alphas_cumprod[t]`, σ_t = √(1 − ᾱ_t), ε [N, ...] the step's noise, z_t = √ᾱ_t z + σ_t ε, and z̃ the source of an edit.
A direction Δ [N, ...] is *descended*; its unit is that of ε.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from csd3d.distillation.noise import add_noise


@dataclass(frozen=True, eq=False)
class Query:
    """A request for a prediction ε [N, ...] of `z_t` [N, ...] at timestep `t`.

    prompts: N texts.  image [N, C, h, w]: the source picture from `Prior.encode_condition`; None: no picture.
    network: "prior", or a network of the method (`Method.open`).  pose: camera-to-world [N, 12], row-major 3x4.
    view: azimuth and elevation in degrees and distance, [N, 3], for priors that take cameras.
    rows [R]: the rows that are needed, None for all; the others are returned as 0.

    A method's own network may take and return something else than z_t and ε, as LMC-SDS's does.
    """

    z_t: Tensor
    t: int
    prompts: tuple[str, ...]
    image: Tensor | None = None
    network: str = "prior"
    pose: Tensor | None = None
    view: Tensor | None = None
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.z_t):
            raise ValueError(f"a query has {len(self.z_t)} latents and {len(self.prompts)} prompts: one each")

    @property
    def key(self) -> tuple:
        """Equal for queries with the same t, prompts and network and identical (not just equal) tensors."""
        tensors = (self.z_t, self.image, self.pose, self.view, self.rows)
        return (self.network, self.t, self.prompts, *(id(tensor) for tensor in tensors))


Predict = Callable[[dict[str, Query]], dict[str, Tensor]]  # all predictions of a step, in one batched call


@dataclass(frozen=True, eq=False)
class Step:
    """The state of one step, for methods and for the engine (module `step`).

    For methods: z, eps, t, the schedule; `number` of `steps`; `prompts` [N] of the particles and `null_prompt` of the
    unconditional branch, which is not told `view` if `guides_view`; for methods that edit, `source` z̃ [N, ...] and
    `source_prompts` [N]; image, pose, view: see `Query`.  image_scale: ω_s, guidance by `image` (`guidance.guided`).
    away: Perp-Neg's other views, each as (prompts [N], weights [N]).  kept: results of the method's `noise`.

    For the engine: camera_noise [N, ...], the ε of config.noise "camera" and "surface".
    groups [N]: particles share within a group.  features [N, ...]: what the kernel compares with svgd.space "features".
    instructions, shares: K instructions ([N] prompts each) for the same particles, and the share of each at every
    latent pixel, [K, N, 1, h, w] ≥ 0 with a sum of at most 1; the rest follows the source.  rows: the particles that
    `prompts` apply to (None: all).
    """

    z: Tensor
    eps: Tensor | None
    t: int
    alphas_cumprod: Tensor
    prompts: tuple[str, ...]
    generator: torch.Generator
    number: int = 0
    steps: int = 1
    guidance_scale: float = 7.5
    image_scale: float = 1.0
    null_prompt: str = ""
    source: Tensor | None = None
    source_prompts: tuple[str, ...] | None = None
    image: Tensor | None = None
    pose: Tensor | None = None
    view: Tensor | None = None
    guides_view: bool = False
    away: tuple[tuple[tuple[str, ...], Tensor], ...] = ()
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    camera_noise: Tensor | None = None
    groups: Tensor | None = None
    instructions: tuple[tuple[str, ...], ...] = ()
    shares: Tensor | None = None
    rows: Tensor | None = None
    features: Tensor | None = None

    @cached_property
    def alpha_bar(self) -> float:
        """ᾱ_t; read once, because the host waits for it."""
        return self.alphas_cumprod[self.t].item()

    @cached_property
    def z_t(self) -> Tensor:
        """The particles noised to t."""
        return add_noise(self.z, self.eps, self.alpha_bar)

    @cached_property
    def source_t(self) -> Tensor:
        """The source noised to t, with the particles' own ε."""
        return add_noise(self.source, self.eps, self.alpha_bar)

    @property
    def fraction(self) -> float:
        """t as a fraction of the schedule."""
        return self.t / len(self.alphas_cumprod)

    @property
    def noise_ratio(self) -> float:
        """σ_t/√ᾱ_t."""
        return ((1 - self.alpha_bar) / self.alpha_bar) ** 0.5

    @property
    def progress(self) -> float:
        """The fraction of the run that is done, in [0, 1)."""
        return self.number / self.steps

    def query(
        self,
        prompt: str | tuple[str, ...] | None = None,
        *,
        of: str = "target",
        image: bool = False,
        network: str = "prior",
        z_t: Tensor | None = None,
        t: int | None = None,
    ) -> Query:
        """A query of the "target" or the "source" with `prompt` (None: their own), at the step's z_t and t by default.

        image: whether an editing model gets the source picture.
        """
        own = self.source_prompts if of == "source" else self.prompts
        prompt = own if prompt is None else prompt
        prompts = (prompt,) * len(self.z) if isinstance(prompt, str) else tuple(prompt)
        if z_t is None:
            z_t = self.source_t if of == "source" else self.z_t
        rows = self.rows if prompt is self.prompts else None  # instructions share the other branches
        t = self.t if t is None else t
        view = None if self.guides_view and prompt == self.null_prompt else self.view
        return Query(z_t, t, prompts, self.image if image else None, network, self.pose, view, rows)

    def with_prompts(self, prompts: tuple[str, ...], rows: Tensor | None = None) -> "Step":
        """The same step with other prompts, for the particles `rows`.

        It keeps the same tensors, so that equal branches of several instructions stay equal queries.
        """
        other = replace(self, prompts=prompts, rows=rows)
        other.__dict__.update({k: v for k, v in vars(self).items() if k in ("z_t", "source_t")})
        return other


class Host(Protocol):
    """The part of a prior that a method uses to open its networks."""

    unet_evaluations: int
    device: torch.device

    def lora(self, rank: int, generator: torch.Generator) -> Any:
        """A trainable score of the renders on the prior's own weights; InputError where it supports none."""

    def expected(self, folder: str) -> torch.nn.Module:
        """LMC-SDS's trained b_ψ(z, t); InputError where the folder has none."""


class Network(Protocol):
    """A method's own network: VSD's LoRA, LMC-SDS's b_ψ."""

    def answer(self, query: Query) -> Tensor:
        """The prediction [N, ...] for a query of this network, without a graph."""

    def reset(self, generator: torch.Generator) -> None:
        """Draw initial weights; does nothing where nothing is trained."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters; empty where nothing is trained."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a checkpoint needs, with the optimiser's state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class FixedNetwork:
    """A `Network` of which nothing is trained; it needs `answer`."""

    def reset(self, generator: torch.Generator) -> None: ...

    def parameters(self) -> list[torch.nn.Parameter]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Method(Protocol):
    """A method: a frozen dataclass whose fields are its config keys, registered by `register("method", name)`.

        queries = method.queries(step)            # name -> Query
        eps = prior.predict(queries, networks)    # one batched call; equal queries are computed once
        delta = method.direction(eps, step)

    Optional attributes:

        needs       what a job must provide: "source" (z̃), "image" (an editing model)
        fixed       keys of `DistillConfig` that the method sets, such as SDI's weight; they override the config's. A
                    mapping under "svgd" overrides single keys of it
        pictures    True if z are the pictures themselves, [N, 3, S, S] in [0, 1], which a network of its own judges
        together    True if it acts between particles by itself, without SVGD, as particle guidance does
        perp_neg    True if Perp-Neg can be applied to its guided prediction
        noise(step, predict) -> Step          for a method with its own ε: the step with `eps`, and `kept` results
        open(prior) -> dict[str, Network]     its networks by name; InputError where the prior does not support them
        after(step, networks) -> dict[str, float]     train them on the step's particles; return what to log
    """

    needs: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[Mapping[str, object]] = {}

    def queries(self, step: Step) -> dict[str, Query]: ...

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor: ...
