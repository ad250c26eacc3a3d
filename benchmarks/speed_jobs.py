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
JOBS = {  # by key: config and overrides; $fox and $video are filled in
    "default": ["csd-edit-scene"],
    "splats_edit": ["csd-edit-splats"],
    "fox_135x240": ["csd-edit-capture", "scene.path=$fox", "scene.downscale=2", "prior.model=csd3d/assets/ip2p"],
    "fox_270x480": ["csd-edit-capture", "scene.path=$fox", "scene.downscale=1", "prior.model=csd3d/assets/ip2p"],
    "text_to_3d": ["csd-text-to-3d"],
    "video_2000": ["csd-edit-video", "video=$video", "compare=[]", "editors.csd_edit.edit.steps=2"],
}
LIMITS = {  # the bars: most seconds of a phase or of all, most GiB, most evaluations
    "default": {"total": 180, "evaluations": 1000},
    "splats_edit": {"total": 60, "reconstruct": 20},
    "fox_135x240": {"reconstruct": 60},
    "fox_270x480": {"reconstruct": 240},
    "text_to_3d": {"total": 240},
    "video_2000": {"gib": 1.2},
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
    """The figures of the named jobs, their limits beside them; a job without its input is None."""
    found: dict[str, Any] = {}
    for name in names:
        config, *keys = JOBS[name]
        if "scene.path=$fox" in keys and fox is None:
            found[name] = None  # --fox was not given
            continue
        if "video=$video" in keys and not (folder / "film.mp4").exists():
            write_video(folder / "film.mp4")
        values = {"$fox": str(fox and fox.resolve()), "$video": str(folder / "film.mp4")}
        keys = [key.partition("$")[0] + values.get("$" + key.partition("$")[2], "") for key in keys]
        command = [sys.executable, "launch.py", "--config", f"configs/{config}.yaml", "--output", str(folder / name)]
        figures, _ = run_child([*command, *keys])
        metrics = json.loads((folder / name / "metrics.json").read_text())
        editor = next(iter(metrics["results"].values()))
        reconstruction = metrics.get("reconstruction") or {}
        found[name] = figures | {
            "seconds": metrics["seconds"],
            "held_out_psnr": reconstruction.get("psnr"),
            "evaluations": editor.get("unet_evaluations"),
            "limits": LIMITS[name],
        }
    return found
