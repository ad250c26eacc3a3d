"""Dataset updaters: what replaces the training views while the scene is fitted to them.

CSD-Edit (arXiv 2307.04787, section 4.3) edits many views together every few hundred steps; Instruct-NeRF2NeRF
(arXiv 2303.12789, section 4.2) edits the next view on its own every few steps. Both condition the prior on the
*original* photo, start from what the scene looks like now, and leave the originals alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from csd3d.canvas.detail import KEPT_BELOW, restore_detail  # noqa: F401
from csd3d.datasets import Capture
from csd3d.distillation import Correspondence, SVGDConfig, ddim_edit
from csd3d.distillation.edit import CollaborativeEditConfig, collaborative_edit, guided_predictor
from csd3d.distillation.schedules import uniform_timestep
from csd3d.priors import Condition, DiffusersPrior, edit_branches
from csd3d.rendering import Rendered
from csd3d.representations.hashgrid import FitConfig, SceneModel, surface_depth
from csd3d.representations.reprojection import view_correspondence

Report = Callable[[dict[str, float]], None]


@dataclass
class CSDEditConfig:
    """CSD-Edit of the training views. Round 0 starts at the source photos with the inner schedule as it stands; later
    rounds start from the renders, at most at `later_t_max`, so that what was chosen stays chosen.

    `correspondence`: what views share, "none": the same address of their latents, as in the paper; "depth": the same
    surface, by the depth of the scene as it stands."""

    edit_every: int = 300  # steps between rounds
    rounds: int = 2
    views: int | None = None  # views edited together a round, at random; null for all
    later_t_max: float = 0.4
    later_steps: int = 8
    correspondence: str = "none"
    edit: CollaborativeEditConfig = field(
        default_factory=lambda: CollaborativeEditConfig(
            steps=24,
            lr=1.0,
            lr_decay=1.0,
            weight="x0",
            schedule="annealed",
            t_max=0.8,
            t_min=0.02,
            noise="shared",
            text_scale=3.0,
            image_scale=1.0,
            svgd=SVGDConfig(bandwidth=10.24, normalize="row", repulsion=0.0),
        )
    )

    def __post_init__(self) -> None:
        if self.correspondence not in ("none", "depth"):
            raise ValueError(f"correspondence is {self.correspondence!r}: choose none or depth")


@dataclass
class In2nConfig:
    """Instruct-NeRF2NeRF as its paper sets it; noise levels are fractions of the schedule."""

    edit_rate: int = 10  # steps between edits
    t_min: float = 0.02
    t_max: float = 0.98
    ddim_steps: int = 20
    text_scale: float = 7.5
    image_scale: float = 1.5


def _edit_fit() -> FitConfig:
    return FitConfig(
        steps=600,
        rays=2048,
        learning_rate=5e-3,
        final_learning_rate=5e-4,
        patches=2,
        perceptual_weight=0.05,
    )


@dataclass
class UpdateConfig:
    """Which updater edits the scene, its settings, and the fit that goes on meanwhile, the same for all of them."""

    method: str = "csd_edit"
    keep_detail: bool = True  # see `restore_detail`
    fit: FitConfig = field(default_factory=_edit_fit)
    csd_edit: CSDEditConfig = field(default_factory=CSDEditConfig)
    in2n: In2nConfig = field(default_factory=In2nConfig)

    def __post_init__(self) -> None:
        if self.method not in UPDATERS:
            raise ValueError(f"method is {self.method!r}: choose one of {', '.join(UPDATERS)}")


class ViewEditor:
    """The training views as the prior sees them: source latents and image conditions, encoded once; and the words."""

    def __init__(self, prior: DiffusersPrior, capture: Capture, prompt: str, keep_detail: bool = True) -> None:
        self.prior, self.capture, self.keep_detail = prior, capture, keep_detail
        sources = capture.images[capture.train].permute(0, 3, 1, 2)
        with torch.no_grad():
            self.z_source = prior.encode(sources)
            self.condition = prior.encode_condition(sources)
            self.null, self.text = prior.condition([""]), prior.condition([prompt])
            self.decoded_source = self._decode(self.z_source) if keep_detail else None

    def predict(self, rows: Tensor) -> Callable[[Tensor, int, tuple[str, ...], Tensor], Tensor]:
        """The `predict` of `collaborative_edit` and `guided_predictor` for the training views `rows` [M]."""

        def call(z_stack: Tensor, t: int, branches: tuple[str, ...], indices: Tensor) -> Tensor:
            found = edit_branches(self.text, self.null, self.condition[rows[indices.cpu()]])
            by_name = dict(zip(("null", "image", "full"), found, strict=True))
            return self.prior.predict_noise(z_stack, t, Condition.cat([by_name[branch] for branch in branches]))

        return call

    def render(self, model: SceneModel, rows: Tensor) -> Rendered:
        """What the scene looks like now from the training views `rows` [M]."""
        return model.render_views(self.capture.cameras, self.capture.train[rows])

    @torch.no_grad()
    def encode(self, views: Rendered) -> Tensor:
        """Latents [M,...] of rendered views."""
        return self.prior.encode(views.rgb.clamp(0, 1).permute(0, 3, 1, 2))

    def correspondence(self, views: Rendered, rows: Tensor) -> Correspondence:
        """Which latent pixels of the training views `rows`, rendered as `views`, show the same surface."""
        cameras = self.capture.cameras[self.capture.train[rows]].to(views.depth.device)
        size = tuple(self.z_source.shape[2:])
        found = view_correspondence(cameras, surface_depth(views), size, self.prior.codec.downscale)
        return found.to(self.prior.device)

    @torch.no_grad()
    def decode(self, z: Tensor, rows: Tensor) -> Tensor:
        """On the CPU: pictures [M,H,W,3] of the edited latents of the views `rows` [M], in the capture's size."""
        decoded = self._decode(z)
        if not self.keep_detail:
            return decoded.cpu()
        source = self.capture.images[self.capture.train[rows]].to(decoded.device)
        return restore_detail(decoded, self.decoded_source[rows], source).cpu()

    def _decode(self, z: Tensor) -> Tensor:
        return self.prior.decode(z, size=tuple(self.capture.images.shape[1:3])).permute(0, 2, 3, 1)


def update_csd_edit(
    editor: ViewEditor,
    model: SceneModel,
    images: Tensor,
    step: int,
    config: UpdateConfig,
    generator: torch.Generator,
    report: Report,
) -> None:
    """Replaces a round's views of `images` [B,H,W,3] in place, if a round begins at `step`."""
    settings = config.csd_edit
    number, rest = divmod(step, settings.edit_every)
    if rest or number >= settings.rounds:
        return
    count = len(editor.capture.train)
    rows = torch.randperm(count, generator=generator)[: settings.views or count].sort().values
    edit = settings.edit if number == 0 else later_round(settings)
    along = settings.correspondence == "depth"
    views = editor.render(model, rows) if number or along else None
    z = collaborative_edit(
        editor.predict(rows),
        editor.z_source[rows],
        edit,
        editor.prior.alphas_cumprod,
        generator,
        callback=lambda _, __, diagnostics: report(diagnostics),
        z_start=editor.encode(views) if number else None,
        correspond=editor.correspondence(views, rows).select if along else None,
    )
    images[editor.capture.train[rows]] = editor.decode(z, rows)


def later_round(settings: CSDEditConfig) -> CollaborativeEditConfig:
    """The inner edit of every round but the first: fewer steps, from lower noise."""
    t_max = min(settings.later_t_max, settings.edit.t_max)
    return replace(settings.edit, steps=settings.later_steps, t_max=t_max, init="source")


def update_in2n(
    editor: ViewEditor,
    model: SceneModel,
    images: Tensor,
    step: int,
    config: UpdateConfig,
    generator: torch.Generator,
    report: Report,
) -> None:
    """Replaces the next view of `images` [B,H,W,3] in place, if one is due at `step`."""
    settings = config.in2n
    number, rest = divmod(step, settings.edit_rate)
    if rest:
        return
    rows = torch.tensor([number % len(editor.capture.train)])
    schedule = editor.prior.alphas_cumprod
    start = uniform_timestep(settings.t_min, settings.t_max, len(schedule), generator)
    predict = guided_predictor(editor.predict(rows), torch.tensor([0]), settings.text_scale, settings.image_scale)
    z = editor.encode(editor.render(model, rows))
    z = ddim_edit(predict, z, schedule, start=start, steps=settings.ddim_steps, generator=generator)
    images[editor.capture.train[rows]] = editor.decode(z, rows)
    report({"t": float(start)})


UPDATERS = {"csd_edit": update_csd_edit, "in2n": update_in2n}
