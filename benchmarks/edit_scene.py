"""CSD-Edit against Instruct-NeRF2NeRF over scenes, instructions and seeds.

`python -m benchmarks.edit_scene --json FILE`

Each combination is an ordinary run of configs/csd-edit-scene.yaml on a scene of the procedural world, in its own run
folder under --work. A finished one is not run again and a broken-off one is resumed, so the command can be repeated
until it is done. Prints the Markdown table that the README quotes.
"""

import argparse
import json
from pathlib import Path

from csd3d import run as jobs
from csd3d.interrupt import StopRequest
from csd3d.logs import environment
from csd3d.world.dataset import write_capture
from csd3d.world.scene import Scene

CONFIG = Path(__file__).parent.parent / "configs" / "csd-edit-scene.yaml"
SCENES = {
    "duck": Scene("duck", "yellow", material="glossy", backdrop="sky blue", sky="gradient", azimuth_deg=30),
    "mug": Scene("mug", "pink", backdrop="beige", sky="gradient", azimuth_deg=75, sun_azimuth_deg=120),
    "chair": Scene("chair", "orange", backdrop="grey", azimuth_deg=200, sun_azimuth_deg=300),
    "robot": Scene("robot", "cyan", backdrop="lavender", sky="horizon", azimuth_deg=10),
}
AMBIGUOUS = ("paint it a bright colour", "give it a pattern")
FIGURES = {
    "psnr_truth": ("PSNR to truth, dB", 2),
    "ssim_truth": ("SSIM to truth", 3),
    "psnr_outside": ("PSNR outside, dB", 2),
    "warped_error": ("warped error", 4),
    "unet_evaluations": ("UNet evaluations", 0),
    "seconds": ("seconds", 0),
}


def run_one(name: str, prompt: str, seed: int, work: Path, overrides: list[str]) -> dict:
    """metrics.json of one combination, run or resumed if it is not there yet."""
    capture = work / "captures" / name
    if not (capture / "world.json").exists():
        write_capture(capture, SCENES[name], seed=3)
    folder = work / f"{name}-{prompt.replace(' ', '-')}-{seed}"
    metrics = folder / "metrics.json"
    if metrics.exists() and json.loads(metrics.read_text())["finished"]:
        return json.loads(metrics.read_text())
    stop = StopRequest()
    if folder.exists():
        jobs.resume(folder, [], "auto", stop=stop)
    else:
        keys = [f"scene.path={capture}", f"prompt={prompt}", *overrides]
        jobs.start(CONFIG, keys, folder, seed, "auto", stop=stop)
    return json.loads(metrics.read_text())


def mean(runs: list[dict], method: str, figure: str) -> float | None:
    """Mean of a figure of one method over the runs that have it."""
    values = [run["results"][method][figure] for run in runs]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(runs: list[dict]) -> str:
    """Markdown: a row a method, the mean over all runs; then a row a run."""
    methods = list(runs[0]["results"])
    lines = [f"| mean of {len(runs)} runs | {' | '.join(label for label, _ in FIGURES.values())} |"]
    lines += ["|" + "---|" * (len(FIGURES) + 1)]
    for method in methods:
        cells = [_cell(mean(runs, method, figure), digits) for figure, (_, digits) in FIGURES.items()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "| scene | instruction | seed | " + " | ".join(f"{m}: PSNR, warped" for m in methods) + " |"]
    lines += ["|" + "---|" * (3 + len(methods))]
    for run in runs:
        pairs = [(run["results"][m]["psnr_truth"], run["results"][m]["warped_error"]) for m in methods]
        cells = [f"{_cell(psnr, 2)}, {_cell(error, 4)}" for psnr, error in pairs]
        lines.append(f"| {run['scene']} | {run['instruction']} | {run['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change keys of the config")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmark-edit-scene"))
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES)[:3])
    parser.add_argument("--prompts", nargs="+", default=list(AMBIGUOUS)[:1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    args = parser.parse_intermixed_args()
    runs = []
    for name in args.scenes:
        for prompt in args.prompts:
            for seed in args.seeds:
                metrics = run_one(name, prompt, seed, args.work, args.overrides)
                runs.append({"scene": name, "instruction": prompt, "seed": seed, **metrics})
                args.json.parent.mkdir(parents=True, exist_ok=True)
                means = {m: {f: mean(runs, m, f) for f in FIGURES} for m in metrics["results"]}
                result = {"environment": environment(), "overrides": args.overrides, "mean": means, "runs": runs}
                args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
