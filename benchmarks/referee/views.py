"""Edits of training views alone, before a scene is fitted to them."""

import time

import torch
from torch import Tensor

from benchmarks.referee.inputs import Input, Views
from csd3d.editors.scene import SceneEdit, SceneEditor, SceneSource
from csd3d.priors import Prior


def edit_views(
    given: Input, prior: Prior, source: SceneSource, editor: SceneEditor, steps: int, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """The training views [V, H, W, 3] after `steps` updates of an editor; evaluations and seconds."""
    prior.unet_evaluations, began = 0, time.process_time()
    views = Views(given)
    edit = SceneEdit(source, views, views.images, torch.Generator().manual_seed(seed), seed, steps)
    for step in range(steps):
        editor.update(edit, step, lambda report: None)
    seconds = time.process_time() - began
    cost = {"evaluations": prior.unet_evaluations, "seconds": seconds}
    return views.images[given.capture.train], cost
