"""Speed of the noise predictor and the VAE on the CPU, in one run: `python -m benchmarks.runtimes --json FILE`.

The shipped editing model, 16×16 latents. One thread, CPU time of the process, the ways taking turns; the median of
several rounds. Errors are relative to torch in float32. `--job` runs a short edit of a video by torch and by OpenVINO
in bfloat16 too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed_jobs import children_seconds
from csd3d.errors import InputError
from csd3d.media import open_video
from csd3d.priors import Prior, PriorConfig, load_prior

MODEL = "csd3d/assets/ip2p"
WAYS = {  # by name: prior.runtime, prior.dtype
    "torch fp32": ("torch", "float32"),
    "torch bf16": ("torch", "bfloat16"),
    "openvino fp32": ("openvino", "float32"),
    "openvino bf16": ("openvino", "bfloat16"),
    "onnxruntime fp32": ("onnxruntime", "float32"),
}
FIRST = "torch fp32"
JOB = ["--config", "configs/csd-edit-video.yaml", "compare=[]", "editors.csd_edit.edit.steps=8"]


def open_priors() -> dict[str, Prior]:
    """The shipped editing model in every way that is installed."""
    found = {}
    for name, (runtime, dtype) in WAYS.items():
        try:
            found[name] = load_prior(PriorConfig(MODEL, device="cpu", runtime=runtime, dtype=dtype), require="edit")
        except InputError as error:
            print(f"  {name}: not here ({error})")
    return found


def compare(runs: Mapping[str, Callable[[], Tensor]], items: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of CPU time an item, the ratio to `FIRST` and the relative error, of each of `runs`."""
    answers = {name: run() for name, run in runs.items()}  # which also warms up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    first = statistics.median(seconds[FIRST])
    return {
        name: {
            "ms": statistics.median(times) / items * 1e3,
            "ratio": first / statistics.median(times),
            "error": ((answers[name] - answers[FIRST]).norm() / answers[FIRST].norm()).item(),
        }
        for name, times in seconds.items()
    }


def noise(priors: Mapping[str, Prior], rows: int, rounds: int) -> dict[str, dict[str, float]]:
    """`compare` of the predicted noise of `rows` rows in one call."""
    generator = torch.Generator().manual_seed(0)
    prior = priors[FIRST]
    z_t, image = (torch.randn(rows, *prior.latent_shape(128, 128), generator=generator) for _ in range(2))
    condition = prior.condition(["paint it a bright colour"] * rows, image)
    return compare({k: lambda p=p: p.predict_noise(z_t, 400, condition) for k, p in priors.items()}, rows, rounds)


def autoencoder(priors: Mapping[str, Prior], count: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """`compare` of encoding and decoding `count` pictures of 128², of both precisions of torch."""
    priors = {name: prior for name, prior in priors.items() if name.startswith("torch")}
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(images, size=(128, 128), mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        z = priors[FIRST].encode(images)
        return {
            "encode": compare({k: lambda p=p: p.encode(images) for k, p in priors.items()}, count, rounds),
            "decode": compare({k: lambda p=p: p.decode(z) for k, p in priors.items()}, count, rounds),
        }


def job(folder: Path, names: tuple[str, ...] = (FIRST, "openvino bf16", "openvino fp32")) -> dict[str, dict[str, Any]]:
    """CPU seconds of a short edit of the shipped video, and the PSNR of its frames to those of the first way."""
    results, frames = {}, {}
    for name in names:
        runtime, dtype = WAYS[name]
        out = folder / name.replace(" ", "-")
        command = [sys.executable, "launch.py", *JOB, f"prior.runtime={runtime}", f"prior.dtype={dtype}"]
        before = children_seconds()
        subprocess.run([*command, "--output", str(out)], check=True, capture_output=True)
        results[name] = {"cpu_seconds": children_seconds() - before}
        (video,) = sorted(out.rglob("result.mp4"))
        with open_video(video) as reader:
            frames[name] = torch.from_numpy(reader.frames(range(reader.count))).float()
        results[name]["psnr"] = psnr(frames[name], frames[names[0]])
    return results


def psnr(answer: Tensor, expected: Tensor) -> float | None:
    """PSNR in dB of pictures in 0..255 or 0..1; None if they are equal."""
    error = (answer - expected).square().mean().item()
    peak = 255.0 if expected.max() > 1 else 1.0
    return 10 * torch.tensor(peak**2 / error).log10().item() if error else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--job", action="store_true", help="run a short edit of a video too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    priors = open_priors()
    found: dict[str, Any] = {f"noise, {rows} rows": noise(priors, rows, options.rounds) for rows in (16, 3)}
    found |= {f"vae, {part}": figures for part, figures in autoencoder(priors, 8, options.rounds).items()}
    for title, figures in found.items():
        for name, row in figures.items():
            print(f"{title:16s} {name:17s} {row['ms']:7.2f} ms  x{row['ratio']:.2f}  error {row['error']:.1e}")
    if options.job:
        with tempfile.TemporaryDirectory() as folder:
            found["job"] = job(Path(folder))
        print(json.dumps(found["job"], indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
