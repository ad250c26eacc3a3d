"""CSD-Edit of pictures, panoramas, regions and videos (arXiv 2307.04787, sections 4.1 and 4.2).

The particles of a step are windows (frames, patches) of the canvas. A sweep of steps covers the whole canvas once, at
one noise level. The latents move only at its end, so the mini-batches affect only which windows share with each other.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from csd3d.canvas.windows import Cover, Sweep, Windows, add_windows, draw_sweep, gather
from csd3d.distillation.edit_loop import CollaborativeEditConfig, inner_edit, learning_rate, start_latents
from csd3d.distillation.methods.csd_edit import CSDEdit
from csd3d.distillation.schedule import scheduled_timestep
from csd3d.distillation.step import configured, new_step, step_gradient
from csd3d.distillation.suits import suited
from csd3d.editors.canvas import Canvas, CanvasPhase
from csd3d.registry import register
from csd3d.schema import Within
from csd3d.waits import sent

logger = logging.getLogger("csd3d")


@register("canvas_editor", "csd_edit", title="CSD-Edit, edited together")
@dataclass(frozen=True)
class CSDEditCanvas:
    """CSD-Edit with windows of the canvas as particles; each of several instructions acts in its own region.

    editors: {csd_edit: {passes: 20, edit: {batch: 8}}}
    """

    text_scale: float | None = None  # ω_y, guidance by the instruction; null: the model's default
    image_scale: float | None = None  # ω_s, guidance by the source picture; null: the model's default
    baseline: str = "image"  # what is subtracted: image (the paper), guided or noise; see `csd3d keys csd_edit`
    edit: CollaborativeEditConfig = field(default_factory=lambda: inner_edit(batch=16))  # `steps` of `batch` windows
    # least number of sweeps over a canvas larger than one batch; 0: no minimum
    passes: Annotated[int, Within(0, 100_000)] = 12

    regions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.method(3.0, 1.0)  # the method checks its own keys
        if self.passes < 0:
            raise ValueError(f"passes is {self.passes}: give at least 0")

    def method(self, text_scale: float, image_scale: float) -> CSDEdit:
        """The method with this editor's keys; the arguments replace scales that are null."""
        scales = (
            text_scale if self.text_scale is None else self.text_scale,
            image_scale if self.image_scale is None else self.image_scale,
        )
        return CSDEdit(*scales, self.baseline)

    def cover(self, canvas: Canvas) -> Cover:
        """The cover of a sweep, with `edit.batch` windows a step."""
        return replace(canvas.cover, batch=self.edit.batch)

    def count_sweeps(self, cover: Cover) -> int:
        """The number of sweeps: edit.steps if one step covers the canvas, else about edit.steps / cover.steps.

        Then an edit costs the same for every canvas, unless `passes`, the least number of sweeps, needs more steps.
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
        """The windows of sweep `number`, drawn once and kept for all of its steps."""
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
        """Take step `place` = (sweep, step in it, steps of it): add −lr times the weighted gradients to phase.moved."""
        number, part, parts = place
        # shared noise is the same in all steps of a sweep, not only among the windows of one step
        purpose = f"noise/{number}" if config.noise == "shared" else f"noise/{number}/{part}"
        generator, prior = canvas.generator(purpose), canvas.prior
        method = self.method(prior.defaults.text_scale, prior.defaults.image_scale)
        config = configured(method, suited(config, prior.defaults))
        windows, weights = sweep.part(part, parts)
        t = scheduled_timestep(config, number, prior.num_train_timesteps, generator)
        config = config.at(t / prior.num_train_timesteps)
        eps = sweep.noise(windows, phase.z, config.noise, generator)
        particles = self.particles(canvas, phase.z, windows)
        step = new_step(particles.pop("z"), t, number, config, prior.alphas_cumprod, generator, **particles)
        step = replace(step, eps=sent(eps.to(step.z.dtype), step.z.device))
        gradient, report = step_gradient(canvas.predict, method, step, config)
        lr = learning_rate(config, number)
        if report["skipped"]:
            logger.warning("gradient not finite in sweep %d, t %d: step skipped", number, t)
        else:
            add_windows(phase.moved, -lr * weights * gradient.float().cpu(), windows)
        return {"t": float(t), "lr": lr, **report}

    def particles(self, canvas: Canvas, z: Tensor, windows: Windows) -> dict:
        """The fields of a `Step` whose particles are windows of z, on the prior's device."""
        own, source = (sent(gather(x, windows), canvas.device) for x in (z, canvas.latents.z))
        count, shares = len(windows), None
        if canvas.shares is not None:
            shares = sent(gather(canvas.shares, windows.on_one_frame()), canvas.device).transpose(0, 1)[:, :, None]
        return {
            "z": own,
            "source": source,
            "image": gather(canvas.image, windows),
            "prompts": canvas.prompts(count),
            "instructions": tuple((told,) * count for told in canvas.instructions),
            "shares": shares,
        }
