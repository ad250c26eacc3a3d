"""Metrics of an edited scene: held-out views against the true edit, and edited views against each other."""

from collections.abc import Iterable

import torch
from torch import Tensor

from csd3d.datasets import Capture
from csd3d.evaluation.ground_truth import Truth, changed_pixels
from csd3d.metrics import best_answer, psnr, psnr_outside, ssim, warped_error
from csd3d.metrics.motion import mean_of_ranges
from csd3d.representations.base import SceneModel, surface_depth


def evaluate_reconstruction(model: SceneModel, capture: Capture) -> dict[str, float | None]:
    """PSNR and SSIM of the reconstruction on held-out views; None if nothing is held out."""
    if len(capture.test) == 0:
        return {"psnr": None, "ssim": None}
    rendered = model.render_views(capture.cameras, capture.test).rgb.cpu()
    truth = capture.images[capture.test]
    if capture.places is None:
        return {"psnr": psnr(rendered, truth).mean().item(), "ssim": ssim(rendered, truth).mean().item()}
    parts = (capture.cropped(images, capture.test) for images in (rendered, truth))
    found = [(psnr(a[None], b[None]), ssim(a[None], b[None])) for a, b in zip(*parts, strict=True)]
    return {"psnr": _mean(value for value, _ in found), "ssim": _mean(value for _, value in found)}


def _mean(values: Iterable[Tensor]) -> float:
    return torch.cat(tuple(values)).mean().item()


def evaluate_edit(
    model: SceneModel, source: SceneModel, images: Tensor, capture: Capture, truth: Truth | None
) -> dict[str, float | int | None]:
    """The metrics of one method, for metrics.json.

    `model` is the edited scene, `source` the reconstruction, `images` [B,H,W,3] the pictures that `model` was last
    fitted to. The truth is the answer that fits all held-out views best. `warped_error`: mean of the short- and
    long-range errors, over the object if the truth is known, else over everything that has a surface.
    """
    report: dict[str, float | int | None] = dict.fromkeys(("psnr_truth", "ssim_truth", "psnr_outside"))
    train = capture.train
    if truth is None:
        views = source.render_views(capture.cameras, train)
        depth, weight = surface_depth(views).cpu(), None
    else:
        held_out = capture.test if len(capture.test) else train
        answers = torch.stack([truth.views(scene, held_out).rgb for scene in truth.answers])
        rendered = model.render_views(capture.cameras, held_out).rgb.cpu()
        best, psnr_truth, ssim_truth = best_answer(rendered, answers)
        before = capture.images[held_out]
        outside = psnr_outside(rendered, before, changed_pixels(before, answers[best]))
        report |= {"psnr_truth": psnr_truth.mean().item(), "ssim_truth": ssim_truth.mean().item()}
        report |= {"psnr_outside": outside.nanmean().item(), "answer": best}
        views = truth.views(truth.answers[best], train)
        depth, weight = views.depth, views.mask
    if capture.places is not None:  # edits are judged where there are photos
        depth = torch.where(capture.padding(train), torch.inf, depth)
    errors = warped_error(images[train], depth, capture.cameras[train], weight)
    return report | mean_of_ranges("warped_error", errors)
