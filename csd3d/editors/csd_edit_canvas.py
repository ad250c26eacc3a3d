"""CSD-Edit of pictures, panoramas, regions and videos (arXiv 2307.04787, sections 4.1 and 4.2).

Each step draws windows (frames, patches), takes them as the particles of CSD-Edit, and puts their gradients back where
they lie. A sweep of steps goes over the whole canvas once, at one noise level. The latents move at its end, so that
mini-batches change nothing but who shares with whom.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from csd3d.canvas.windows import Cover, Sweep, Windows, add_windows, draw_sweep, gather
from csd3d.distillation.edit_loop import CollaborativeEditConfig, inner_edit, learning_rate, start_latents
from csd3d.distillation.methods.csd_edit import CSDEdit
from csd3d.distillation.schedule import scheduled_timestep
from csd3d.distillation.step import configured, new_step, step_gradient
from csd3d.distillation.svgd import Sharing
from csd3d.editors.canvas import Canvas, CanvasPhase
from csd3d.editors.correspondence import NONE, OneCorrespondence, check_works
from csd3d.registry import register

logger = logging.getLogger("csd3d")


@register("canvas_editor", "csd_edit", title="CSD-Edit, edited together")
@dataclass(frozen=True)
class CSDEditCanvas:
    """CSD-Edit, its particles being windows of the canvas; several instructions are followed each in its region.

    editors: {csd_edit: {passes: 20, edit: {batch: 8}}}
    """

    text_scale: float | None = None  # guidance by the instruction; null: what suits the model
    image_scale: float | None = None  # guidance by the source picture; null: what suits the model
    baseline: str = "image"  # what is subtracted: image (the paper's), guided, or noise; see the method csd_edit
    # the descent; `batch` windows a step, `steps` steps
    edit: CollaborativeEditConfig = field(default_factory=lambda: inner_edit(batch=16))
    passes: int = 12  # but at least so many sweeps over a canvas that takes several steps each; 0: never more steps
    correspondence: OneCorrespondence = NONE  # what windows share: none (equal addresses, the paper), overlap or flow

    regions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.method(3.0, 1.0)  # checks what the method checks
        check_works(self.correspondence, "picture", "video")
        if self.passes < 0:
            raise ValueError(f"passes is {self.passes}: give at least 0")

    @property
    def edits(self) -> tuple[str, ...]:
        along = self.correspondence.thing
        return ("picture", "video") if along is None else along.edits

    def method(self, text_scale: float, image_scale: float) -> CSDEdit:
        """The method with this editor's keys; the scales hold where these are null."""
        scales = (
            text_scale if self.text_scale is None else self.text_scale,
            image_scale if self.image_scale is None else self.image_scale,
        )
        return CSDEdit(*scales, self.baseline)

    def cover(self, canvas: Canvas) -> Cover:
        """How a sweep covers the canvas: `edit.batch` windows a step."""
        return replace(canvas.cover, batch=self.edit.batch)

    def count_sweeps(self, cover: Cover) -> int:
        """How often the canvas is gone over: edit.steps times where a step does it, else fewer, but at least `passes`.

        A step costs the same whatever the canvas. So does the whole edit, until `passes` takes more than edit.steps.
        """
        steps = self.edit.steps
        if cover.steps == 1 or steps == 0:
            return steps
        return min(steps, max(self.passes, steps // cover.steps, 1))

    def count_steps(self, canvas: Canvas) -> int:
        cover = self.cover(canvas)
        return self.count_sweeps(cover) * cover.steps

    @torch.no_grad()
    def take_step(self, canvas: Canvas, phase: CanvasPhase, step: int) -> dict[str, float]:
        cover = self.cover(canvas)
        number, part = divmod(step, cover.steps)
        config = replace(self.edit, steps=self.count_sweeps(cover))
        if step == 0:
            phase.z = start_latents(canvas.latents.z, config, canvas.generator("start"))
        report = self.move(canvas, phase, self.sweep(canvas, cover, number), (number, part, cover.steps), config)
        if part == cover.steps - 1:
            phase.z += phase.moved
            phase.moved.zero_()
        return report

    def sweep(self, canvas: Canvas, cover: Cover, number: int) -> Sweep:
        """The windows of a sweep, drawn once for all of its steps."""
        if canvas.kept.get("sweep", ((),))[0] != (cover, number):
            canvas.kept["sweep"] = (cover, number), draw_sweep(cover, canvas.generator(f"windows/{number}"))
        return canvas.kept["sweep"][1]

    def move(
        self,
        canvas: Canvas,
        phase: CanvasPhase,
        sweep: Sweep,
        place: tuple[int, int, int],
        config: CollaborativeEditConfig,
    ) -> dict[str, float]:
        """A step at `place` = (sweep, step in it, steps of it): moves phase.moved by −lr times weighted gradients."""
        number, part, parts = place
        # noise that is shared by the particles is shared by the steps of a sweep too
        purpose = f"noise/{number}" if config.noise == "shared" else f"noise/{number}/{part}"
        generator, prior = canvas.generator(purpose), canvas.prior
        method = self.method(prior.defaults.text_scale, prior.defaults.image_scale)
        config = configured(method, config)
        windows, weights = sweep.part(part, parts)
        t = scheduled_timestep(config, number, prior.num_train_timesteps, generator)
        eps = sweep.noise(windows, phase.z, config.noise, generator)
        particles = self.particles(canvas, phase.z, windows)
        step = new_step(particles.pop("z"), t, number, config, prior.alphas_cumprod, generator, **particles)
        gradient, report = step_gradient(canvas.predict, method, replace(step, eps=eps.to(step.z)), config)
        lr = learning_rate(config, number)
        if report["skipped"]:
            logger.warning("gradient not finite in sweep %d, t %d: step skipped", number, t)
        else:
            add_windows(phase.moved, -lr * weights * gradient.float().cpu(), windows)
        return {"t": float(t), "lr": lr, **report}

    def particles(self, canvas: Canvas, z: Tensor, windows: Windows) -> dict:
        """The fields of a `Step` whose particles are windows of z, on the prior's device."""
        own, source = (gather(x, windows).to(canvas.device) for x in (z, canvas.latents.z))
        count, shares = len(windows), None
        if canvas.shares is not None:
            shares = gather(canvas.shares, windows.on_one_frame()).to(canvas.device).transpose(0, 1)[:, :, None]
        return {
            "z": own,
            "source": source,
            "image": canvas.prior.condition_from_latent(source),
            "prompts": canvas.prompts(count),
            "instructions": tuple((told,) * count for told in canvas.instructions),
            "shares": shares,
            "sharing": self.sharing(canvas, windows),
        }

    def sharing(self, canvas: Canvas, windows: Windows) -> Sharing | None:
        """How the windows of a step share; None: by address."""
        if self.correspondence.thing is None or self.edit.svgd is None:
            return None
        if "correspondence" not in canvas.kept:
            canvas.kept["correspondence"] = self.correspondence.thing.open(canvas)
        return canvas.kept["correspondence"](windows)
