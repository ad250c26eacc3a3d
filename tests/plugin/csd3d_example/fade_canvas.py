"""An editor of pictures, panoramas and videos."""

from dataclasses import dataclass

from csd3d.editors.canvas import Canvas, CanvasPhase
from csd3d.registry import register


@register("canvas_editor", "fade", title="Fade to grey")
@dataclass(frozen=True)
class FadeCanvas:
    """The latents shrink towards 0, whatever the instruction says: z ← (1 − amount) z̃ after the last of `steps`.

    compare: [fade, {type: fade+strong, amount: 0.9}]
    """

    amount: float = 0.5  # 0: the source as it is; 1: grey
    steps: int = 2  # calls of `take_step`, between which a run can be stopped

    def count_steps(self, canvas: Canvas) -> int:
        return self.steps

    def take_step(self, canvas: Canvas, phase: CanvasPhase, step: int) -> dict[str, float]:
        # from the source each time and not from phase.z, so that a step is the same after a stop
        phase.z = (1 - self.amount * (step + 1) / self.steps) * canvas.latents.z
        return {"skipped": 0.0}
