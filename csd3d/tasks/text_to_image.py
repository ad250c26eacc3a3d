"""Text to image by score distillation, and sampled: N particles for each prompt, latents or pixels.

Particles start from noise, or from a source picture, which the prompts then edit. In an illusion one picture serves all
prompts, each of which sees it through a transform of its own.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from csd3d.datasets.images import read_square
from csd3d.distillation.named import parse_name
from csd3d.distillation.step import DistillConfig
from csd3d.engine.phase import Job, Phase
from csd3d.errors import at_key
from csd3d.evaluation.text import check_judge, judge_of
from csd3d.guidance.methods import (
    ALIASES,
    MOVED,
    MethodRun,
    Networks,
    distill_by_model,
    method_runs,
    open_prior,
    settle_distill,
)
from csd3d.guidance.no_effect import alone, changed_in_vain
from csd3d.guidance.pictures import ImagePhase, distil
from csd3d.guidance.sampling import EDITED, SAMPLED, PictureSampling, SampledPhase, draw
from csd3d.guidance.transforms import TRANSFORMS, seen_by
from csd3d.identity import Defining
from csd3d.memory import check_fits
from csd3d.metrics.inception import FID, open_fid
from csd3d.priors import Prior, PriorConfig
from csd3d.registry import register
from csd3d.report.text import save_pictures
from csd3d.schema import Amount, ByName, Chosen, OneOf, Rate, Within, incidental, path_key

LEAST_SIDE = 8  # pixels
BYTES_PER_PIXEL = 100  # pictures, and latents with their gradients and moments
OneMethod = Annotated[Chosen, OneOf("method", settings="methods", also=(*ALIASES, "all"))]


@dataclass
class SourceConfig:
    """A picture to edit."""

    image: str = path_key()  # the picture, of which the middle square is used; "": none, particles start from noise
    prompt: str = ""  # what the picture shows; may stay empty

    def __post_init__(self) -> None:
        if self.prompt and not self.image:
            raise ValueError(f"prompt is {self.prompt!r}, but there is no image: give both, or neither")


@register("task", "text_to_image", title="Text to image")
@dataclass
class TextToImageConfig:
    """The job of `configs/text-to-image.yaml`.

    Every particle starts as `source`, if there is one; only methods that edit keep to it and need it. Particles that
    start alike differ by their noise alone, so with `distill.noise: shared` they stay alike.
    """

    task: str = "text_to_image"
    name: str = incidental("text-to-image")  # name of the run's folder in outputs/
    prompts: list[str] = field(default_factory=list)  # what to draw, such as [a red chair, a blue duck]
    prompt: str = ""  # a single prompt, instead of `prompts`
    methods: Annotated[dict[str, Any], ByName("method")] = incidental(default_factory=dict)  # settings by method name
    method: list[OneMethod] = incidental(default_factory=lambda: [Chosen("csd")])  # csd, NAME, NAME+csd, or all
    sampling: PictureSampling | None = incidental(None)  # also sample pictures from the prior; null: none
    seed: int = 0  # seed of everything random
    plugins: list[str] = incidental(default_factory=list)  # modules, or files that end in .py, that register things
    particles: Annotated[int, Within(1, 1024)] = 4  # pictures of each prompt
    # pixels along a side of a picture; null: the model's own size
    size: Annotated[int, Within(LEAST_SIDE, 4096)] | None = None
    space: str = "latent"  # what is optimised: latent (the latents) or pixel (the pixels, through the encoder)
    source: SourceConfig = field(default_factory=SourceConfig)
    # an illusion: one picture for all prompts, and how each sees it, such as [none, rotate_180]; []: a picture for each
    transforms: list[str] = field(default_factory=list)
    learning_rate: Rate = 0.03  # Adam's, in units of the latents or pixels; not used with distill.weight x0
    prior: PriorConfig = field(default_factory=PriorConfig)
    distill: DistillConfig = field(default_factory=lambda: distill_by_model(steps=300))
    # CLIP for metrics: a folder, a hub name or open_clip:NAME/WEIGHTS; "": CLIP (world), the shipped one
    clip: str = path_key(identity=False)
    # a folder of pictures for FID, which needs the extra `metrics` and thousands of pictures; "": no FID
    fid_against: str = path_key(identity=False)
    save_seconds: Amount = incidental(30.0)  # seconds between checkpoints, more where saving takes long

    MOVED: ClassVar[dict[str, str]] = MOVED

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError('prompts is empty: say what to draw, such as prompt="a red chair"')
        if self.particles < 1:
            raise ValueError(f"particles is {self.particles}: give a whole number of at least 1")
        if self.space not in ("latent", "pixel"):
            raise ValueError(f"space is {self.space!r}: choose latent or pixel")
        if unknown := [name for name in self.transforms if name not in TRANSFORMS]:
            raise ValueError(f"transforms names {unknown[0]!r}: choose from {', '.join(TRANSFORMS)}")
        if self.transforms and len(self.transforms) != len(self.texts):
            raise ValueError(
                f"transforms has {len(self.transforms)}, prompts {len(self.texts)}: give one for each prompt"
            )
        if self.transforms and self.sampling is not None:
            raise ValueError("transforms and sampling do not go together: an illusion is distilled; drop one")
        if self.distill.perp_neg:
            raise ValueError("distill.perp_neg is for views, and a picture has none: set it to false")
        if not self.method and self.sampling is None:
            raise ValueError("method is empty: name at least one, or give sampling")
        if self.method:
            self.distill = settle_distill(self.distill, [one.name for one in self.method])
        if any(one.name == "all" for one in self.method):
            self.method = [Chosen(n, None if n in ALIASES else run.method) for n, run in self.runs.items()]
        for name, run in self.runs.items():
            if self.space == "pixel" and hasattr(run.method, "after"):
                raise ValueError(f"space is pixel and method {name}: its network is trained on latents; use latent")
            if getattr(run.method, "fresh", 0):
                raise ValueError(f"methods.{parse_name(name)[0]}.fresh is for surfaces, a picture has none: use 0")

    @property
    def texts(self) -> list[str]:
        """The prompts; `prompt` wins over the list, so that the command line can give one."""
        return [self.prompt] if self.prompt.strip() else [text for text in self.prompts if text.strip()]

    @property
    def all_texts(self) -> list[str]:
        """The prompts, and those that they are edited to."""
        edited = self.sampling and self.sampling.prompt_to_prompt
        return list(dict.fromkeys([*self.texts, *(self.row_texts(EDITED) if edited else [])]))

    def row_texts(self, row: str) -> list[str]:
        """The prompts of a row of pictures: of what is edited, those that it is edited to."""
        return self.sampling.texts(self.texts, row) if row == EDITED else self.texts

    @property
    def runs(self) -> dict[str, MethodRun]:
        """The methods by name, in order."""
        have = ["source"] if self.source.image else []
        return method_runs(self.method, self.methods, self.distill, have)

    @property
    def told(self) -> str:
        """The prompts as one line."""
        return "; ".join(self.texts)

    @property
    def ignored(self) -> list[str]:
        """A warning for each key that is set and not read."""
        runs = self.runs
        told = changed_in_vain(runs, self.distill)
        told += alone(runs, self.particles, "particles is 1; raise it")
        return [*(self.sampling.ignored if self.sampling else []), *told]

    def open(self, device: torch.device) -> "ImageJob":
        """Open the source, the prior and the networks; what is wrong with them raises InputError before any work."""
        side = self.size or LEAST_SIDE  # a file that cannot be read is refused before a model is fetched
        check_size(self, side, device)
        open_source(self, side)
        with at_key("clip"):
            check_judge(self.clip)
        with at_key("fid_against"):
            fid = open_fid(self.fid_against, device)
        source_prompts = [self.source.prompt] if self.source.prompt else None
        prior, networks = open_prior(self.prior, device, self.runs, self.texts, source_prompts)
        if self.sampling:
            self.sampling.check(prior, self.texts, self.distill.null_prompt)
        side = self.size or prior.defaults.working_size
        check_size(self, side, device)
        with at_key("size"):
            prior.check_size(side, side)
        source = open_source(self, side)
        return ImageJob(config=self, device=device, prior=prior, networks=networks, source=source, side=side, fid=fid)

    @property
    def parts(self) -> dict[str, tuple[str, list[str]]]:
        """(method, prompts) of each phase, by the phase's name: one prompt, or all of an illusion."""
        names = [*([SAMPLED] if self.sampling else []), *self.runs]
        together = [self.texts] if self.transforms else [[text] for text in self.texts]
        return {f"{name}-{k}": (name, texts) for name in names for k, texts in enumerate(together)}

    @property
    def titles(self) -> dict[str, str]:
        """The title of each row of pictures, by its name: what is sampled, then every method."""
        drawn = self.sampling.titles if self.sampling else {}
        return drawn | {name: run.title for name, run in self.runs.items()}

    @property
    def phases(self) -> list[str]:
        """The phases of a run, in order: every prompt by every method."""
        return [*self.parts, "evaluate"]


@dataclass(kw_only=True)
class ImageJob(Job):
    """A run of this task."""

    prior: Prior
    networks: dict[str, Networks]  # by the name of the method that has them
    source: Tensor | None  # [1, 3, S, S] in [0, 1], the picture to edit
    side: int  # S, pixels along a side of a picture
    fid: FID | None = None  # of all pictures of a method

    @property
    def wanted(self) -> list[str]:
        return list(self.config.parts)

    def identity_of(self, name: str) -> Defining:
        """The job's identity and the settings of this phase's method; other methods may be added or removed."""
        method, _ = self.config.parts[name]
        if method == SAMPLED:
            return self.identity | self.own_identity(method, self.config.sampling)
        return self.identity | self.own_identity(method, self.config.runs[method].method)

    def run_phases(self) -> dict[str, Phase]:
        """Run every prompt by the sampler and every method; the first even after a stop, to have something to show."""
        done: dict[str, Phase] = {}
        for part, (name, texts) in self.config.parts.items():
            if not done or self.may_run(part):
                if name == SAMPLED:
                    done[part] = draw(self, texts[0], part)
                else:
                    done[part] = distil(self, self.config.runs[name], texts, part)
        return done

    @torch.no_grad()
    def measure(self, done: dict[str, Phase]) -> dict:
        """Measure how well each method's pictures fit their prompts."""
        config = self.config
        judge = judge_of(config.all_texts, config.clip, self.prior, "clip")
        self.pictures: dict[str, list[Tensor]] = {}
        results = {}
        for name in config.titles:
            made_by = SAMPLED if name == EDITED else name  # both are sampled together
            phases = [phase for part, phase in done.items() if config.parts[part][0] == made_by]
            if not phases:
                continue
            texts = config.row_texts(name)
            found = [self.images_of(phase, name).cpu() for phase in phases]
            if config.transforms:
                found = list(seen_by(found[0], config.transforms).split(config.particles))
            self.pictures[name] = found
            rows = 2 if made_by == SAMPLED and EDITED in config.titles else 1  # that share the phases' work
            evaluations = sum(phase.unet_evaluations for phase in phases) // rows
            seconds = sum(phase.seconds for phase in phases) / rows
            results[name] = {"seconds": seconds, "unet_evaluations": evaluations}
            if shared := [phase.kernel_mean for phase in phases if phase.kernel_mean is not None]:
                results[name]["kernel_mean"] = sum(shared) / len(shared)
            if judge:
                results[name] |= judge.score_pictures(found, texts[: len(found)], config.seed)
            if self.fid:
                results[name]["fid"] = self.fid(torch.cat(found))
        seconds = {"distil": sum(result["seconds"] for result in results.values())}
        judged = {"prompts": config.all_texts, "judge": judge.name if judge else None}
        return judged | {"seconds": seconds, "results": results}

    def images_of(self, phase: "ImagePhase | SampledPhase", row: str) -> Tensor:
        """The pictures [N, 3, S, S] of a row."""
        if isinstance(phase, SampledPhase):
            return phase.images(self.prior, self.config.particles, self.side, row)
        return phase.model.images(self.prior)

    def save(self, done: dict[str, Phase], metrics: dict) -> None:
        """Write the pictures and the report."""
        titles = {name: self.config.titles[name] for name in self.pictures}
        save_pictures(self, self.pictures, self.source, titles, metrics)


def check_size(config: TextToImageConfig, side: int, device: torch.device) -> None:
    """Raise InputError if pictures of `side` pixels do not fit in the device's memory."""
    needed = BYTES_PER_PIXEL * config.particles * side**2
    check_fits(needed, f"particles {config.particles} of size {side}: a step", device=device)


def open_source(config: TextToImageConfig, side: int) -> Tensor | None:
    """Return the source [1, 3, S, S] in [0, 1], if there is one: the middle square, averaged down to S = `side` pixels.

    Raises InputError where it cannot be read or is too small.
    """
    if not config.source.image:
        return None
    with at_key("source.image"):
        pixels = read_square(Path(config.source.image), side)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
