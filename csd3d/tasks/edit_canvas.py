"""Edit a picture, a panorama or a video by an instruction, or each region of a picture by one of its own.

All three are a canvas of latents that editors (`csd3d.editors`) work on; what differs is what is opened.
"""

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from csd3d import registry
from csd3d.canvas.clip import Captions, Clip, DemoConfig, open_clip, open_picture
from csd3d.canvas.latents import encode_clip, working_size
from csd3d.canvas.regions import Region, check_regions, latent_shares, region_masks, soft_union
from csd3d.config import defining_values
from csd3d.distillation.edit_loop import CollaborativeEditConfig
from csd3d.editors.canvas import Canvas, CanvasEditor, CanvasPhase, Sampling, make_cover, window_side
from csd3d.engine.logs import Curves, logger
from csd3d.engine.phase import Job, Phase, run_steps
from csd3d.evaluation.canvas import make_metrics
from csd3d.evaluation.text import check_judge, load_judge
from csd3d.priors import Prior, PriorConfig, load_prior
from csd3d.registry import register
from csd3d.report.canvas import CanvasReport, previewer, write_results
from csd3d.schema import ByName, Chosen, OneOf, choose, incidental, path_key

INCIDENTAL = {"identity": False}  # see schema.incidental
EACH_ITS_OWN = "each editor that starts from noise has its own, such as editors.ip2p."
MOVED = {f"edit.{key.name}": f"editors.csd_edit.edit.{key.name}" for key in dataclasses.fields(CollaborativeEditConfig)}
MOVED |= {f"edit.{key}": f"editors.csd_edit.{key}" for key in ("text_scale", "image_scale", "baseline")}
MOVED |= {key: f"editors.csd_edit.{key}" for key in ("passes", "correspondence")}
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
    """What the three tasks have in common."""

    task: str = ""
    name: str = incidental("")  # of the folder in outputs/
    prompt: str = ""  # the instruction
    seed: int = 0
    plugins: list[str] = incidental(default_factory=list)  # modules, or files that end in .py, that register things
    world: DemoConfig = field(default_factory=DemoConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    sampling: Sampling = field(default_factory=Sampling)
    # settings of editors by name; those that sample have the keys of `sampling` too, and their own win
    editors: Annotated[dict[str, Any], ByName("canvas_editor")] = incidental(default_factory=dict)
    # whose result it is
    editor: Annotated[Chosen, OneOf("canvas_editor", settings="editors")] = field(
        default_factory=lambda: choose("canvas_editor", "csd_edit")
    )
    # others to run beside it; "NAME+word" is the editor NAME under a name of its own
    compare: list[Annotated[Chosen, OneOf("canvas_editor", settings="editors")]] = field(
        default_factory=list, metadata=INCIDENTAL
    )
    window: int | None = None  # latent pixels along a window's side; null: what the prior was trained at
    overlap: float = 0.25  # of neighbouring windows, a share of their side
    keep_detail: bool = True  # give back what the autoencoder loses where nothing was edited
    tile_pixels: int | None = None  # most pixels in the autoencoder at once; null: what suits it
    clip: str = path_key(identity=False)  # judges results: a folder or open_clip:NAME/WEIGHTS; "": the shipped one
    captions: list[str] = field(default_factory=list, metadata=INCIDENTAL)  # of the source and of its edit, for CLIP
    save_seconds: float = incidental(30.0)  # between checkpoints, and previews

    MOVED: ClassVar[dict[str, str]] = MOVED
    KIND: ClassVar[str] = "picture"

    def __post_init__(self) -> None:
        if not self.instructions:
            raise ValueError('prompt is empty: say what to change, such as "paint it blue"')
        if len(self.captions) not in (0, 2):
            raise ValueError(f"captions are {self.captions}: give two, of the source and of its edit")
        for chosen in self.compare:
            if chosen.thing != self.methods[chosen.name]:
                raise ValueError(f"{chosen.name} is named twice, with other settings: call one {chosen.name}+other")
        for key, chosen in [("editor", self.editor), *(("compare", chosen) for chosen in self.compare)]:
            kinds = getattr(chosen.thing, "edits", ("picture", "video"))
            if self.KIND not in kinds:
                raise ValueError(f"{key} names {chosen.name!r}, which, as it is set, edits {kinds[0]}s; leave it out")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}: give at least 1 latent pixel, or null for the prior's own")
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"overlap is {self.overlap}: give a share of a window in [0, 0.9]")
        if self.tile_pixels is not None and self.tile_pixels < 2**16:
            raise ValueError(f"tile_pixels is {self.tile_pixels}: give at least 65536, or null")

    @property
    def instructions(self) -> list[str]:
        """The instructions, one or one for each region."""
        return [self.prompt] if self.prompt.strip() else []

    @property
    def told(self) -> str:
        """What is asked for, in words."""
        return "; ".join(self.instructions)

    @property
    def methods(self) -> dict[str, CanvasEditor]:
        """The editors by name, the main one first."""
        found = {}
        for chosen in (self.editor, *self.compare):
            found.setdefault(chosen.name, chosen.thing)
        return found

    @property
    def phases(self) -> list[str]:
        """What a run goes through, in order."""
        return ["encode", *self.methods, "results"]


@register("task", "edit_image", title="Edit of a picture")
@dataclass(kw_only=True)
class EditImageConfig(EditCanvasConfig):
    """The job of `configs/csd-edit-image.yaml` and `configs/csd-edit-regions.yaml`."""

    image: str = path_key()  # a PNG, JPEG or WebP; "": one of the procedural world's
    regions: list[Region] = field(default_factory=list)  # each with a prompt of its own, in place of `prompt`

    def __post_init__(self) -> None:
        check_regions(self.regions)
        if self.regions and self.prompt.strip():
            raise ValueError(
                "prompt and regions are both given: each region has a prompt of its own; empty one of them"
            )
        for key, chosen in [("editor", self.editor), *(("compare", chosen) for chosen in self.compare)]:
            if self.regions and not getattr(chosen.thing, "regions", False):
                raise ValueError(f"{key} names {chosen.name!r}, which knows no regions; leave it out")
        super().__post_init__()

    @property
    def instructions(self) -> list[str]:
        return [r.prompt for r in self.regions if r.prompt.strip()] if self.regions else super().instructions

    def open(self, device: torch.device, wrap: bool = False) -> "CanvasJob":
        """Opens everything that can be wrong before any work is done: the picture, the masks and the prior."""
        if self.image:
            clip = open_picture(self.image)
        else:
            strips = all(not region.mask and region.box is None for region in self.regions)
            each = [region.prompt.strip() or None for region in self.regions] if strips else []
            clip = registry.get("demo", "strip").thing(self.world, each if self.regions else self.prompt)
        masks = None
        if self.regions:
            edited = sorted(range(len(self.regions)), key=lambda i: not self.regions[i].prompt.strip())
            masks = region_masks(self.regions, *clip.size)[edited]  # those with an instruction first
        return open_job(self, device, clip, masks=masks, wrap=wrap)


@register("task", "edit_panorama", title="Edit of a panorama")
@dataclass(kw_only=True)
class EditPanoramaConfig(EditImageConfig):
    """The job of `configs/csd-edit-panorama.yaml`."""

    wrap: bool = False  # it is a 360° panorama: its right border continues at the left

    def open(self, device: torch.device) -> "CanvasJob":
        """As for a picture."""
        return super().open(device, self.wrap)


@register("task", "edit_video", title="Edit of a video")
@dataclass(kw_only=True)
class EditVideoConfig(EditCanvasConfig):
    """The job of `configs/csd-edit-video.yaml`."""

    video: str = path_key()  # a file or a folder of frames; "": an orbit in the procedural world

    KIND: ClassVar[str] = "video"

    def open(self, device: torch.device) -> "CanvasJob":
        """Opens everything that can be wrong before any work is done: the video and the prior."""
        clip = open_clip(self.video) if self.video else registry.get("demo", "orbit").thing(self.world, self.prompt)
        return open_job(self, device, clip)


# ------------------------------------------------------------------------------------------------------------- the job


@dataclass(kw_only=True)
class CanvasJob(Job):
    """A run of one of these tasks: its clip, and the size that it is worked on at.

    masks [K, H, W] of its regions, if any, those with an instruction first.  wrap: its right border continues at the
    left.
    """

    prior: Prior
    clip: Clip
    size: tuple[int, int]
    masks: Tensor | None = None
    wrap: bool = False

    def identity_of(self, name: str) -> dict:
        """As of any job, with the keys of the editor whose phase it is: `compare` is no part of a job's identity."""
        own = defining_values(self.config.methods[name])
        return self.identity | {f"{name}.{key}": value for key, value in own.items()}

    @property
    def wanted(self) -> list[str]:
        return list(self.config.methods)

    @property
    def main(self) -> str:
        return self.config.editor.name

    def run_phases(self) -> dict[str, Phase]:
        """Encodes the clip, then edits it by each editor."""
        for warning in self.clip.warnings:
            logger.warning("%s", warning)
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
        """The clip's latents and what is to be done to them; masks of regions are brought to the latents."""
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
        """Edits the canvas by one editor, from wherever its checkpoint stands."""
        z = canvas.latents.z.clone()
        phase = CanvasPhase(self.generator(name), z=z, moved=torch.zeros_like(z))
        steps, report = editor.count_steps(canvas), {}
        show = previewer(self.folder, canvas.latents, self.config.save_seconds)

        def advance(step: int, curves: Curves) -> dict[str, float]:
            before = self.prior.unet_evaluations
            report.update(editor.take_step(canvas, phase, step))
            phase.unet_evaluations += self.prior.unet_evaluations - before
            if steps > 1:
                show(name, phase.z)
            if step % 10 and steps < 500:  # every tenth is added for us
                curves.add(step, report)
            return report

        run_steps(self, phase, name, steps, advance, lambda: f"t {report.get('t', 0):.0f}")
        return phase

    def measure(self, done: dict[str, Phase]) -> dict:
        """What is known before the finished frames are gone through, which `save` does and measures."""
        self.judge = load_judge(self.config.clip, self.device)
        others = sum(phase.seconds for name, phase in done.items() if name != self.main)
        seconds = {"encode": self.encode_seconds, "edit": done[self.main].seconds, "compare": others}
        results = {n: {"unet_evaluations": p.unet_evaluations, "seconds": p.seconds} for n, p in done.items()}
        return {"seconds": seconds, "results": results, "judge": self.judge and self.judge.name}

    def save(self, done: dict[str, Phase], metrics: dict) -> None:
        """Pictures or videos, their figures, and the report."""
        self.announce("results")
        given = self.config.captions
        captions = Captions(given[:1], [given[1:]]) if given else None
        measured = make_metrics(self.canvas.latents, self.canvas.cover, self.judge, captions)
        shown = write_results(self.folder, self.edits, self.main, measured)
        for name, known in metrics["results"].items():
            metrics["results"][name] = measured.figures(name) | known
        CanvasReport(self.folder, self.config, self.clip, self.main, metrics, shown).write()


def open_job(
    config: EditCanvasConfig, device: torch.device, clip: Clip, *, masks: Tensor | None = None, wrap: bool = False
) -> CanvasJob:
    """Opens the prior, and checks that it can work on the clip; embeds the prompts while there is a text encoder."""
    prior = load_prior(dataclasses.replace(config.prior, device=str(device)), require="edit")
    size = working_size(clip, window_side(prior, config.window), prior.codec.downscale, wrap)
    for editor in config.methods.values():
        if hasattr(editor, "check"):
            editor.check(prior)
    prior.condition(["", *config.instructions])
    check_judge(config.clip)
    return CanvasJob(config=config, device=device, prior=prior, clip=clip, size=size, masks=masks, wrap=wrap)
