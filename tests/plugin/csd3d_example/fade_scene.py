"""An editor of captured scenes."""

from dataclasses import dataclass

import torch

from csd3d.editors.scene import Report, SceneEdit
from csd3d.registry import register


@register("scene_editor", "fade", title="Fade to grey")
@dataclass(frozen=True)
class FadeScene:
    """One training view after the other is faded: its latents shrink towards 0, whatever the instruction says.

    editor: {type: fade, every: 1}
    """

    amount: float = 0.5  # 0: the photos as they are; 1: grey
    every: int = 5  # steps of the fit between two views

    def update(self, edit: SceneEdit, step: int, report: Report) -> None:
        number, rest = divmod(step, self.every)
        if rest:
            return
        rows = torch.tensor([number % edit.count])
        edit.replace(rows, (1 - self.amount) * edit.source.z[rows])
        report({"view": float(rows[0])})
