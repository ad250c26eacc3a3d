"""Metrics of an edited scene: held-out views against the true edit, and edited views against each other."""

from collections.abc import Callable

import torch
from torch import Tensor

from csd3d.datasets import Capture
from csd3d.evaluation.ground_truth import Truth, changed_pixels
from csd3d.metrics import psnr, psnr_outside, ssim, warped_error
from csd3d.metrics.motion import mean_of_ranges
from csd3d.representations.base import SceneModel, render_all, surface_depth


def judged_views(capture: Capture) -> Tensor:
    """The indices [T] of the views that scenes are judged by: those held out, or the training views if none are."""
    return capture.test if len(capture.test) else capture.train


def render_judged(model: SceneModel, capture: Capture, name: str) -> Tensor:
    """The scene [T, H, W, 3] in its `judged_views`, under a progress bar."""
    return render_all(model, capture.cameras, f"views, {name}", judged_views(capture)).rgb.cpu()


def evaluate_reconstruction(rendered: Tensor, capture: Capture) -> dict[str, float | None]:
    """PSNR and SSIM of the reconstruction as `render_judged`; None if nothing is held out."""
    if len(capture.test) == 0:
        return {"psnr": None, "ssim": None}
    pictures = rendered, capture.images[capture.test]
    found = {name: _each(capture, capture.test, metric, *pictures) for name, metric in (("psnr", psnr), ("ssim", ssim))}
    return {name: values.mean().item() for name, values in found.items()}


def _each(capture: Capture, indices: Tensor, metric: Callable[..., Tensor], *fields: Tensor) -> Tensor:
    """The metric [N] of the frames `indices` [N] from fields [N, H, W, ...]; padding does not count."""
    if capture.places is None:
        return metric(*fields)
    parts = zip(*(capture.cropped(field, indices) for field in fields), strict=True)
    return torch.cat([metric(*(part[None] for part in row)) for row in parts])


def source_surface(source: SceneModel, capture: Capture) -> Tensor:
    """The depth [T, H, W] of the reconstruction in the training views, infinite where there is no surface."""
    return surface_depth(render_all(source, capture.cameras, "evaluate, surface", capture.train)).cpu()


def evaluate_edit(
    rendered: Tensor, surface: Tensor | None, images: Tensor, capture: Capture, truth: Truth | None
) -> dict[str, float | int | None]:
    """The metrics of an edit, for metrics.json.

    `rendered` is the edited scene as `render_judged`, `surface` the `source_surface` if the truth is unknown, `images`
    [B, H, W, 3] the pictures that the scene was last fitted to. The truth is the answer that fits all held-out views
    best. `warped_error`: mean of the short- and long-range errors, over the object if the truth is known, else over
    everything that has a surface.
    """
    report: dict[str, float | int | None] = dict.fromkeys(("psnr_truth", "ssim_truth", "psnr_outside"))
    train = capture.train
    if truth is None:
        depth, weight = surface, None
    else:
        held_out = judged_views(capture)
        answers = [truth.views(scene, held_out).rgb for scene in truth.answers]
        scores = torch.stack([_each(capture, held_out, psnr, rendered, answer) for answer in answers])
        best = int(scores.mean(1).argmax())  # an edit must choose one answer for all views
        ssim_truth = _each(capture, held_out, ssim, rendered, answers[best])
        before = capture.images[held_out]
        outside = _each(capture, held_out, psnr_outside, rendered, before, changed_pixels(before, answers[best]))
        report |= {"psnr_truth": scores[best].mean().item(), "ssim_truth": ssim_truth.mean().item()}
        report |= {"psnr_outside": outside.nanmean().item(), "answer": best}
        views = truth.views(truth.answers[best], train)
        depth, weight = views.depth, views.mask
    if capture.places is not None:  # edits are judged where there are photos
        depth = torch.where(capture.padding(train), torch.inf, depth)
    errors = warped_error(images[train], depth, capture.cameras[train], weight)
    return report | mean_of_ranges("warped_error", errors)
