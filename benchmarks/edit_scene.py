"""CSD-Edit against Instruct-NeRF2NeRF over scenes, instructions and seeds.

`python -m benchmarks.edit_scene --json FILE`

Each combination is a run of configs/csd-edit-scene.yaml on a scene of the procedural world, in a folder under --work.
Finished runs are not repeated and interrupted ones are resumed, so the command can be repeated until it is done. Prints
the Markdown table of docs/results.md.
"""

import argparse
from pathlib import Path

from benchmarks.referee import protocol
from benchmarks.runs import cell, finished_run, mean_table, write_results
from csd3d.world.dataset import write_capture
from csd3d.world.scene import Scene

CONFIG = Path(__file__).parent.parent / "configs" / "csd-edit-scene.yaml"
SCENES = {
    **{name: protocol.SCENES[name] for name in ("duck", "mug", "chair", "robot")},
    "donut": Scene("donut", "purple", "checks", "yellow", "metal", "mint", azimuth_deg=45, sun_azimuth_deg=200),
    "house": Scene("house", "red", "stripes", time="sunset", sky="gradient", azimuth_deg=60, sun_elevation_deg=25),
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
    """Return metrics.json of one combination, after running or resuming it if needed."""
    capture = work / "captures" / name
    if not (capture / "world.json").exists():
        write_capture(capture, SCENES[name], seed=3)
    keys = [f"scene.path={capture}", f"prompt={prompt}", *overrides]
    return finished_run(CONFIG, keys, work / f"{name}-{prompt.replace(' ', '-')}-{seed}", seed)


def table(runs: list[dict]) -> str:
    """Markdown: a row a method with the mean over all runs, then a row a run."""
    methods, lines = list(runs[0]["results"]), mean_table(runs, FIGURES)
    lines += ["", "| scene | instruction | seed | " + " | ".join(f"{m}: PSNR, warped" for m in methods) + " |"]
    lines += ["|" + "---|" * (3 + len(methods))]
    for run in runs:
        pairs = [(run["results"][m]["psnr_truth"], run["results"][m]["warped_error"]) for m in methods]
        cells = [f"{cell(psnr, 2)}, {cell(error, 4)}" for psnr, error in pairs]
        lines.append(f"| {run['scene']} | {run['instruction']} | {run['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
                write_results(args.json, runs, FIGURES, args.overrides)
    print(table(runs))


if __name__ == "__main__":
    main()
