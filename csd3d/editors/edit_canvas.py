"""The edit of a canvas by CSD-Edit, which pictures, panoramas, regions and videos have in common; and the baselines.

Each step draws windows (frames, patches), takes them as the particles of CSD-Edit, and puts their gradients back where
they lie. A sweep of steps goes over the whole canvas once, at one noise level; latents move at its end, so mini-batches
change nothing but who shares with whom. Symbols as in `canvas`.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from csd3d.canvas.clip import WorldConfig
from csd3d.canvas.latents import Workspace
from csd3d.canvas.windows import Cover, Sweep, Windows, add_windows, draw_sweep, gather
from csd3d.distillation import CollaborativeEditConfig, Correspondence, SVGDConfig
from csd3d.distillation.edit import Particles, PredictBranches, edit_gradient, learning_rate, start_latents
from csd3d.distillation.schedules import scheduled_timestep
from csd3d.editors.baselines import BASELINES, BaselineConfig
from csd3d.engine.logs import Curves
from csd3d.engine.phase import Job, Phase, run_steps
from csd3d.priors import Condition, DiffusersPrior, PriorConfig, edit_branches
from csd3d.schema import path_key

logger = logging.getLogger("csd3d")
MAIN = "csd_edit"
DOWNSCALED = "ip2p_downscaled"
METHODS = (*BASELINES, DOWNSCALED)
Correspond = Callable[[Windows], Correspondence | None]


def _edit() -> CollaborativeEditConfig:
    """What suits the shipped prior, as for scenes."""
    annealed = {"schedule": "annealed", "t_max": 0.8, "t_min": 0.02, "weight": "x0", "noise": "shared"}
    svgd = SVGDConfig(bandwidth=10.24, normalize="row", repulsion=0.0)
    scales = {"text_scale": 3.0, "image_scale": 1.0}
    return CollaborativeEditConfig(steps=24, lr=1.0, lr_decay=1.0, **annealed, **scales, svgd=svgd, batch=16)


@dataclass(kw_only=True)
class Edit2dConfig:
    """What the tasks on canvases have in common.

    edit: CSD-Edit's settings; `edit.batch` windows a step, `edit.steps` steps, but at least `passes` over the whole
        canvas where that takes several steps (0: never more than edit.steps)
    window: latent pixels along a window's side, None for what the prior was trained at; overlap: of neighbours, as a
        share of that
    correspondence: what particles share, "none": the same address (the paper), "overlap": the same place of the canvas,
        "flow": the same content of a video by optical flow; both came out worse (`benchmarks/results/edit-2d.json`)
    keep_detail: see `restore_detail`; tile_pixels: see `TiledVae`
    compare: baselines to run beside it, under the settings of `baselines`
    clip: judges the results, "" the shipped one, else a folder or open_clip:ARCHITECTURE/WEIGHTS; captions: what the
        source and its edit show, for its directional similarity (the world's own are known)
    """

    task: str = ""
    name: str = ""
    prompt: str = ""
    seed: int = 0
    world: WorldConfig = field(default_factory=WorldConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    edit: CollaborativeEditConfig = field(default_factory=_edit)
    passes: int = 12
    window: int | None = None
    overlap: float = 0.25
    correspondence: str = "none"
    keep_detail: bool = True
    tile_pixels: int | None = None
    compare: list[str] = field(default_factory=list)
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    clip: str = path_key(identity=False)
    captions: list[str] = field(default_factory=list)
    save_seconds: float = 30.0  # between checkpoints, and previews

    def __post_init__(self) -> None:
        if not self.instructions:
            raise ValueError('prompt is empty: say what to change, such as "paint it blue"')
        if self.correspondence not in ("none", "overlap", "flow"):
            raise ValueError(f"correspondence is {self.correspondence!r}: choose none, overlap or flow")
        if len(self.captions) not in (0, 2):
            raise ValueError(f"captions are {self.captions}: give two, of the source and of its edit")
        for method in self.compare:
            if method not in METHODS:
                raise ValueError(f"compare names {method!r}: choose among {', '.join(METHODS)}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}: give at least 1 latent pixel, or null for the prior's own")
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"overlap is {self.overlap}: give a share of a window in [0, 0.9]")
        if self.passes < 0 or (self.tile_pixels is not None and self.tile_pixels < 2**16):
            raise ValueError("passes must be at least 0 and tile_pixels at least 65536, or null")

    @property
    def instructions(self) -> list[str]:
        """The instructions, one or one for each region."""
        return [self.prompt] if self.prompt.strip() else []

    @property
    def told(self) -> str:
        """What is asked for, in words."""
        return "; ".join(self.instructions)

    @property
    def phases(self) -> list[str]:
        """What a run goes through, in order."""
        return ["encode", *dict.fromkeys([MAIN, *self.compare]), "results"]


@dataclass(kw_only=True)
class CanvasPhase(Phase):
    """The edit of a canvas by one method: z [F, C, h, w], and what the steps of this sweep have moved it by so far."""

    z: Tensor
    moved: Tensor

    TENSORS = ("z", "moved")


class CanvasEditor:
    """A canvas and its instructions, embedded once; `shares` [1, K, h, w]: see `latent_shares`, None for one."""

    def __init__(
        self,
        prior: DiffusersPrior,
        work: Workspace,
        instructions: list[str],
        shares: Tensor | None = None,
        correspond: Correspond | None = None,
    ) -> None:
        self.prior, self.work, self.shares, self.correspond = prior, work, shares, correspond
        self.null = prior.condition([""])
        self.texts = [prior.condition([instruction]) for instruction in instructions]

    def particles(self, z: Tensor, windows: Windows, eps: Tensor) -> Particles:
        """The windows of a canvas as particles, to be noised by `eps`, on the prior's device."""
        device = self.prior.device
        own, source = (gather(canvas, windows).to(device) for canvas in (z, self.work.z))
        shares = None
        if self.shares is not None:
            shares = gather(self.shares, windows.on_one_frame()).to(device).transpose(0, 1)[:, :, None]
        among = None if self.correspond is None else self.correspond(windows)
        among = None if among is None else among.to(device)
        return Particles(own, source, eps.to(device), shares, among)

    def predict(self, particles: Particles) -> PredictBranches:
        """The `predict` of `edit_gradient`; of an instruction's rows only those with a share of it are computed."""
        image = self.work.codec.to_condition(particles.source)
        branches = {"full": self.texts[0]} | {f"full/{k}": text for k, text in enumerate(self.texts)}
        null, plain, _ = edit_branches(self.null, self.null, image)
        known = {"null": null, "image": plain}
        known |= {name: edit_branches(text, self.null, image)[2] for name, text in branches.items()}
        wanted = {}
        if particles.shares is not None:
            some = particles.shares.flatten(2).any(2)
            wanted = {f"full/{k}": rows.nonzero()[:, 0] for k, rows in enumerate(some)}

        def call(z_stack: Tensor, t: int, names: tuple[str, ...], indices: Tensor) -> Tensor:
            rows = [wanted.get(name, indices) for name in names]
            groups = zip(z_stack.chunk(len(names)), rows, strict=True)
            conditions = Condition.cat([known[name][own] for name, own in zip(names, rows, strict=True)])
            found = self.prior.predict_noise(torch.cat([z[own] for z, own in groups]), t, conditions)
            eps = torch.zeros_like(z_stack)
            eps[torch.cat([own + i * len(indices) for i, own in enumerate(rows)])] = found
            return eps

        return call


def make_cover(config: Edit2dConfig, prior: DiffusersPrior, work: Workspace) -> Cover:
    """How the canvas is covered: windows of the prior's own size, or smaller where the canvas is."""
    frames, _, height, width = work.z.shape
    window = window_side(config, prior)
    size = (min(window, height), min(window, width))
    return Cover((frames, height, width), size, config.edit.batch, work.codec.wrap, config.overlap)


def window_side(config: Edit2dConfig, prior: DiffusersPrior) -> int:
    """Latent pixels along a window's side: as configured, else what the prior was trained at, else 64."""
    trained = prior.unet.config.get("sample_size")
    trained = min(trained) if isinstance(trained, (list, tuple)) else trained
    return config.window or trained or 64


def count_sweeps(config: Edit2dConfig, cover: Cover) -> int:
    """How often the canvas is gone over: edit.steps times where a step does it, else fewer, but at least `passes`.

    A step costs the same whatever the canvas; so does the whole edit, until `passes` of it takes more than edit.steps.
    """
    steps = config.edit.steps
    if cover.steps == 1 or steps == 0:
        return steps
    return min(steps, max(config.passes, steps // cover.steps, 1))


def edit_canvas(job: Job, editor: CanvasEditor, cover: Cover, show: Callable[[str, Tensor], None]) -> CanvasPhase:
    """Edits the canvas by CSD-Edit, from wherever the checkpoint stands; `show(method, z)` makes a preview."""
    config, source = job.config, editor.work.z
    sweeps = count_sweeps(config, cover)
    edit = dataclasses.replace(config.edit, steps=sweeps)
    start = start_latents(source, edit, job.generator("start"))
    phase = CanvasPhase(job.generator(MAIN), z=start, moved=torch.zeros_like(start))
    sweep_of = functools.lru_cache(1)(lambda number: draw_sweep(cover, job.generator(f"windows/{number}")))
    report: dict[str, float] = {}

    def advance(step: int, curves: Curves) -> dict[str, float]:
        before = editor.prior.unet_evaluations
        number, part = divmod(step, cover.steps)
        # noise that is shared by the particles is shared by the steps of a sweep too
        noise = job.generator(f"noise/{number}" if edit.noise == "shared" else f"noise/{number}/{part}")
        report.update(take_step(editor, phase, sweep_of(number), (number, part, cover.steps), edit, noise))
        if part == cover.steps - 1:
            phase.z += phase.moved
            phase.moved.zero_()
            show(MAIN, phase.z)
        phase.unet_evaluations += editor.prior.unet_evaluations - before
        if step % 10 and sweeps * cover.steps < 500:  # every tenth is added for us
            curves.add(step, report)
        return report

    run_steps(job, phase, MAIN, sweeps * cover.steps, advance, lambda: f"t {report.get('t', 0):.0f}")
    return phase


@torch.no_grad()
def take_step(
    editor: CanvasEditor,
    phase: CanvasPhase,
    sweep: Sweep,
    place: tuple[int, int, int],
    edit: CollaborativeEditConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """A step at `place` = (sweep, step in it, steps of it): moves phase.moved by −lr times the weighted gradients."""
    number, part, parts = place
    windows, weights = sweep.part(part, parts)
    t = scheduled_timestep(edit, number, editor.prior.num_train_timesteps, generator)
    particles = editor.particles(phase.z, windows, sweep.noise(windows, phase.z, edit.noise, generator))
    alpha_bar = editor.prior.alphas_cumprod[t].item()
    indices = torch.arange(len(windows), device=particles.z.device)
    gradient, report = edit_gradient(editor.predict(particles), particles, t, indices, edit, alpha_bar)
    lr = learning_rate(edit, number)
    if report["skipped"]:
        logger.warning("gradient not finite in sweep %d, t %d: step skipped", number, t)
    else:
        add_windows(phase.moved, -lr * weights * gradient.float().cpu(), windows)
    return {"t": float(t), "lr": lr, **report}
