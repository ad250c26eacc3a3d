"""Whole jobs for `benchmarks.speed --jobs`: each a child process, its seconds, processor time and peak memory."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np

ROOT = Path(__file__).parent.parent
FRAMES = 2000
# of the fox only the reconstruction is timed, so the rest is as short as can be
FOX = ["scene.path=$fox", "prior.model=csd3d/assets/ip2p", "fit.steps=1", "export.video_frames=1"]
JOBS = {  # by key: config and overrides; $fox and $video are filled in
    "default": ["csd-edit-scene"],
    "splats_edit": ["csd-edit-splats"],
    "fox_135x240": ["csd-edit-capture", "scene.downscale=2", "editors.csd_edit.edit.steps=1", *FOX],
    "fox_135x240_splats": ["csd-edit-splats", "scene.downscale=2", "editors.csd_edit.edit.steps=1", *FOX],
    "fox_270x480": ["csd-edit-capture", "reconstruct.steps=4500", "editors.csd_edit.edit.steps=1", *FOX],
    "text_to_3d": ["csd-text-to-3d"],
    "video_2000": ["csd-edit-video", "video=$video", "compare=[]", "editors.csd_edit.edit.steps=2"],
}
LIMITS = {  # the bars: most seconds of all phases or one, most GiB and evaluations of the denoiser; least PSNR
    "default": {"total": 180, "evaluations": 1000},
    "splats_edit": {"total": 60, "reconstruct": 20},
    "fox_135x240": {"reconstruct": 60, "held_out_psnr": 27},
    "fox_135x240_splats": {"reconstruct": 60, "held_out_psnr": 27},
    "fox_270x480": {"reconstruct": 240, "held_out_psnr": 27},
    "text_to_3d": {"total": 240},
    "video_2000": {"peak_gib": 1.2},
}


def run_child(command: list[str]) -> tuple[dict[str, float], bytes]:
    """Wall and processor seconds and peak GiB of a process, and what it printed; RuntimeError if it fails.

    The peak is read from /proc, since the kernel's own account of a child begins with its parent's size.
    """
    start, before, peak = time.monotonic(), children_seconds(), 0
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            time.sleep(0.2)
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        figures = {"wall_seconds": time.monotonic() - start, "cpu_seconds": children_seconds() - before}
        printed.seek(0)
        return figures | {"peak_gib": peak / 2**20}, printed.read()


def children_seconds() -> float:
    """Processor time of the finished child processes."""
    return sum(os.times()[2:4])


def write_video(path: Path) -> None:
    """A film of `FRAMES` frames of 128²: a disc that circles before a gradient."""
    y, x = np.mgrid[:128, :128]

    def frame(k: int) -> np.ndarray:
        angle = 2 * np.pi * k / 240
        disc = (x - 64 - 36 * np.cos(angle)) ** 2 + (y - 64 - 36 * np.sin(angle)) ** 2 < 20**2
        return np.where(disc[..., None], [200, 60, 40], np.stack([x, y, 255 - x], 2)).astype(np.uint8)

    iio.imwrite(path, [frame(k) for k in range(FRAMES)], fps=24, codec="libx264")


def run_jobs(names: list[str], fox: Path | None, folder: Path) -> dict[str, Any]:
    """The figures of the named jobs in the order of `JOBS`, their limits beside them; None for the fox without it."""
    found: dict[str, Any] = {}
    for name in [name for name in JOBS if name in names]:
        config, *keys = JOBS[name]
        if "scene.path=$fox" in keys and fox is None:
            found[name] = None
            continue
        if "video=$video" in keys:
            write_video(folder / "film.mp4")
        places = {"$fox": str(fox and fox.resolve()), "$video": str(folder / "film.mp4")}
        for mark, place in places.items():
            keys = [key.replace(mark, place) for key in keys]
        command = [sys.executable, "launch.py", "--config", f"configs/{config}.yaml", "--output", str(folder / name)]
        figures, _ = run_child([*command, *keys])
        found[name] = judged(LIMITS[name], figures, json.loads((folder / name / "metrics.json").read_text()))
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    return found


def judged(limits: dict[str, float], figures: dict[str, float], metrics: dict[str, Any]) -> dict[str, Any]:
    """A job's figures, with those of its metrics.json that have limits, and which limits it keeps."""
    known: dict[str, Any] = {**figures, **metrics["seconds"]}
    known["held_out_psnr"] = (metrics.get("reconstruction") or {}).get("psnr")
    known["evaluations"] = next(iter(metrics["results"].values()), {}).get("unet_evaluations")
    reached = {}
    for key, limit in limits.items():
        value = known.get(key)
        reached[key] = value is not None and (value >= limit if key == "held_out_psnr" else value <= limit)
    return known | {"limits": limits, "reached": reached}
