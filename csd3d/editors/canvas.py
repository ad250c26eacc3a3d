"""The protocol of canvas editors, and the canvas that they work on.

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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from csd3d.canvas.latents import Latents, encode_clip
from csd3d.canvas.windows import Cover, Windows, even_windows, gather, normalised_weights, scatter, window_tracks
from csd3d.distillation.ddim import ddim_timesteps
from csd3d.distillation.method import Query
from csd3d.distillation.multidiffusion import window_shares
from csd3d.distillation.samplers import Sampler
from csd3d.distillation.schedule import timestep
from csd3d.engine.phase import Phase
from csd3d.errors import InputError, at_key
from csd3d.priors import Prior
from csd3d.priors.queries import check_image_scale
from csd3d.schema import Within


class CanvasEditor(Protocol):
    """An editor, registered by `register("canvas_editor", name, title=...)`. Optional members:

    edits                           what it can edit, of "picture" and "video"; default both
    regions                         True if it follows several instructions, each in its region (`Canvas.shares`)
    inverts                         True if it starts from a DDIM inversion, and so must sample by DDIM
    own_canvas(canvas) -> Canvas    other latents of the same clip to work on
    check(prior)                    raises InputError for a prior it cannot use, before any work is done
    """

    def count_steps(self, canvas: "Canvas") -> int:
        """The number of calls of `take_step`; checkpoints are made between them."""

    def take_step(self, canvas: "Canvas", phase: "CanvasPhase", step: int) -> dict[str, float]:
        """Do step `step` on `phase`; return values to log, with "skipped" = 1 if the result was not finite.

        The step may depend on its arguments only, so that a run can be resumed. At step 0 phase.z is the source.
        """


@dataclass(kw_only=True)
class CanvasPhase(Phase):
    """The state of an edit: the edited latents z [F, C, H, W], and `moved`, a sum of changes not yet added to z."""

    z: Tensor
    moved: Tensor

    TENSORS = ("z", "moved")


@dataclass
class Sampling:
    """Settings of all editors that sample; an editor's own keys of the same names override them."""

    steps: Annotated[int, Within(1, 10_000)] = 50  # steps from `start` to a clean picture
    start: float = 1.0  # noise level of the first step, a share of the schedule
    text_scale: float | None = None  # guidance by the instruction; null: the model's default
    image_scale: float | None = None  # guidance by the source picture; null: the model's default
    sampler: Sampler = "ddim"  # ddim, euler or dpm++: how each step is taken

    def __post_init__(self) -> None:
        check_sampling(self)

    def timesteps(self, num_train_timesteps: int) -> list[int]:
        """The timesteps of the steps, in falling order."""
        return ddim_timesteps(timestep(self.start, num_train_timesteps), self.steps)


def check_sampling(config: Any) -> None:
    """Raise ValueError unless `steps` ≥ 1 and `start` is in [0, 1]; None is allowed."""
    if config.steps is not None and config.steps < 1:
        raise ValueError(f"steps is {config.steps}: give at least 1")
    check_shares(config, "start")


def check_samplers(sampling: Sampling, editors: Mapping[str, CanvasEditor]) -> None:
    """Raise ValueError for an editor that would undo a DDIM inversion by another sampler."""
    for name, editor in editors.items():
        own = getattr(editor, "sampler", None)
        if getattr(editor, "inverts", False) and (own or sampling.sampler) != "ddim":
            key, base = "sampling.sampler", name.partition("+")[0]
            key = f"editors.{base}.sampler" if own else key
            raise ValueError(
                f"{key} is {own or sampling.sampler!r}, but {name}, as set, starts from a DDIM inversion, which only "
                f"DDIM undoes: set editors.{base}.sampler=ddim, or leave {name} out"
            )


def check_shares(config: Any, *keys: str) -> None:
    """Raise ValueError for settings outside [0, 1]; None is allowed."""
    for key in keys:
        if (value := getattr(config, key)) is not None and not 0 <= value <= 1:
            raise ValueError(f"{key} is {value}: give a number in [0, 1]")


@dataclass(eq=False)
class Canvas:
    """What an editor works on: the latents of a clip, the instructions and the prior.

    instructions: K of them.  shares [1, K, H, W]: the share of each in every latent pixel; None: one instruction.
    cover: the windows' size and overlap.  sampling: the job's settings for editors that sample.
    generator(purpose): a random generator seeded by the run's seed and the purpose.
    kept: results that an editor computes once; empty at the start of a resumed run.
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

    @cached_property
    @torch.no_grad()
    def image(self) -> Tensor:
        """The source as the prior's image condition [F, ...], which windows are cut from as from z."""
        return self.prior.condition_from_latent(self.z)

    def predict(self, asked: dict[str, Query]) -> dict[str, Tensor]:
        """`prior.predict`, with zeros for queries of which no row is needed."""
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
        """The windows' weights [M, 1, h, w]: feathered, summing to 1 at every pixel of the canvas."""
        on_one = normalised_weights(self.windows[self.windows.frame == 0], self.cover.shape[1:])
        return on_one.repeat(self.cover.shape[0], 1, 1, 1).to(self.device)

    @property
    def tracks(self) -> list[Tensor]:
        """The windows at each place in the order of their frames; each list is a video."""
        return window_tracks(self.windows)

    def gather(self, z: Tensor) -> Tensor:
        """The windows [M, C, h, w] of a canvas."""
        return gather(z, self.windows)

    def scatter(self, patches: Tensor) -> Tensor:
        """Add windows [M, C, h, w] up on a canvas [F, C, H, W]; the adjoint of `gather`."""
        return scatter(patches, self.windows, tuple(self.z.shape))

    def merge(self, patches: Tensor) -> Tensor:
        """Average windows [M, C, h, w] to a canvas [F, C, H, W] by `weights`."""
        return self.scatter(window_shares(self.weights, self.z, self.gather, self.scatter) * patches)

    def condition(self) -> Tensor:
        """The windows' source pictures as the prior's image condition, [M, C, h, w]."""
        return self.gather(self.image)

    def prompts(self, count: int) -> tuple[str, ...]:
        """The instruction, `count` times."""
        return (self.instructions[0],) * count

    def scaled(self, size: tuple[int, int]) -> "Canvas":
        """The same clip encoded at working size (H', W'), with one window per frame."""
        old = self.latents
        new = encode_clip(self.prior, old.clip, size, wrap=False, pixels=old.codec.pixels)
        new.keep_detail, new.inside = old.keep_detail, old.inside
        cover = Cover((len(new.z), *new.z.shape[2:]), tuple(new.z.shape[2:]))
        return replace(self, latents=new, cover=cover, kept={})


def make_cover(latents: Latents, window: int, overlap: float) -> Cover:
    """The cover of latents by square windows of `window` latent pixels, cut to the latents' size if that is smaller."""
    frames, _, height, width = latents.z.shape
    size = (min(window, height), min(window, width))
    return Cover((frames, height, width), size, wrap=latents.codec.wrap, overlap=overlap)


def window_side(prior: Prior, window: int | None) -> int:
    """Latent pixels along a window's side: `window` if given, else the prior's training size."""
    trained = prior.outline.config.get("sample_size")
    trained = min(trained) if isinstance(trained, (list, tuple)) else trained
    return window or trained or prior.defaults.working_size // prior.codec.downscale


def check_prior(prior: Prior, window: int, sampling: Sampling, editors: Mapping[str, CanvasEditor]) -> None:
    """Raise InputError for a prior that cannot do what the job's keys say, before any work is done.

    window: the side in latent pixels; a transformer takes whole tokens.
    """
    whole = prior.codec.multiple // prior.codec.downscale
    if window % whole:
        raise InputError(f"window: {window} latent pixels: {prior.family} takes multiples of {whole}")
    check_image_scale(prior, sampling.image_scale, "sampling.image_scale")
    for name, editor in editors.items():
        check_image_scale(prior, getattr(editor, "image_scale", None), f"editors.{name}.image_scale")
        if hasattr(editor, "check"):
            with at_key(name):
                editor.check(prior)
