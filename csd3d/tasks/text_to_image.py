"""Pictures of a text by score distillation: N particles a prompt, latents or pixels, by one method or by all.

They start from noise, or from a source picture, which the prompts then edit.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from csd3d.config import to_yaml
from csd3d.datasets.images import read_square
from csd3d.distillation import DistillConfig, SVGDConfig
from csd3d.distillation.distill import Extras
from csd3d.distillation.methods import check_methods, find_method, method_config
from csd3d.distillation.noise import draw_noise
from csd3d.engine.logs import Curves
from csd3d.engine.phase import Job, Phase, run_steps
from csd3d.errors import InputError
from csd3d.evaluation.text import load_judge
from csd3d.priors import Prior, PriorConfig, load_prior
from csd3d.registry import register
from csd3d.report.charts import charts
from csd3d.report.page import ReportData, ViewRow, write_report
from csd3d.report.pictures import save_each, save_grid
from csd3d.schema import path_key
from csd3d.tasks.text_guide import (
    Guide,
    GuideConfig,
    Networks,
    branch_texts,
    check_features,
    embed_all,
    expand_methods,
    open_networks,
)


@dataclass
class SourceConfig:
    """A picture to edit, its middle square averaged down to `size` pixels, and what it shows: "" is not said."""

    image: str = path_key()
    prompt: str = ""

    def __post_init__(self) -> None:
        if self.prompt and not self.image:
            raise ValueError(f"prompt is {self.prompt!r}, of no picture: give image too, or neither")


@register("task", "text_to_image", title="Text to image")
@dataclass
class TextToImageConfig:
    """The job of `configs/text-to-image.yaml`. `space`: what is distilled, "latent" or "pixel" (through the encoder).

    Every particle starts as `source`, if there is one; "dds" and "pds" need it and hold to it, other methods forget it.
    Particles that start alike differ by their noise alone: noise "shared" keeps them alike.

    `learning_rate` is Adam's, in units of the latent or of the pixels; under the weight "x0" it is plain descent's, of
    which 1 lands on the denoised estimate.
    """

    task: str = "text_to_image"
    name: str = "text-to-image"
    prompts: list[str] = field(default_factory=list)
    prompt: str = ""
    method: list[str] = field(default_factory=lambda: ["csd"])
    seed: int = 0
    particles: int = 4
    size: int = 128
    space: str = "latent"
    source: SourceConfig = field(default_factory=SourceConfig)
    learning_rate: float = 0.03
    prior: PriorConfig = field(default_factory=PriorConfig)
    distill: DistillConfig = field(default_factory=lambda: DistillConfig(steps=300, svgd=SVGDConfig()))
    guide: GuideConfig = field(default_factory=GuideConfig)
    clip: str = path_key(identity=False)
    save_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError('prompts is empty: say what to draw, such as prompt="a red chair"')
        for key in ("particles", "size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a whole number of at least 1")
        if self.space not in ("latent", "pixel"):
            raise ValueError(f"space is {self.space!r}: choose latent or pixel")
        if self.distill.perp_neg:
            raise ValueError("distill.perp_neg tells views apart, and a picture has none: set it to false")
        check_methods(self.methods, self.distill, bool(self.source.image))

    @property
    def texts(self) -> list[str]:
        """The prompts; `prompt` alone wins over the list, so that a command line can give one."""
        return [self.prompt] if self.prompt.strip() else [text for text in self.prompts if text.strip()]

    @property
    def methods(self) -> list[str]:
        """The methods run, in order."""
        return expand_methods(self.method, bool(self.source.image))

    @property
    def told(self) -> str:
        """What is asked for, in words."""
        return "; ".join(self.texts)

    def open(self, device: torch.device) -> "ImageJob":
        """Opens everything that can be wrong before any work is done: the source, the prior, what the methods need."""
        source = open_source(self)
        prior = load_prior(dataclasses.replace(self.prior, device=str(device)), require="text")
        check_features(prior, self.distill)
        if self.space == "pixel" and "vsd" in {name.partition("+")[0] for name in self.methods}:
            raise InputError("space is pixel and method vsd: its network is trained on latents; use space=latent")
        # all of them now: the text encoder may be dropped before the last is drawn
        texts = branch_texts(self.texts, self.guide.words, source=self.source.prompt)
        embed_all(prior, texts, self.methods, self.distill)
        networks = open_networks(prior, self.methods, self.guide)
        return ImageJob(config=self, device=device, networks=networks, source=source)

    @property
    def phases(self) -> list[str]:
        """What a run goes through, in order: every prompt by every method."""
        return [*(f"{name}-{k}" for name in self.methods for k in range(len(self.texts))), "evaluate"]


class Particles(nn.Module):
    """N pictures as parameters, latents or logits of pixels: noise at first, or each the `source` [1, 3, S, S]."""

    def __init__(
        self, prior: Prior, count: int, size: int, space: str, generator: torch.Generator, source: Tensor | None = None
    ) -> None:
        super().__init__()
        self.space, self.size = space, size
        if source is None:
            shape = prior.latent_shape(size, size) if space == "latent" else (3, size, size)
            start = 0.1 * torch.randn(count, *shape, generator=generator)
        else:
            start = prior.encode(source) if space == "latent" else source.logit(1 / 256)
            start = start.repeat(count, 1, 1, 1)
        self.values = nn.Parameter(start.to(prior.device))

    def latents(self, prior: Prior) -> Tensor:
        """z [N, C, h, w], differentiable."""
        return self.values if self.space == "latent" else prior.encode(self.values.sigmoid())

    def images(self, prior: Prior) -> Tensor:
        """[N, 3, S, S] in [0, 1], differentiable."""
        if self.space == "pixel":
            return self.values.sigmoid()
        return prior.decode(self.values, (self.size, self.size)).clamp(0, 1)


@dataclass(kw_only=True)
class ImagePhase(Phase):
    """One prompt by one method."""

    model: Particles
    optimiser: torch.optim.Optimizer
    score: object | None = None
    score_optimiser: torch.optim.Optimizer | None = None

    PARTS = (*Phase.PARTS, "model", "optimiser", "score", "score_optimiser")


@dataclass(kw_only=True)
class ImageJob(Job):
    """A run of this task; `source` [1, 3, S, S] in [0, 1] is the picture that is edited, if any."""

    networks: Networks
    source: Tensor | None

    @property
    def wanted(self) -> list[str]:
        return [f"{name}-{k}" for name in self.config.methods for k in range(len(self.config.texts))]

    def run_phases(self) -> dict[str, Phase]:
        """Every prompt by every method, one in any case: there must be something to show."""
        done: dict[str, Phase] = {}
        for name in self.config.methods:
            for k, text in enumerate(self.config.texts):
                phase_name = f"{name}-{k}"
                if not done or self.may_run(phase_name):
                    done[phase_name] = distil(self, self.networks, self.source, name, text, phase_name)
        return done

    @torch.no_grad()
    def measure(self, done: dict[str, Phase]) -> dict:
        """How well each method's pictures fit their prompts."""
        config, judge = self.config, load_judge(self.config.clip, self.device)
        self.pictures: dict[str, list[Tensor]] = {}
        results = {}
        for name in config.methods:
            phases = [done[n] for n in (f"{name}-{k}" for k in range(len(config.texts))) if n in done]
            if not phases:
                continue
            found = self.pictures[name] = [phase.model.images(self.networks.prior).cpu() for phase in phases]
            evaluations = sum(phase.unet_evaluations for phase in phases)
            results[name] = {"seconds": sum(phase.seconds for phase in phases), "unet_evaluations": evaluations}
            if judge:
                results[name] |= judge.score_pictures(found, config.texts[: len(found)], config.seed)
        seconds = {"distil": sum(result["seconds"] for result in results.values())}
        judged = {"prompts": config.texts, "judge": judge.name if judge else None}
        return judged | {"seconds": seconds, "results": results}

    def save(self, done: dict[str, Phase], metrics: dict) -> None:
        """Pictures and report."""
        rows = save(self, self.pictures, self.source)
        write_report(self.folder / "report.html", report(self, rows, metrics))


def open_source(config: TextToImageConfig) -> Tensor | None:
    """The source [1, 3, S, S] in [0, 1], if there is one; InputError where it cannot be read or is too small."""
    if not config.source.image:
        return None
    try:
        pixels = read_square(Path(config.source.image), config.size)
    except InputError as error:
        raise InputError(f"source.image: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def distil(job: Job, networks: Networks, source: Tensor | None, name: str, text: str, phase_name: str) -> ImagePhase:
    """The particles of one prompt by one method."""
    config, generator, prior = job.config, job.generator(phase_name), networks.prior
    distill = method_config(name, config.distill)
    guide = Guide(name, networks, distill, config.guide, job.generator(f"{phase_name}/lora"))
    model = Particles(prior, config.particles, config.size, config.space, job.generator("start"), source)
    plain = distill.weight == "x0"
    optimiser = (
        torch.optim.SGD(model.parameters(), 1.0)
        if plain
        else torch.optim.Adam(model.parameters(), config.learning_rate)
    )
    phase = ImagePhase(generator, model=model, optimiser=optimiser, score=guide.score, score_optimiser=guide.optimiser)
    texts = branch_texts([text] * config.particles, config.guide.words, source=config.source.prompt)
    start = model.latents(prior).detach().clone()
    extras = Extras(camera_noise=fixed_noise(job, start) if distill.noise == "camera" else None, source=start)
    report: dict[str, float] = {}

    def advance(step: int, curves: Curves) -> dict[str, float]:
        before = prior.unet_evaluations
        z = model.latents(prior)
        loss, found = guide.loss(z, lambda: model.images(prior), texts, step, phase.generator, extras)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        finite = all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        if finite:
            optimiser.step()
        phase.unet_evaluations += prior.unet_evaluations - before
        report.update(found | {"skipped": float(not finite)})
        return report

    run_steps(job, phase, phase_name, distill.steps, advance, lambda: f"t {report.get('t', 0):.0f}")
    return phase


def fixed_noise(job: Job, z: Tensor) -> Tensor:
    """FSD's ε of pictures, which have no cameras: one draw a particle, the same for the whole run."""
    return draw_noise(z, "independent", job.generator("camera noise"))


def save(job: Job, found: dict[str, list[Tensor]], source: Tensor | None) -> list[ViewRow]:
    """images/METHOD/NNN.png, and images/grid.png: a row a method, the prompts' particles side by side; the rows."""
    count = sum(map(len, next(iter(found.values()))))
    rows = [] if source is None else [ViewRow("The source", list(source[0].permute(1, 2, 0).expand(count, -1, -1, -1)))]
    for name, pictures in found.items():
        images = torch.cat(pictures).permute(0, 2, 3, 1)
        save_each(job.folder / "images" / name, images, torch.arange(len(images)))
        rows.append(ViewRow(title(name), list(images), method=name))
    save_grid(job.folder / "images" / "grid.png", rows)
    return rows


def report(job: Job, rows: list[ViewRow], metrics: dict) -> ReportData:
    """All that report.html shows."""
    config = job.config
    return ReportData(
        prompt="; ".join(config.texts),
        facts={"Drawn in": f"{metrics['seconds']['distil']:.0f} s"},
        view_names=[text for text in config.texts for _ in range(config.particles)],
        rows=rows,
        methods={name: title(name) for name in metrics["results"]},
        results=metrics["results"],
        metric_notes=f"By {metrics['judge']}." if metrics["judge"] else "",
        curves=charts(job.folder, (("Noise level t", "t"), ("Gradient", "gradient_rms"))),
        config=to_yaml(config),
        environment=json.loads((job.folder / "environment.json").read_text()),
    )


def slug(name: str) -> str:
    """A method's name as files and folders have it."""
    return name.replace("+", "-")


def title(name: str) -> str:
    """A method's name as tables and pictures have it."""
    if name == "csd":
        return "CSD"
    return find_method(name)[0].title + (", collaborative" if name.endswith("+csd") else "")
