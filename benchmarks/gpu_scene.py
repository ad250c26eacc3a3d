"""Sections of `benchmarks.gpu_check` on scenes: a default fit, and an edit at 512² by a full-size model."""

import dataclasses
import time
from collections.abc import Callable

import torch

from benchmarks.gpu_models import ASSETS, open_full
from benchmarks.gpu_tools import Check, counted_waits, milliseconds, peak, synchronise, tried
from csd3d.datasets import Capture, SceneConfig, load_capture
from csd3d.distillation import collaborative_edit
from csd3d.editors.csd_edit_scene import CSDEditScene, inner_edit
from csd3d.editors.scene import SceneEdit, SceneSource
from csd3d.fields import FieldConfig
from csd3d.rendering import RenderConfig
from csd3d.representations.fit import FitConfig, Pictures
from csd3d.representations.hashgrid import HashGrid


def shipped_capture(side: int | None = None) -> Capture:
    """Return the shipped scene, with its pictures enlarged to `side` × `side` pixels if given."""
    capture = load_capture(SceneConfig(path=str(ASSETS / "scene")))
    if side is None:
        return capture
    images = torch.nn.functional.interpolate(capture.images.permute(0, 3, 1, 2), (side, side), mode="bicubic")
    images = images.clamp(0, 1).permute(0, 2, 3, 1).contiguous()
    return dataclasses.replace(capture, images=images, cameras=capture.cameras.resized(side, side))


class Fit:
    """A new scene and its optimiser, fitted to a capture step by step."""

    def __init__(self, check: Check, capture: Capture, config: FitConfig, backend: str = "auto") -> None:
        self.generator, self.config = torch.Generator().manual_seed(0), config
        settings = HashGrid(FieldConfig(backend=backend), RenderConfig(backend=backend))
        self.model = settings.open(capture.aabb, self.generator, capture.unbounded).to(check.device)
        self.optimiser = self.model.start_fit(config)
        self.pictures = Pictures(capture.images, capture.cameras, capture.masks, capture.train)
        self.step = 0

    def advance(self) -> dict[str, float]:
        """Take one step, including the update of the occupancy grid; return its report."""
        report = self.model.fit_step(self.optimiser, self.pictures, self.config, self.step, self.generator)
        self.step += 1
        return report


def fit(check: Check) -> dict:
    """Measure a default fit: milliseconds a step, host waits by line, and milliseconds a rendered view."""
    capture, steps = shipped_capture(), 6 if check.rehearse else 150
    fitted = Fit(check, capture, FitConfig(samples=2**11 if check.rehearse else 2**16))
    for _ in range(steps):
        report = fitted.advance()
    found = {"psnr": report["psnr"], "samples_per_ray": report["samples_per_ray"]}
    found["step_ms"] = milliseconds(check.device, fitted.advance, 2 if check.rehearse else 32, 0)
    with counted_waits(check.device) as waits:
        for _ in range(4):
            fitted.advance()
    if check.device == "cuda":  # what Triton's kernels are worth in a whole step
        plain = Fit(check, capture, fitted.config, "reference")
        for _ in range(steps):
            plain.advance()
        found["step_ms_by_torch"] = milliseconds(check.device, plain.advance, 32, 0)
    found["waits_in_4_steps"] = dict(waits.most_common(25))
    for side in (128,) if check.rehearse else (128, 512):
        cameras = capture.cameras.resized(side, side)
        render = lambda cameras=cameras: fitted.model.render_views(cameras, capture.test[:1])  # noqa: E731
        found[f"render_{side}_ms"] = milliseconds(check.device, render, 2, 1)
    return found | {"profile": tried(lambda: profiled(check, fitted.advance))}


def profiled(check: Check, run: Callable[[], object]) -> dict:
    """Profile a call on the GPU: the number of kernels, their total time, and the longest ones."""
    if check.device != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        run()
        torch.cuda.synchronize()
    rows = [row for row in seen.key_averages() if row.device_type == torch.autograd.DeviceType.CUDA]
    rows.sort(key=lambda row: -row.self_device_time_total)
    return {
        "kernels_a_step": sum(row.count for row in rows),
        "kernel_ms_a_step": sum(row.self_device_time_total for row in rows) / 1000,
        "longest_kernels_ms": {row.key[:90]: row.self_device_time_total / 1000 for row in rows[:12]},
    }


def large_edit(check: Check) -> dict:
    """Edit 16 views of a scene together at 512², by the full-size model. Views share if kernel_mean is not near 0."""
    views, side = (2, 64) if check.rehearse else (16, 512)
    capture = shipped_capture(side)
    capture = dataclasses.replace(capture, train=capture.train[:: max(1, len(capture.train) // views)][:views])
    fitted = Fit(check, capture, FitConfig(samples=2**11 if check.rehearse else 2**18, rays=2**14))
    for _ in range(3 if check.rehearse else 80):
        report = fitted.advance()
    found: dict = {"fit_psnr": report["psnr"], "fit_step_ms": milliseconds(check.device, fitted.advance, 4, 1)}
    started = time.monotonic()
    source = SceneSource(open_full(check), capture, "paint it red")
    prior, z_source, image = source.prior, source.z, source.image
    synchronise(check.device)
    found["open_and_encode_s"] = time.monotonic() - started
    rows, reports = torch.arange(views), []
    edit = dataclasses.replace(inner_edit(), steps=1 if check.rehearse else 4)
    started = time.monotonic()
    with counted_waits(check.device) as waits:
        z = collaborative_edit(
            prior.predict, CSDEditScene().method(prior.defaults), z_source, image, edit, prior.alphas_cumprod,
            torch.Generator().manual_seed(0), prompts=source.prompt,
            callback=lambda _, __, report: reports.append(report),
        )  # fmt: skip
        synchronise(check.device)
    found |= {"edit_step_s": (time.monotonic() - started) / edit.steps, "edit_waits": dict(waits.most_common(15))}
    found |= {"edit_reports": reports, "unet_rows": prior.unet_evaluations, "edit": peak(check.device)}
    started = time.monotonic()
    scene = SceneEdit(source, fitted.model, capture.images.clone(), torch.Generator().manual_seed(0))
    seen = scene.render(rows)
    synchronise(check.device)
    found["render_a_view_s"] = (time.monotonic() - started) / views
    started = time.monotonic()
    scene.encode(seen)
    scene.replace(rows, z)
    finite = bool(torch.isfinite(scene.images).all())
    return found | {"encode_and_decode_s": time.monotonic() - started, "finite": finite}
