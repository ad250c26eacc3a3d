"""Check csd3d on a GPU, in one command of a few minutes: `python -m benchmarks.gpu_check --out DIR`.

DIR/gpu-check.json is written after every section, so that an interrupted run keeps its results. A section that fails
records its error, and the next one runs. The most important sections come first; a section is skipped when less time is
left than it is expected to take. --device cpu --rehearse runs everything small, without a GPU.

Works on a bare machine: videos are not encoded without imageio-ffmpeg, and the full-size models have random weights.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import benchmarks.stand_ins as stand_ins
from benchmarks.full_size import write_model
from benchmarks.gpu_models import compiled, full_size, precision, unet_rows, vae
from benchmarks.gpu_scene import fit, large_edit
from benchmarks.gpu_tools import GIB, ROOT, Check, difference, milliseconds
from benchmarks.kernels import encode_problem, render_problem
from csd3d import run as jobs
from csd3d.interrupt import StopRequest
from custom_kernels import hashgrid, rendering

SCENE = [
    "reconstruct.steps=200", "reconstruct.samples=32768", "fit.steps=40", "fit.samples=32768",
    "editors.csd_edit.edit_every=20", "editors.csd_edit.edit.steps=4", "editors.csd_edit.later_steps=1",
    "editors.in2n.edit_rate=10", "editors.in2n.ddim_steps=4",
    "export.video_frames=12", "export.mesh.resolution=80", "export.mesh.texture_size=256",
    "export.mesh.face_budget=4000",
]  # fmt: skip
ASSET = [
    "distill.steps=60", "asset.levels=[[0,3],[20,5]]",
    "asset.resolution=[[0,32],[40,64]]", "losses.opacity=[10,0,60,300]", "losses.distortion=[10,0,60,300]",
    "losses.smoothness=[10,0,40,50]",
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
    "losses.opacity=0", "losses.distortion=0", "losses.smoothness=0", "evaluate.views=2",
    "evaluate.size=32", "guidance_size=64", "export.video_frames=2", "export.mesh.resolution=24",
]  # fmt: skip
SMALL_CANVAS = [
    "editors.csd_edit.edit.steps=1", "editors.csd_edit.edit.batch=3", "sampling.steps=1",
    "world.frames=3", "world.width=128",
]  # fmt: skip
# name: (config, overrides, more overrides for a rehearsal)
JOBS = {
    "edit_scene": ("csd-edit-scene", SCENE, SMALL_SCENE),
    "text_to_3d": ("csd-text-to-3d", ASSET, SMALL_ASSET),
    "edit_video": ("csd-edit-video", CANVAS, SMALL_CANVAS),
    "edit_panorama": ("csd-edit-panorama", CANVAS, SMALL_CANVAS),
    "text_to_image": ("text-to-image", ["distill.steps=3", "prompt=a blue duck"], ["size=64", "particles=2"]),
}


# ---- what there is


def machine(check: Check) -> dict:
    """Return the device, driver, versions and compilers."""
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


def kernels(check: Check) -> dict:
    """Compare encoding, marching and compositing on the device with the CPU: values, gradients, milliseconds."""
    return {"encode": check_encode(check.device), "render": check_render(check.device)}


def check_encode(device: str) -> dict:
    """Compare the hash encoding of 2^18 points, by the `auto` backend of the device and of the CPU."""
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
    """Compare marching and compositing of 2^14 rays, by the `auto` backend of each."""
    found, marched, results = {}, {}, {}
    for place in ("cpu", device):
        rays, grid, steps = render_problem(place)

        def march(
            rays=rays,
            grid=grid,
            steps=steps,
        ):
            return rendering.march(*rays, grid, steps)

        marched[place] = march()
        found[f"{place}_march_ms"] = milliseconds(place, march, 3)
    samples = marched["cpu"]
    generator = torch.Generator().manual_seed(1)
    sigmas = 3 * torch.rand(len(samples[0]), generator=generator)
    rgbs = torch.rand(len(samples[0]), 3, generator=generator)
    for place in ("cpu", device):
        leaves = [x.to(place).requires_grad_() for x in (sigmas, rgbs)]
        rest = [x.to(place) for x in (samples.t_starts, samples.t_ends, samples.packed_info)]
        draw = lambda leaves=leaves, rest=rest: rendering.composite(*leaves, *rest)  # noqa: E731
        out = draw()
        grads = torch.autograd.grad(out.rgb.square().sum() + out.depth.sum(), leaves)
        results[place] = {"rgb": out.rgb, "depth": out.depth, "sigma_grad": grads[0], "rgb_grad": grads[1]}
        found[f"{place}_composite_ms"] = milliseconds(place, draw, 3)
    found["samples"] = {place: len(m.t_starts) for place, m in marched.items()}
    if len(set(found["samples"].values())) == 1:
        found["t_difference"] = difference(marched[device].t_starts, samples.t_starts)
    return found | {f"{key}_difference": difference(results[device][key], x) for key, x in results["cpu"].items()}


# ---- whole jobs


def job(name: str, *more: str, dtype: str = "auto", device: str | None = None) -> Callable[[Check], dict]:
    """Return a section that runs a shortened job from config to report, and returns its figures and times."""

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
    """Copy the first few pictures of a run."""
    target.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("images/*.png"), *folder.glob("result.png")][:6]:
        shutil.copy(path, target / path.name)


def library(name: str) -> Callable[[Check], dict]:
    """Return a section that compares a library's kernels with torch, in a process of its own; see gpu_kernels."""

    def run(check: Check) -> dict:
        small = check.rehearse or check.device == "cpu"
        if small and name != "triton":
            return {"skipped": "for CUDA"}
        # nerfacc compiles for one kind of card only, to save time
        more = {"MAX_JOBS": "16", "TORCH_EXTENSIONS_DIR": str(check.work / name)}
        if not small:
            more["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
        command = [sys.executable, "-m", "benchmarks.gpu_kernels", name, *(["--rehearse"] if small else [])]
        limit = max(10.0, min(600.0 if small else 150.0, check.left - 5))
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True, timeout=limit, check=False
        )
        answer = next((line[5:] for line in done.stdout.splitlines() if line.startswith("FOUND")), None)
        return {"failed": done.stderr[-1500:]} if answer is None else json.loads(answer)

    return run


def large_text_to_3d(check: Check) -> dict:
    """Run text to 3D with a full-size text-to-image model at guidance_size 512, four views a step."""
    model = check.work / "full-size-t2i"
    write_model(model, False, check.device, 8 if check.rehearse else 1)
    if check.device == "cuda":
        torch.cuda.empty_cache()
    keys = [
        "distill.steps=12", "asset.levels=[[0,5]]", "asset.resolution=[[0,64]]", "losses.opacity=0",
        "losses.distortion=0", "losses.smoothness=0", "guidance_size=512",
    ]  # fmt: skip
    return job("text_to_3d", *([] if check.rehearse else keys), f"prior.model={model}")(check)


SECTIONS: dict[str, tuple[Callable[[Check], dict], float]] = {  # and the seconds each takes on an H100, roughly
    "machine": (machine, 1),
    "kernels": (kernels, 6),
    "triton against torch": (library("triton"), 30),
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
    "edit_scene on the CPU": (job("edit_scene", dtype="float32", device="cpu"), 50),
    "tcnn against torch": (library("tcnn"), 15),
    "nerfacc against torch": (library("nerfacc"), 60),
    "large_text_to_3d": (large_text_to_3d, 40),
}


def main() -> None:
    """Run the sections named by --only, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for gpu-check.json and a few pictures")
    parser.add_argument("--limit-seconds", type=float, default=540.0, help="start no section that would end later")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--gpu-memory-gib", type=float, default=24.0, help="limit of GPU memory; 0: none")
    parser.add_argument("--no-video", action="store_true", help="encode no videos")
    parser.add_argument("--rehearse", action="store_true", help="run everything small, for a CPU")
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    options = parser.parse_args()
    if unknown := set(options.only) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu-check-"))  # gigabytes of random weights; removed at the end
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
