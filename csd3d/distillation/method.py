"""What a method of score distillation is: the predictions that it asks for, and what it makes of the answers.

Symbols, as in all of `csd3d.distillation`: N particles, z [N, ...] their clean latents, t one timestep, ᾱ_t =
`alphas_cumprod[t]`, σ_t = √(1 − ᾱ_t), ε [N, ...] the step's noise, z_t = √ᾱ_t z + σ_t ε, and z̃ a source that is
edited. A direction Δ [N, ...] is what is *descended*, in units of ε.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from csd3d.distillation.noise import add_noise


@dataclass(frozen=True, eq=False)
class Query:
    """One prediction ε [N, ...] that a method asks for: of `z_t` [N, ...] at timestep `t`, under these conditions.

    prompts: N texts.  image: the source picture as an editing model takes it (`Prior.encode_condition`), [N, C, h, w];
    None is no picture.  network: "prior", or a network of the method's own (`Method.open`).  pose: camera-to-world
    [N, 12], row-major 3x4.  view: azimuth and elevation in degrees and distance, [N, 3], for priors that know cameras.
    rows [R]: the rows that are needed, None for all; the others come back as 0.
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
        """Equal for queries that have the same answer: the same tensors (not equal ones), t, prompts and network."""
        tensors = (self.z_t, self.image, self.pose, self.view, self.rows)
        return (self.network, self.t, self.prompts, *(id(tensor) for tensor in tensors))


@dataclass(frozen=True, eq=False)
class Step:
    """All that a method may look at in one step.

    number, steps: which step of how many.  prompts, null_prompt: what the particles show (N texts), and what the
    unconditional branch is told.  source, source_prompts: z̃ and what it shows, of methods that edit.  image, pose,
    view: see `Query`.  away: Perp-Neg's other views, (prompts of all particles, weights [N]) each.
    """

    z: Tensor
    eps: Tensor
    t: int
    alphas_cumprod: Tensor
    prompts: tuple[str, ...]
    generator: torch.Generator
    number: int = 0
    steps: int = 1
    guidance_scale: float = 7.5
    null_prompt: str = ""
    source: Tensor | None = None
    source_prompts: tuple[str, ...] | None = None
    image: Tensor | None = None
    pose: Tensor | None = None
    view: Tensor | None = None
    away: tuple[tuple[tuple[str, ...], Tensor], ...] = ()

    @property
    def alpha_bar(self) -> float:
        """ᾱ_t."""
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
        """t as a share of the schedule."""
        return self.t / len(self.alphas_cumprod)

    def query(
        self, prompt: str | tuple[str, ...] | None = None, *, of: str = "target", image: bool = False, network="prior"
    ) -> Query:
        """The prediction at the step's t, of the "target" or the "source", under `prompt` (None: the particles' own).

        image: whether an editing model sees the source picture.
        """
        prompt = self.prompts if prompt is None else prompt
        prompts = (prompt,) * len(self.z) if isinstance(prompt, str) else prompt
        z_t = self.source_t if of == "source" else self.z_t
        shown = self.image if image else None
        return Query(z_t, self.t, prompts, shown, network, self.pose, self.view)


class Network(Protocol):
    """A network of a method's own, beside the prior: VSD's LoRA, LMC-SDS's b_ψ."""

    def answer(self, query: Query) -> Tensor: ...


class Method(Protocol):
    """A method: a frozen dataclass whose fields are its keys in a config, registered by `register("method", name)`.

        asked = method.queries(step)              # name -> Query
        eps = prior.predict(asked, networks)      # one batched call; equal queries are computed once
        delta = method.direction(eps, step)

    needs: what a job must have, of "source" (z̃) and "image" (an editing model).
    fixed: keys of `DistillConfig` that are part of the method, such as SDI's weight: they win over the config's.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[Mapping[str, object]] = {}

    def queries(self, step: Step) -> dict[str, Query]: ...

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor: ...
