"""What a method of score distillation is: the predictions that it asks for, and what it makes of the answers.

Symbols, as in all of `csd3d.distillation`: N particles, z [N, ...] their clean latents, t one timestep, ᾱ_t =
`alphas_cumprod[t]`, σ_t = √(1 − ᾱ_t), ε [N, ...] the step's noise, z_t = √ᾱ_t z + σ_t ε, and z̃ a source that is
edited. A direction Δ [N, ...] is what is *descended*, in units of ε.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from csd3d.distillation.noise import add_noise
from csd3d.distillation.svgd import Sharing


@dataclass(frozen=True, eq=False)
class Query:
    """One prediction ε [N, ...] that a method asks for: of `z_t` [N, ...] at timestep `t`, under these conditions.

    prompts: N texts.  image: the source picture as an editing model takes it (`Prior.encode_condition`), [N, C, h, w];
    None is no picture.  network: "prior", or a network of the method's own (`Method.open`).  pose: camera-to-world
    [N, 12], row-major 3x4.  view: azimuth and elevation in degrees and distance, [N, 3], for priors that know cameras.
    rows [R]: the rows that are needed, None for all; the others come back as 0.

    A network of a method's own may take and give something else than z_t and ε, as LMC-SDS's does.
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


Predict = Callable[[dict[str, Query]], dict[str, Tensor]]  # all the predictions of a step, in one batched call


@dataclass(frozen=True, eq=False)
class Step:
    """All that a method may look at in one step, and what the engine (`step`) has to know of the particles.

    Of the method: z, eps, t, the schedule; `number` of `steps`; `prompts` [N], what the particles show, and
    `null_prompt`, what the unconditional branch is told; `source` z̃ [N, ...] and `source_prompts` [N] of methods that
    edit; image, pose, view: see `Query`.  away: Perp-Neg's other views, (prompts [N], weights [N]) of each.
    kept: what the method's own `noise` found on the way.

    Of the engine: camera_noise [N, ...], the ε of config.noise "camera".  groups [N]: particles share within theirs.
    instructions, shares: K instructions ([N] prompts each) for one set of particles, and what each has of every latent
    pixel, [K, N, 1, h, w] ≥ 0 with a sum of at most 1; what is left over is held to the source.  rows: the particles
    that `prompts` are for (None: all).  sharing: another way to share than by address, such as a `Correspondence`.
    features [N, ...]: what the kernel of svgd.space "features" compares.
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
    null_prompt: str = ""
    source: Tensor | None = None
    source_prompts: tuple[str, ...] | None = None
    image: Tensor | None = None
    pose: Tensor | None = None
    view: Tensor | None = None
    away: tuple[tuple[tuple[str, ...], Tensor], ...] = ()
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    camera_noise: Tensor | None = None
    groups: Tensor | None = None
    instructions: tuple[tuple[str, ...], ...] = ()
    shares: Tensor | None = None
    rows: Tensor | None = None
    sharing: Sharing | None = None
    features: Tensor | None = None

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

    @property
    def noise_ratio(self) -> float:
        """σ_t/√ᾱ_t."""
        return ((1 - self.alpha_bar) / self.alpha_bar) ** 0.5

    @property
    def progress(self) -> float:
        """How much of the run lies behind, in [0, 1)."""
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
        """The prediction of the "target" or the "source", under `prompt` (None: their own), at the step's z_t and t.

        image: whether an editing model sees the source picture.  `z_t`, `t`: another latent, another timestep.
        """
        own = self.source_prompts if of == "source" else self.prompts
        prompt = own if prompt is None else prompt
        prompts = (prompt,) * len(self.z) if isinstance(prompt, str) else tuple(prompt)
        if z_t is None:
            z_t = self.source_t if of == "source" else self.z_t
        rows = self.rows if prompt is self.prompts else None  # the other branches are every instruction's
        t = self.t if t is None else t
        return Query(z_t, t, prompts, self.image if image else None, network, self.pose, self.view, rows)

    def told(self, prompts: tuple[str, ...], rows: Tensor | None = None) -> "Step":
        """The same step under other prompts, which only the particles `rows` need.

        Its latents are the very same tensors, so that branches that are told the same stay equal queries.
        """
        other = replace(self, prompts=prompts, rows=rows)
        other.__dict__.update({k: v for k, v in vars(self).items() if k in ("z_t", "source_t")})
        return other


class Host(Protocol):
    """The prior, as a method that has networks of its own sees it when it opens them."""

    unet_evaluations: int

    def lora(self, rank: int, generator: torch.Generator) -> Any:
        """A trainable score of the renders on the prior's own weights; InputError where it can carry none."""

    def expected(self, folder: str) -> torch.nn.Module:
        """LMC-SDS's trained b_ψ(z, t); InputError where the folder holds none."""


class Network(Protocol):
    """A network of a method's own, beside the prior: VSD's LoRA, LMC-SDS's b_ψ."""

    def answer(self, query: Query) -> Tensor:
        """What it says of a query whose `network` is its name, [N, ...], without a graph."""

    def reset(self, generator: torch.Generator) -> None:
        """Starts anew; does nothing where nothing is trained."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained; empty where nothing is."""

    def state_dict(self) -> dict[str, Any]:
        """All that a run must save to go on as an unbroken one, its optimiser's state included."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Method(Protocol):
    """A method: a frozen dataclass whose fields are its keys in a config, registered by `register("method", name)`.

        asked = method.queries(step)              # name -> Query
        eps = prior.predict(asked, networks)      # one batched call; equal queries are computed once
        delta = method.direction(eps, step)

    It may have, besides:

        needs       what a job must have, of "source" (z̃) and "image" (an editing model)
        fixed       keys of `DistillConfig` that are part of the method, such as SDI's weight: they win over the
                    config's; a mapping under "svgd" changes those of its keys
        perp_neg    True where Perp-Neg can shape its guided prediction
        noise(step, predict) -> Step          where ε is not drawn: the step with its `eps`, and what was `kept`
        open(prior) -> dict[str, Network]     its networks by name; InputError where the prior cannot carry them
        after(step, networks) -> dict[str, float]     trains them on the step's particles; what to log
    """

    needs: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[Mapping[str, object]] = {}

    def queries(self, step: Step) -> dict[str, Query]: ...

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor: ...
