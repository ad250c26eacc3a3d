"""What an editor of a canvas is, and what it is given.

A canvas is the latents of a picture or a video, cut into windows. An editor is a frozen dataclass whose fields are its
config keys:

    @register("canvas_editor", "identity", title="Nothing at all")
    @dataclass(frozen=True)
    class Identity:
        edits: ClassVar[tuple[str, ...]] = ("picture", "video")

        def count_steps(self, canvas: Canvas) -> int:
            return 1

        def take_step(self, canvas: Canvas, phase: CanvasPhase, step: int) -> dict[str, float]:
            phase.z = canvas.latents.z.clone()
            return {"skipped": 0.0}

Symbols: z [F, C, H, W] latents of F frames; M windows of [C, h, w] that cover them; K instructions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from csd3d.canvas.latents import Latents, encode_clip
from csd3d.canvas.windows import Cover, Windows, even_windows, gather, normalised_weights, scatter, window_tracks
from csd3d.distillation.ddim import ddim_timesteps
from csd3d.distillation.method import Query
from csd3d.distillation.multidiffusion import window_shares
from csd3d.distillation.schedule import timestep
from csd3d.engine.phase import Phase
from csd3d.priors import Prior


class CanvasEditor(Protocol):
    """An editor, registered by `register("canvas_editor", name, title=...)`. It may have, besides:

    edits         what it can edit, of "picture" and "video"; both where it does not say
    regions       True where it follows several instructions, each in its own region (`Canvas.shares`)
    own_canvas(canvas) -> Canvas    where it works on other latents of the same clip
    """

    def count_steps(self, canvas: "Canvas") -> int:
        """How many calls of `take_step` the edit takes; checkpoints are made between them."""

    def take_step(self, canvas: "Canvas", phase: "CanvasPhase", step: int) -> dict[str, float]:
        """Does step `step`, which changes `phase`; what to log, "skipped" being 1 where it was not finite.

        It must depend on its arguments alone, so that a run can be resumed. At step 0 phase.z are the source's latents.
        """


@dataclass(kw_only=True)
class CanvasPhase(Phase):
    """The state of an edit: z [F, C, H, W] the edited latents, and `moved`, which is for editors that move z only now
    and then."""

    z: Tensor
    moved: Tensor

    TENSORS = ("z", "moved")


@dataclass
class Sampling:
    """How editors sample pictures by DDIM; an editor's own keys of the same names win over these."""

    steps: int = 50  # DDIM steps from `start` to a clean picture
    start: float = 1.0  # noise level of the first, a share of the schedule
    text_scale: float | None = None  # InstructPix2Pix's guidance by the instruction; null: what suits the model
    image_scale: float | None = None  # and by the source picture; null: what suits the model

    def __post_init__(self) -> None:
        check_sampling(self)

    def timesteps(self, num_train_timesteps: int) -> list[int]:
        """The timesteps of the DDIM steps, falling."""
        return ddim_timesteps(timestep(self.start, num_train_timesteps), self.steps)


def check_sampling(config: Any) -> None:
    """Raises ValueError for `steps` and `start` that make no sense; null is let through."""
    if config.steps is not None and config.steps < 1:
        raise ValueError(f"steps is {config.steps}: give at least 1")
    check_shares(config, "start")


def check_shares(config: Any, *keys: str) -> None:
    """Raises ValueError for a setting outside [0, 1]; null is let through."""
    for key in keys:
        if (value := getattr(config, key)) is not None and not 0 <= value <= 1:
            raise ValueError(f"{key} is {value}: give a number in [0, 1]")


@dataclass(eq=False)
class Canvas:
    """What an editor works on: the latents of a clip, the instructions, and the prior that it asks.

    instructions: K of them; `shares` [1, K, H, W] is what each has of every latent pixel, None where one has all.
    cover: the windows' size, and how they overlap.  sampling: what editors that sample have in common.
    generator(purpose): a random generator from the run's seed, always the same for a purpose.
    kept: for what an editor computes once; it starts empty in a resumed run.
    """

    prior: Prior
    latents: Latents
    instructions: list[str]
    cover: Cover
    sampling: Sampling = field(default_factory=Sampling)
    shares: Tensor | None = None
    generator: Callable[[str], torch.Generator] = lambda purpose: torch.Generator()
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.prior.device

    @cached_property
    def z(self) -> Tensor:
        """The source's latents [F, C, H, W] on the prior's device."""
        return self.latents.z.to(self.device)

    def predict(self, asked: dict[str, Query]) -> dict[str, Tensor]:
        """`prior.predict`; a query that needs none of its rows is answered by 0 without asking."""
        wanted = {name: query for name, query in asked.items() if query.rows is None or len(query.rows)}
        found = self.prior.predict(wanted) if wanted else {}
        return {name: found[name] if name in found else torch.zeros_like(query.z_t) for name, query in asked.items()}

    # --------------------------------------------------------------------------- in evenly spaced windows, M of them

    @cached_property
    def windows(self) -> Windows:
        """Evenly spaced windows that cover every frame, the same on each."""
        return even_windows(self.cover)

    @cached_property
    def weights(self) -> Tensor:
        """How much windows count at each of their pixels, [M, 1, h, w]: feathered, summing to 1 where they overlap."""
        on_one = normalised_weights(self.windows[self.windows.frame == 0], self.cover.shape[1:])
        return on_one.repeat(self.cover.shape[0], 1, 1, 1).to(self.device)

    @property
    def tracks(self) -> list[Tensor]:
        """The windows of each place in the order of their frames: a video each."""
        return window_tracks(self.windows)

    def gather(self, z: Tensor) -> Tensor:
        """The windows [M, C, h, w] of a canvas."""
        return gather(z, self.windows)

    def scatter(self, patches: Tensor) -> Tensor:
        """The adjoint of `gather`: [M, C, h, w] added up where they lie, [F, C, H, W]."""
        return scatter(patches, self.windows, tuple(self.z.shape))

    def merge(self, patches: Tensor) -> Tensor:
        """The canvas [F, C, H, W] of windows [M, C, h, w], averaged where they overlap."""
        return self.scatter(window_shares(self.weights, self.z, self.gather, self.scatter) * patches)

    def condition(self) -> Tensor:
        """The windows' source pictures as the prior takes them, [M, C, h, w]."""
        return self.gather(self.prior.condition_from_latent(self.z))

    def prompts(self, count: int) -> tuple[str, ...]:
        """The instruction, `count` times."""
        return (self.instructions[0],) * count

    def scaled(self, size: tuple[int, int]) -> "Canvas":
        """The same clip encoded at another working size (H', W'), each frame in one window."""
        old = self.latents
        new = encode_clip(self.prior, old.clip, size, wrap=False, pixels=old.codec.pixels)
        new.keep_detail, new.inside = old.keep_detail, old.inside
        cover = Cover((len(new.z), *new.z.shape[2:]), tuple(new.z.shape[2:]))
        return replace(self, latents=new, cover=cover, kept={})
