"""Edit a picture, a panorama or a video by an instruction, or each region of a picture by an instruction of its own.

All three become a canvas of latents, which the editors (`csd3d.editors`) work on; the tasks differ in what they open.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from csd3d import registry
from csd3d.canvas.clip import Captions, Clip, DemoConfig, contents_of, open_clip, open_picture
from csd3d.canvas.latents import encode_clip, working_size
from csd3d.canvas.regions import Region, check_regions, latent_shares, region_masks, soft_union
from csd3d.distillation.edit_loop import CollaborativeEditConfig
from csd3d.editors.canvas import (
    Canvas,
    CanvasEditor,
    CanvasPhase,
    Sampling,
    check_prior,
    check_samplers,
    make_cover,
    window_side,
)
from csd3d.engine.logs import Curves, logger
from csd3d.engine.phase import Job, Phase, run_steps
from csd3d.errors import InputError, at_key
from csd3d.evaluation.canvas import make_metrics
from csd3d.evaluation.text import check_judge, load_judge, may_judge
from csd3d.identity import Defining
from csd3d.media import MAX_DECODED_GIB, MAX_FRAMES, MAX_PIXELS
from csd3d.priors import Prior, PriorConfig, load_lpips, load_prior
from csd3d.registry import register, returned
from csd3d.report.canvas import CanvasReport, previewer, write_results
from csd3d.report.used import environment_of, used
from csd3d.schema import Amount, ByName, Chosen, OneOf, Within, by_name, choose, incidental, path_key

Editor = Annotated[Chosen, OneOf("canvas_editor", settings="editors")]
EACH_ITS_OWN = "each editor that starts from noise has its own, such as editors.ip2p."
MOVED = {f"edit.{key.name}": f"editors.csd_edit.edit.{key.name}" for key in dataclasses.fields(CollaborativeEditConfig)}
MOVED |= {f"edit.{key}": f"editors.csd_edit.{key}" for key in ("text_scale", "image_scale", "baseline")}
MOVED |= {"passes": "editors.csd_edit.passes"}
MOVED |= {
    "baselines.sampling": "sampling",
    "baselines.init": f"{EACH_ITS_OWN}init",
    "baselines.noise": f"{EACH_ITS_OWN}noise",
    "baselines.pix2video.pull": "Pix2Video guides by its authors' constant",
    "baselines.pix2video.pull_steps": "editors.pix2video.guided_steps",
    "baselines.fatezero": "editors.fatezero",
}


@dataclass(kw_only=True)
class EditCanvasConfig:
    """The keys that the three tasks have in common."""

    task: str = ""
    name: str = incidental("")  # name of the run's folder in outputs/
    prompt: str = ""  # the instruction, such as "paint it blue"
    seed: int = 0  # seed of everything random
    plugins: list[str] = incidental(default_factory=list)  # modules, or files that end in .py, that register things
    world: DemoConfig = field(default_factory=DemoConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    sampling: Sampling = field(default_factory=Sampling)
    # settings by editor name; editors that sample also have the keys of `sampling`, and their own values win
    editors: Annotated[dict[str, Any], ByName("canvas_editor")] = incidental(default_factory=dict)
    # the editor that makes result.png or result.mp4
    editor: Editor = field(default_factory=lambda: choose("canvas_editor", "csd_edit"))
    # other editors to run for comparison; "NAME+word" runs NAME once more, with other settings
    compare: list[Editor] = incidental(default_factory=list)
    # side of a window in latent pixels; null: the size that the prior was trained at
    window: Annotated[int, Within(1, 1024)] | None = None
    overlap: float = 0.25  # overlap of neighbouring windows, as a share of their side
    keep_detail: bool = True  # restore what the autoencoder lost, where nothing was edited
    tile_pixels: Annotated[int, Within(2**16, 2**28)] | None = None  # most pixels encoded at once; null: automatic
    # CLIP for metrics: a folder, a hub name or open_clip:NAME/WEIGHTS; "": CLIP (world), the shipped one
    clip: str = path_key(identity=False)
    captions: list[str] = incidental(default_factory=list)  # two captions for CLIP: of the source and of its edit
    save_seconds: Amount = incidental(30.0)  # seconds between checkpoints, more where saving takes long, and previews
    max_pixels: int = incidental(MAX_PIXELS)  # most pixels of a picture, a mask or a frame of a video

    MOVED: ClassVar[dict[str, str]] = MOVED
    KIND: ClassVar[str] = "picture"

    def __post_init__(self) -> None:
        if not self.instructions:
            raise ValueError('prompt is empty: say what to change, such as "paint it blue"')
        if len(self.captions) not in (0, 2):
            raise ValueError(f"captions are {self.captions}: give two, of the source and of its edit")
        for name, editor in self.methods.items():
            kinds = getattr(editor, "edits", ("picture", "video"))
            if self.KIND not in kinds:
                key = "editor" if name == self.editor.name else "compare"
                raise ValueError(f"{key} names {name!r}, which, as set, edits {kinds[0]}s; leave it out")
        check_samplers(self.sampling, self.methods)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}: give at least 1 latent pixel, or null for the prior's own")
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"overlap is {self.overlap}: give a share of a window in [0, 0.9]")
        if self.tile_pixels is not None and self.tile_pixels < 2**16:
            raise ValueError(f"tile_pixels is {self.tile_pixels}: give at least 65536, or null")
        for key in ("max_pixels", "max_frames", "max_decoded_gib", "fps"):
            if getattr(self, key, None) is not None and not getattr(self, key) > 0:
                raise ValueError(f"{key} is {getattr(self, key)}: give a number above 0")

    @property
    def instructions(self) -> list[str]:
        """The instruction, or one for each region."""
        return [self.prompt] if self.prompt.strip() else []

    @property
    def told(self) -> str:
        """The instructions as one line."""
        return "; ".join(self.instructions)

    @property
    def methods(self) -> dict[str, CanvasEditor]:
        """The editors by name, the main one first."""
        return {name: chosen.thing for name, chosen in by_name((self.editor, *self.compare)).items()}

    @property
    def phases(self) -> list[str]:
        """The phases of a run, in order."""
        return ["encode", *self.methods, "results"]

    @property
    def costs(self) -> dict[str, float]:
        """About what each phase costs, the edit by one editor being 1."""
        return {"encode": 0.1, **dict.fromkeys(self.methods, 1.0), "results": 0.2}


@register("task", "edit_image", title="Edit of a picture")
@dataclass(kw_only=True)
class EditImageConfig(EditCanvasConfig):
    """The job of `configs/csd-edit-image.yaml` and `configs/csd-edit-regions.yaml`."""

    image: str = path_key()  # a PNG, JPEG or WebP file; "": a picture of the procedural world
    regions: list[Region] = field(default_factory=list)  # regions with a prompt each, instead of `prompt`

    def __post_init__(self) -> None:
        check_regions(self.regions)
        if self.regions and self.prompt.strip():
            raise ValueError(
                "prompt and regions are both given: each region has a prompt of its own; empty one of them"
            )
        for name, editor in self.methods.items():
            if self.regions and not getattr(editor, "regions", False):
                key = "editor" if name == self.editor.name else "compare"
                raise ValueError(f"{key} names {name!r}, which cannot edit regions; leave it out")
        super().__post_init__()

    @property
    def instructions(self) -> list[str]:
        return [r.prompt for r in self.regions if r.prompt.strip()] if self.regions else super().instructions

    def open(self, device: torch.device, wrap: bool = False) -> "CanvasJob":
        """Open the picture, the masks and the prior; what is wrong with them raises InputError before any work."""
        if self.image:
            with at_key("image"):
                clip = open_picture(self.image, self.max_pixels)
        else:
            strips = all(not region.mask and region.box is None for region in self.regions)
            each = [region.prompt.strip() or None for region in self.regions] if strips else []
            clip = registry.get("demo", "strip").thing(self.world, each if self.regions else self.prompt)
        masks = None
        if self.regions:
            edited = sorted(range(len(self.regions)), key=lambda i: not self.regions[i].prompt.strip())
            masks = region_masks(self.regions, *clip.size, self.max_pixels)[edited]  # those with an instruction first
        return open_job(self, device, clip, masks=masks, wrap=wrap)


@register("task", "edit_panorama", title="Edit of a panorama")
@dataclass(kw_only=True)
class EditPanoramaConfig(EditImageConfig):
    """The job of `configs/csd-edit-panorama.yaml`."""

    wrap: bool = False  # true for a 360° panorama, whose right border continues at the left

    def open(self, device: torch.device) -> "CanvasJob":
        """Open the panorama and the prior, as for a picture."""
        return super().open(device, self.wrap)


@register("task", "edit_video", title="Edit of a video")
@dataclass(kw_only=True)
class EditVideoConfig(EditCanvasConfig):
    """The job of `configs/csd-edit-video.yaml`."""

    video: str = path_key()  # a video file or a folder of frames; "": an orbit in the procedural world
    fps: float | None = incidental(None)  # frames a second; null: the video's own times, 24 for a folder of frames
    lpips: bool = incidental(False)  # also LPIPS-VGG between neighbouring frames, which needs the extra `metrics`
    max_frames: int = incidental(MAX_FRAMES)  # most frames of a video
    max_decoded_gib: float = incidental(MAX_DECODED_GIB)  # most room for the decoded video in TMPDIR, in GiB

    KIND: ClassVar[str] = "video"

    def open(self, device: torch.device) -> "CanvasJob":
        """Open the video and the prior; what is wrong with them raises InputError before any work."""
        if self.video:
            with at_key("video"):
                limits = {key: getattr(self, key) for key in ("fps", "max_frames", "max_pixels", "max_decoded_gib")}
                clip = open_clip(self.video, **limits)
        else:
            clip = registry.get("demo", "orbit").thing(self.world, self.prompt)
            clip = dataclasses.replace(clip, fps=self.fps or clip.fps)
        with at_key("lpips"):
            lpips = load_lpips(device=device) if self.lpips else None
        job = open_job(self, device, clip)
        job.lpips = lpips
        job.contents |= contents_of(self.video)
        return job


# ------------------------------------------------------------------------------------------------------------- the job


@dataclass(kw_only=True)
class CanvasJob(Job):
    """A run of one of these tasks."""

    prior: Prior
    clip: Clip
    size: tuple[int, int]  # (H, W) at which the clip is edited
    masks: Tensor | None = None  # [K, H, W] of the regions, those with an instruction first
    wrap: bool = False  # the right border continues at the left
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None  # of frames [1, 3, H, W]

    def identity_of(self, name: str) -> Defining:
        """The job's identity and the keys of this phase's editor, as `compare` is no part of the job's identity."""
        return self.identity | self.own_identity(name, self.config.methods[name])

    @property
    def wanted(self) -> list[str]:
        return list(self.config.methods)

    @property
    def main(self) -> str:
        return self.config.editor.name

    def run_phases(self) -> dict[str, Phase]:
        """Encode the clip, then edit it by each editor."""
        started = time.monotonic()
        self.announce("encode")
        self.canvas = self.make_canvas()
        self.encode_seconds = time.monotonic() - started
        done, self.edits = {}, {}
        for name, editor in self.config.methods.items():
            if name == self.main or self.may_run(name):
                own = editor.own_canvas(self.canvas) if hasattr(editor, "own_canvas") else self.canvas
                done[name] = self.edit(name, editor, dataclasses.replace(own, kept={}))
                self.edits[name] = own.latents, done[name].z
        return done

    def make_canvas(self) -> Canvas:
        """Return the clip's latents with instructions and windows; masks of regions are scaled to the latents."""
        config, count = self.config, len(self.config.instructions)
        latents = encode_clip(self.prior, self.clip, self.size, self.wrap, config.tile_pixels)
        latents.keep_detail, shares = config.keep_detail, None
        if self.masks is not None:
            size = tuple(latents.z.shape[2:])
            shares = latent_shares(self.masks, self.size, size, self.prior.codec.downscale)[None, :count]
            latents.inside = soft_union(self.masks[:count])
        cover = make_cover(latents, window_side(self.prior, config.window), config.overlap)
        return Canvas(self.prior, latents, config.instructions, cover, config.sampling, shares, self.generator)

    def edit(self, name: str, editor: CanvasEditor, canvas: Canvas) -> CanvasPhase:
        """Edit the canvas by one editor, starting from its checkpoint if there is one."""
        z = canvas.latents.z.clone()
        phase = CanvasPhase(self.generator(name), z=z, moved=torch.zeros_like(z))
        steps, report = returned("canvas_editor", editor, "count_steps", editor.count_steps(canvas), int), {}
        show = previewer(self.folder, canvas.latents, self.config.save_seconds)

        def advance(step: int, curves: Curves) -> dict[str, float]:
            report.update(returned("canvas_editor", editor, "take_step", editor.take_step(canvas, phase, step), dict))
            if steps > 1:
                show(name, phase.z)
            if step % 10 and steps < 500:  # run_steps adds every tenth
                curves.add(step, report)
            return report

        run_steps(self, phase, name, steps, advance, lambda: f"t {report.get('t', 0):.0f}")
        return phase

    def measure(self, done: dict[str, Phase]) -> dict:
        """Return seconds and evaluations; `save` adds the figures, since it reads the finished frames once."""
        file = getattr(self.config, "image", "") or getattr(self.config, "video", "")
        judged = may_judge(self.config.clip, bool(self.prior.knows) and not file, "clip")
        self.judge = load_judge(self.config.clip, self.device) if judged else None
        others = sum(phase.seconds for name, phase in done.items() if name != self.main)
        seconds = {"encode": self.encode_seconds, "edit": done[self.main].seconds, "compare": others}
        results = {name: phase.figures for name, phase in done.items()}
        return {"seconds": seconds, "results": results, "judge": self.judge and self.judge.name}

    def save(self, done: dict[str, Phase], metrics: dict) -> None:
        """Write pictures or videos and the report; add the figures to `metrics`."""
        self.announce("results")
        given = self.config.captions
        captions = Captions(given[:1], [given[1:]]) if given else None
        measured = make_metrics(self.canvas.latents, self.canvas.cover, self.judge, captions)
        measured.lpips = self.lpips
        shown = write_results(self.folder, self.edits, self.main, measured)
        for name, known in metrics["results"].items():
            metrics["results"][name] = measured.figures(name) | known
        about = used(self), environment_of(self.folder, self.device), self.warned
        CanvasReport(self.folder, self.config, self.clip, self.main, metrics, shown, *about).write()


def open_job(
    config: EditCanvasConfig, device: torch.device, clip: Clip, *, masks: Tensor | None = None, wrap: bool = False
) -> CanvasJob:
    """Open the prior, check that it can edit the clip, and embed the prompts while there is a text encoder."""
    for warning in clip.warnings:
        logger.warning("%s", warning)
    prior = load_prior(dataclasses.replace(config.prior, device=str(device)), require="edit")
    if prior.scenes_only:
        raise InputError(f"prior.model: {config.prior.model} edits captured scenes only: give a task edit_scene")
    window = window_side(prior, config.window)
    size = working_size(clip, window, prior.codec.downscale, wrap, prior.codec.multiple)
    check_prior(prior, window, config.sampling, config.methods)
    prior.embed_ahead(["", *config.instructions])
    with at_key("clip"):
        check_judge(config.clip)
    return CanvasJob(config=config, device=device, prior=prior, clip=clip, size=size, masks=masks, wrap=wrap)
