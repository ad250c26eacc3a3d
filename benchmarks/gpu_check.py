"""What can only be seen on a GPU, in one command of a few minutes: `python -m benchmarks.gpu_check --out DIR`.

Writes DIR/gpu-check.json after every section, so that a run that is cut off leaves what it has; a section that fails
says why, and the next goes on. --device cpu --rehearse runs the same in small, where there is no GPU. Sections come in
order of what they are worth; one is left out where less time is left than it is expected to take.

What can't be had on a bare machine is stood in for: without imageio-ffmpeg videos are not encoded; the full-size models
have random weights.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import benchmarks.stand_ins as stand_ins
from benchmarks.full_size import write_model
from benchmarks.kernels import encode_problem, render_problem
from csd3d import run as jobs
from csd3d.datasets import Capture, SceneConfig, load_capture
from csd3d.distillation import collaborative_edit
from csd3d.editors.csd_edit_scene import CSDEditScene, inner_edit
from csd3d.editors.scene import SceneEdit, SceneSource
from csd3d.fields import FieldConfig
from csd3d.files import write_text
from csd3d.interrupt import StopRequest
from csd3d.priors import Prior, PriorConfig, load_prior
from csd3d.rendering import RenderConfig
from csd3d.representations.fit import FitConfig, Pictures
from csd3d.representations.hashgrid import HashGrid
from custom_kernels import hashgrid, rendering

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "csd3d" / "assets"
GIB = 2**30
# nerfacc compiles itself at its first use where there is an nvcc: a section of its own tries that.
SCENE = [
    "representation.render.backend=reference",
    "reconstruct.steps=200", "reconstruct.samples=32768", "fit.steps=40", "fit.samples=32768",
    "editors.csd_edit.edit_every=20", "editors.csd_edit.edit.steps=4", "editors.csd_edit.later_steps=1",
    "editors.in2n.edit_rate=10", "editors.in2n.ddim_steps=4",
    "export.video_frames=12", "export.mesh.resolution=80", "export.mesh.texture_size=256",
    "export.mesh.face_budget=4000",
]  # fmt: skip
ASSET = [
    "asset.representation.render.backend=reference", "distill.steps=60", "asset.levels=[[0,3],[20,5]]",
    "asset.resolution=[[0,32],[40,64]]", "losses.opacity=[10,0,60,300]", "losses.distortion=[10,0,60,300]",
    "evaluate.views=4", "export.video_frames=8", "export.mesh.resolution=80", "export.mesh.texture_size=256",
]  # fmt: skip
CANVAS = ["editors.csd_edit.edit.steps=6", "editors.csd_edit.passes=1", "sampling.steps=4"]
SMALL_SCENE = [
    "scene.downscale=8", "representation.render.steps=24", "representation.field.levels=2",
    "representation.field.hidden=16", "reconstruct.steps=8",
    "fit.steps=4", "fit.patch_size=8", "editors.csd_edit.edit_every=2", "editors.in2n.edit_rate=2",
    "export.video_frames=2", "export.mesh.resolution=24",
]  # fmt: skip
SMALL_ASSET = [
    "distill.steps=2", "asset.representation.render.steps=16", "asset.representation.render.finer=1",
    "asset.representation.field.levels=2", "asset.levels=[[0,2]]", "asset.resolution=[[0,16]]",
    "losses.opacity=0", "losses.distortion=0", "evaluate.views=2",
    "evaluate.size=32", "guidance_size=64", "export.video_frames=2", "export.mesh.resolution=24",
]  # fmt: skip
SMALL_CANVAS = [
    "editors.csd_edit.edit.steps=1", "editors.csd_edit.edit.batch=3", "sampling.steps=1",
    "world.frames=3", "world.width=128",
]  # fmt: skip
# name: (config, its keys, what makes it small enough for a rehearsal)
JOBS = {
    "edit_scene": ("csd-edit-scene", SCENE, SMALL_SCENE),
    "text_to_3d": ("csd-text-to-3d", ASSET, SMALL_ASSET),
    "edit_video": ("csd-edit-video", [*CANVAS, "editors.csd_edit.correspondence=flow"], SMALL_CANVAS),
    "edit_panorama": ("csd-edit-panorama", CANVAS, SMALL_CANVAS),
    "text_to_image": ("text-to-image", ["distill.steps=3", "prompt=a blue duck"], ["size=64", "particles=2"]),
}


@dataclass
class Check:
    """A run of the check: where it is, how long it may take, and what it found so far."""

    out: Path
    work: Path
    device: str
    rehearse: bool
    deadline: float
    found: dict = field(default_factory=dict)
    model: Path | None = None  # the full-size editing model, once it is built

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    def write(self) -> None:
        """gpu-check.json as it stands, whole or as it was before."""
        write_text(self.out / "gpu-check.json", json.dumps(self.found, indent=2, default=str) + "\n")

    def section(self, name: str, run: Callable[["Check"], dict], expected: float) -> None:
        """Runs a section if there is time for it, at most three times as long as expected; records what came of it."""
        if self.left < expected:
            self.found[name] = {"skipped": f"{self.left:.0f} s left, about {expected:.0f} s wanted"}
            return self.write()
        print(f"== {name} ({self.left:.0f} s left)", flush=True)
        started = time.monotonic()
        reset_peak(self.device)
        try:
            with at_most(min(self.left, 3 * expected if not self.rehearse else 600)):
                result = run(self)
        except Exception as error:
            lines = traceback.format_exc().strip().splitlines()
            result = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": lines[-14:]}
            print("\n".join(lines[-6:]), flush=True)
        self.found[name] = result | {"took_s": time.monotonic() - started, **peak(self.device)}
        self.write()
        if self.device == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after so many seconds, at the next Python instruction."""

    def end(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def synchronise(device: str) -> None:
    """Waits until the device has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    """Peak memory counts from here."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> dict[str, float]:
    """The most memory allocated and reserved since `reset_peak`."""
    if device != "cuda":
        return {}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


def tried(run: Callable[[], dict], error: type[Exception] = Exception) -> dict:
    """What a part of a section finds, or why it failed: the rest of the section is worth having."""
    try:
        return run()
    except error as problem:
        return {"error": f"{type(problem).__name__}: {problem}"[:300]}


def milliseconds(device: str, run: Callable[[], object], times: int = 5, warm: int = 2) -> float:
    """Mean time of a call after some that are not counted."""
    for _ in range(warm):
        run()
    synchronise(device)
    started = time.perf_counter()
    for _ in range(times):
        run()
    synchronise(device)
    return 1000 * (time.perf_counter() - started) / times


@contextlib.contextmanager
def counted_waits(device: str) -> Iterator[Counter]:
    """Counts, by line of Python, what makes the host wait for the GPU."""
    found: Counter = Counter()
    if device != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroni" in str(warning.message) and "prototype" not in str(warning.message):
            found[f"{warning.filename.removeprefix(str(ROOT) + '/')}:{warning.lineno}"] += 1


# ---- what there is


def machine(check: Check) -> dict:
    """Device, driver, versions, compilers."""
    packages = ("torch", "triton", "transformers", "diffusers", "numpy", "nerfacc", "kornia", "peft", "accelerate")
    found = {"python": sys.version.split()[0], "cores": os.cpu_count()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    for name in ("nvcc", "ninja", "g++", "ffmpeg"):
        found[name] = shutil.which(name)
    if check.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        found["capability"] = torch.cuda.get_device_capability()
        found["memory_limit_gib"] = check.found["options"]["gpu_memory_gib"]
    return found


# ---- kernels


def difference(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Largest difference of two tensors, wherever they are, and of what size they are."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return {"max_abs": (a - b).abs().max().item(), "scale": b.abs().max().item()}


def kernels(check: Check) -> dict:
    """Encoding, marching and compositing on the device against the CPU's: values, gradients, milliseconds."""
    return {"encode": check_encode(check.device), "render": check_render(check.device)}


def check_encode(device: str) -> dict:
    """The hash encoding of 2^18 points: the device's `auto` backend against the CPU's."""
    found, results = {}, {}
    for place in ("cpu", device):
        positions, table, cotangent, offsets, resolutions = encode_problem(place)

        def encode(positions=positions, table=table, layout=(offsets, resolutions)) -> torch.Tensor:
            return hashgrid.hash_encode(positions, table, *layout)

        out = encode()
        (grad,) = torch.autograd.grad(out, table, cotangent, retain_graph=True)
        results[place] = out, grad
        with torch.no_grad():
            found[f"{place}_forward_ms"] = milliseconds(place, encode)
        backward = lambda out=out, table=table, c=cotangent: torch.autograd.grad(out, table, c, retain_graph=True)  # noqa: E731
        found[f"{place}_backward_ms"] = milliseconds(place, backward, 3)
        found[f"{place}_backend"] = hashgrid.choose_backend("auto", positions, table)
    pairs = zip(("forward", "backward"), results[device], results["cpu"], strict=True)
    return found | {f"{way}_difference": difference(a, b) for way, a, b in pairs}


def check_render(device: str) -> dict:
    """Marching and compositing 2^14 rays: the reference on the device against the CPU's."""
    found, marched, results = {}, {}, {}
    for place in ("cpu", device):
        rays, grid, steps = render_problem(place)

        def march(rays=rays, grid=grid, steps=steps, backend="auto" if place == "cpu" else "reference"):
            return rendering.march(*rays, grid, steps, backend=backend)

        marched[place] = march()
        found[f"{place}_march_ms"] = milliseconds(place, march, 3)
    samples = marched["cpu"]
    generator = torch.Generator().manual_seed(1)
    sigmas, rgbs = (
        3 * torch.rand(len(samples[0]), generator=generator),
        torch.rand(len(samples[0]), 3, generator=generator),
    )
    for place in ("cpu", device):
        leaves = [x.to(place).requires_grad_() for x in (sigmas, rgbs)]
        rest = [x.to(place) for x in (samples.t_starts, samples.t_ends, samples.packed_info)]
        backend = "auto" if place == "cpu" else "reference"
        draw = lambda leaves=leaves, rest=rest, backend=backend: rendering.composite(*leaves, *rest, backend=backend)  # noqa: E731
        out = draw()
        grads = torch.autograd.grad(out.rgb.square().sum() + out.depth.sum(), leaves)
        results[place] = {"rgb": out.rgb, "depth": out.depth, "sigma_grad": grads[0], "rgb_grad": grads[1]}
        found[f"{place}_composite_ms"] = milliseconds(place, draw, 3)
    found["samples"] = {place: len(m.t_starts) for place, m in marched.items()}
    if len(set(found["samples"].values())) == 1:
        found["t_difference"] = difference(marched[device].t_starts, samples.t_starts)
    return found | {f"{key}_difference": difference(results[device][key], x) for key, x in results["cpu"].items()}


# ---- a scene's fit


def shipped_capture(side: int | None = None) -> Capture:
    """The shipped scene, its pictures enlarged to side² where that is asked for."""
    capture = load_capture(SceneConfig(path=str(ASSETS / "scene")))
    if side is None:
        return capture
    images = torch.nn.functional.interpolate(capture.images.permute(0, 3, 1, 2), (side, side), mode="bicubic")
    images = images.clamp(0, 1).permute(0, 2, 3, 1).contiguous()
    return dataclasses.replace(capture, images=images, cameras=capture.cameras.resized(side, side))


class Fit:
    """A new scene and its optimiser, to be fitted to a capture step by step."""

    def __init__(self, check: Check, capture: Capture, config: FitConfig, backend: str = "reference") -> None:
        self.generator, self.config = torch.Generator().manual_seed(0), config
        settings = HashGrid(FieldConfig(), RenderConfig(backend=backend))
        self.model = settings.open(capture.aabb, self.generator, capture.unbounded).to(check.device)
        self.optimiser = self.model.start_fit(config)
        self.pictures = Pictures(capture.images, capture.cameras, capture.masks, capture.train)
        self.step = 0

    def advance(self) -> dict[str, float]:
        """One step, with the grid's upkeep."""
        report = self.model.fit_step(self.optimiser, self.pictures, self.config, self.step, self.generator)
        self.step += 1
        return report


def fit(check: Check) -> dict:
    """A default fit's milliseconds a step, its host waits by line, and milliseconds a view rendered."""
    capture, steps = shipped_capture(), 6 if check.rehearse else 150
    fitted = Fit(check, capture, FitConfig(samples=2**11 if check.rehearse else 2**16))
    for _ in range(steps):
        report = fitted.advance()
    found = {"psnr": report["psnr"], "samples_per_ray": report["samples_per_ray"]}
    found["step_ms"] = milliseconds(check.device, fitted.advance, 2 if check.rehearse else 32, 0)
    with counted_waits(check.device) as waits:
        for _ in range(4):
            fitted.advance()
    found["waits_in_4_steps"] = dict(waits.most_common(25))
    for side in (128,) if check.rehearse else (128, 512):
        cameras = capture.cameras.resized(side, side)
        render = lambda cameras=cameras: fitted.model.render_views(cameras, capture.test[:1])  # noqa: E731
        found[f"render_{side}_ms"] = milliseconds(check.device, render, 2, 1)
    return found | {"profile": tried(lambda: profiled(check, fitted.advance))}


def profiled(check: Check, run: Callable[[], object]) -> dict:
    """What a call does on the GPU: how many kernels, how long they run, the longest."""
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


# ---- whole jobs


def job(name: str, *more: str, dtype: str = "auto", device: str | None = None) -> Callable[[Check], dict]:
    """A section: a shortened job from config to report; its figures and times."""

    def run(check: Check) -> dict:
        config, keys, small = JOBS[name]
        keys = [*keys, *(small if check.rehearse else ()), *more]
        if check.device == "cpu" and dtype == "float16":
            return {"skipped": "float16 is for CUDA"}
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=check.work)) / "run"
        overrides = [*keys, f"prior.dtype={dtype}"]
        where = device or check.device
        jobs.start(ROOT / "configs" / f"{config}.yaml", overrides, folder, 0, where, stop=StopRequest())
        metrics = json.loads((folder / "metrics.json").read_text())
        keep_pictures(folder, check.out / "pictures" / f"{name}-{where}-{dtype}")
        return {key: metrics.get(key) for key in ("results", "reconstruction", "seconds", "mesh")}

    return run


def keep_pictures(folder: Path, target: Path) -> None:
    """The few pictures of a run that a person would look at."""
    target.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("images/*.png"), *folder.glob("result.png")][:6]:
        shutil.copy(path, target / path.name)


# ---- the prior


def precision(check: Check) -> dict:
    """How far the shipped priors' noise in half precision is from float32's, at three timesteps."""
    found = {}
    for name in ("ip2p", "t2i"):
        noises = {}
        for dtype in ("float32", "bfloat16", "float16") if check.device == "cuda" else ("float32", "bfloat16"):
            prior = load_prior(PriorConfig(model=str(ASSETS / name), device=check.device, dtype=dtype))
            noises[dtype] = [predict(prior, 4, 16, t) for t in (50, 500, 950)]
        wanted = torch.stack(noises.pop("float32"))
        for dtype, noise in noises.items():
            error = (torch.stack(noise) - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            found[f"{name}_{dtype}_relative_rms"] = error.item()
    return found


def predict(prior: Prior, rows: int, side: int, t: int = 500) -> torch.Tensor:
    """The noise of random latents [rows, 4, side, side], the same every time."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, 4, side, side, generator=generator).to(prior.device)
    image = torch.randn(rows, 4, side, side, generator=generator).to(prior.device) if prior.edits else None
    return prior.predict_noise(z, t, prior.condition(["paint it red"] * rows, image))


def full_size(check: Check) -> dict:
    """Builds and opens an InstructPix2Pix of Stable Diffusion 1.5's size."""
    found = build_full(check)
    reset_peak(check.device)
    started = time.monotonic()
    prior = open_full(check)
    synchronise(check.device)
    found["load_s"] = time.monotonic() - started
    if check.device == "cuda":
        found["weights_gib"] = torch.cuda.memory_allocated() / GIB
    found["finite"] = bool(torch.isfinite(predict(prior, 1, 8 if check.rehearse else 64)).all())
    return found


def build_full(check: Check) -> dict:
    """Writes the full-size editing model, once."""
    started, folder = time.monotonic(), check.work / "full-size-ip2p"
    parameters = write_model(folder, True, check.device, 8 if check.rehearse else 1)
    check.model = folder
    return {"unet_parameters": parameters, "build_s": time.monotonic() - started}


def open_full(check: Check, **options) -> Prior:
    """The full-size model, as `prior.model` opens it."""
    if check.model is None:
        build_full(check)
    return load_prior(PriorConfig(model=str(check.model), device=check.device, **options), require="edit")


def unet_rows(check: Check) -> dict:
    """Milliseconds a row of the full-size UNet at 64×64 latents, by batch, dtype and how its weights are held."""
    found, side, batches = {}, 8 if check.rehearse else 64, (1, 4) if check.rehearse else (1, 4, 16, 48)
    for dtype in ("float16", "bfloat16", "float32") if check.device == "cuda" else ("float32",):
        prior = open_full(check, dtype=dtype, micro_batch=max(batches))
        found[dtype] = rows_of(check, prior, batches if dtype == "float16" else batches[1:3], side)
        if dtype == "float16":
            with counted_waits(check.device) as waits:
                predict(prior, 4, side)
            found["waits_a_call"] = dict(waits)
            prior.unet.half()
            found["float16 weights too"] = rows_of(check, prior, batches, side)
        del prior
    return found


def rows_of(check: Check, prior: Prior, batches: tuple[int, ...], side: int) -> dict:
    """For each batch: milliseconds a row and the peak above what the weights hold."""
    found = {}
    for rows in batches:
        reset_peak(check.device)
        held = torch.cuda.memory_allocated() if check.device == "cuda" else 0
        times = 4 if rows < 16 else 2
        call = lambda rows=rows: predict(prior, rows, side)  # noqa: E731
        took = lambda call=call, rows=rows, times=times: {"ms_a_row": milliseconds(check.device, call, times) / rows}  # noqa: E731
        found[f"{rows} rows"] = tried(took, torch.OutOfMemoryError)
        if check.device == "cuda":
            found[f"{rows} rows"]["activations_gib"] = (torch.cuda.max_memory_allocated() - held) / GIB
    return found


def vae(check: Check) -> dict:
    """Full-size VAE at 512²: milliseconds a picture and peak, for 1 and 16 pictures at once, and with a gradient."""
    prior, found, side = open_full(check), {}, 64 if check.rehearse else 512
    for count in (1, 2) if check.rehearse else (1, 4, 16):
        images = torch.rand(count, 3, side, side, device=check.device)
        for name in ("encode", "decode", "encode_with_gradient"):
            reset_peak(check.device)
            call = _vae_call(prior, images, name)
            took = lambda call=call, n=count: {"ms_a_picture": milliseconds(check.device, call, 1, 1) / n}  # noqa: E731
            found[f"{name} {count}"] = tried(took, torch.OutOfMemoryError) | peak(check.device)
    return found


def _vae_call(prior: Prior, images: torch.Tensor, name: str) -> Callable[[], object]:
    """What is timed."""
    if name == "encode_with_gradient":
        leaf = images.clone().requires_grad_()
        return lambda: torch.autograd.grad(prior.encode(leaf).sum(), leaf)
    z = torch.zeros(len(images), *prior.latent_shape(*images.shape[2:]), device=images.device)
    return torch.no_grad()(lambda: prior.encode(images) if name == "encode" else prior.decode(z))


def large_edit(check: Check) -> dict:
    """A scene's edit at 512² by the full-size model, 16 views together; kernel_mean says whether they share."""
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


def compiled(check: Check) -> dict:
    """What torch.compile gains on the full-size UNet, float16 weights: seconds to compile, milliseconds a row."""
    prior = open_full(check, dtype="float16" if check.device == "cuda" else "float32")
    if check.device == "cuda":
        prior.unet.half()
    side, rows = (8, 4) if check.rehearse else (64, 16)
    found = {"eager_ms_a_row": milliseconds(check.device, lambda: predict(prior, rows, side), 3) / rows}
    wanted = predict(prior, rows, side)
    prior.unet.compile(backend="eager" if check.rehearse else "inductor")
    started = time.monotonic()
    got = predict(prior, rows, side)
    synchronise(check.device)
    found |= {"compile_s": time.monotonic() - started, "difference": difference(got, wanted)}
    return found | {"compiled_ms_a_row": milliseconds(check.device, lambda: predict(prior, rows, side), 5) / rows}


NERFACC = """
import json, time, torch
from benchmarks.kernels import render_problem
from custom_kernels import rendering
started = time.monotonic()
rays, grid, steps = render_problem("cuda")
own = rendering.march(*rays, grid, steps, backend="reference")
other = rendering.march(*rays, grid, steps, backend="nerfacc")
torch.cuda.synchronize()
found = {"compile_s": time.monotonic() - started, "samples": [len(own.t_starts), len(other.t_starts)]}
for name in ("reference", "nerfacc"):
    for _ in range(2):
        torch.cuda.synchronize(); started = time.monotonic()
        rendering.march(*rays, grid, steps, backend=name)
        torch.cuda.synchronize(); found[name + "_march_ms"] = 1000 * (time.monotonic() - started)
print("FOUND" + json.dumps(found))
"""


def nerfacc(check: Check) -> dict:
    """Whether nerfacc's CUDA sources compile here, and what they give; in a process of its own, which may hang."""
    if check.device != "cuda":
        return {"skipped": "for CUDA"}
    variables = {
        "MAX_JOBS": "16",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "TORCH_EXTENSIONS_DIR": str(check.work / "nerfacc"),
    }
    command = [sys.executable, "-c", NERFACC]
    limit = max(10.0, min(150.0, check.left - 5))
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=limit, check=False
    )
    answer = next((line[5:] for line in done.stdout.splitlines() if line.startswith("FOUND")), None)
    if answer is not None:
        return json.loads(answer)
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    return {"failed": done.stderr[-1500:], "errors": errors[:8]}


def large_text_to_3d(check: Check) -> dict:
    """Text to 3D with a full-size text-to-image model at guidance_size 512, four views a step."""
    model = check.work / "full-size-t2i"
    write_model(model, False, check.device, 8 if check.rehearse else 1)
    torch.cuda.empty_cache() if check.device == "cuda" else None
    size = [] if check.rehearse else ["guidance_size=512"]
    steps = [
        "distill.steps=12",
        "asset.levels=[[0,5]]",
        "asset.resolution=[[0,64]]",
        "losses.opacity=0",
        "losses.distortion=0",
    ]
    return job("text_to_3d", *([] if check.rehearse else steps), *size, f"prior.model={model}")(check)


SECTIONS: dict[str, tuple[Callable[[Check], dict], float]] = {  # and about how many seconds each takes on an H100
    "machine": (machine, 1),
    "kernels": (kernels, 6),
    "fit": (fit, 15),
    "edit_scene float32": (job("edit_scene", dtype="float32"), 40),
    "precision": (precision, 6),
    "full_size": (full_size, 20),
    "unet_rows": (unet_rows, 25),
    "vae": (vae, 10),
    "large_edit": (large_edit, 25),
    "text_to_image float16": (job("text_to_image", dtype="float16"), 10),
    "text_to_3d": (job("text_to_3d"), 25),
    "edit_video": (job("edit_video"), 10),
    "edit_panorama": (job("edit_panorama"), 10),
    "compiled": (compiled, 60),
    "edit_scene float16": (job("edit_scene", dtype="float16"), 40),
    "edit_scene on the CPU": (
        job("edit_scene", "representation.render.backend=auto", dtype="float32", device="cpu"),
        50,
    ),
    "nerfacc": (nerfacc, 60),
    "large_text_to_3d": (large_text_to_3d, 40),
}


def main() -> None:
    """Runs the sections that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for gpu-check.json and a few pictures")
    parser.add_argument("--limit-seconds", type=float, default=540.0, help="no section is begun that would end later")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--gpu-memory-gib", type=float, default=24.0, help="as if the GPU had no more; 0: all it has")
    parser.add_argument("--no-video", action="store_true", help="as where imageio-ffmpeg is missing")
    parser.add_argument("--rehearse", action="store_true", help="everything small, as on a CPU")
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    options = parser.parse_args()
    if unknown := set(options.only) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu-check-"))  # gigabytes of random weights, which nobody wants back
    deadline = time.monotonic() + options.limit_seconds
    check = Check(options.out.resolve(), work, options.device, options.rehearse, deadline)
    check.found["options"] = vars(options)
    if options.device == "cuda" and options.gpu_memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.gpu_memory_gib * GIB / total))
    if options.no_video or not stand_ins.ENCODES:
        stand_ins.leave_out_videos()
    check.write()
    for name, (run, expected) in SECTIONS.items():
        if name in options.only:
            check.section(name, run, expected)
    shutil.rmtree(check.work, ignore_errors=True)
    print(json.dumps(check.found, indent=1, default=str))


if __name__ == "__main__":
    main()
