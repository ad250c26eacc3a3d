"""Text to 3D by every method: the same prompts, seeds, steps and cameras.

`python -m benchmarks.text_to_3d --json FILE [--methods csd sds …] [--prompts …] [--seeds …] [--diverse | --config …]`

Each prompt and seed is an ordinary run of configs/csd-text-to-3d.yaml that compares the methods, in its own folder
under --work and the JSON's name; a finished one is not run again and a broken-off one is resumed. Prints the Markdown
table that the README quotes, and writes the grid of all methods beside the JSON.

With --diverse it is configs/csd-diverse.yaml: four assets of a prompt that leaves things open, by CSD and by SDS.
With --config FILE it is another one, such as configs/dreamfusion.yaml with `--methods sds`.
With --ablations CSD is also run with one part of it changed at a time, each under its own name.
"""

import argparse
from pathlib import Path

import imageio.v3 as iio

from benchmarks.runs import finished_run, mean_table, write_results
from csd3d.distillation.methods import method_names
from csd3d.export import ViewRow
from csd3d.tasks.results import save_grid
from csd3d.tasks.text_to_image import slug, title

CONFIGS = Path(__file__).parent.parent / "configs"
PROMPTS = (
    "a red chair with yellow stripes",
    "a blue duck",
    "a green mug",
    "an orange house",
    "a yellow robot",
    "a pink snowman, wearing a blue hat",
)
OPEN_PROMPTS = ("a chair", "a duck")  # what they leave open, four assets should fill in differently
ABLATIONS = {  # over csd-text-to-3d.yaml, whose kernel is of a fixed width on clean latents, normalised by row
    "median_kernel": ["distill.svgd.bandwidth=median"],
    "noisy_kernel": ["distill.svgd.space=noisy", "distill.svgd.bandwidth=median"],
    "feature_kernel": ["distill.svgd.space=features", "distill.svgd.bandwidth=median"],  # the paper's
    "no_repulsion": ["distill.svgd.repulsion=0"],
    "mean_normalised": ["distill.svgd.normalize=mean"],
    "shared_noise": ["distill.noise=shared"],
    "camera_noise": ["method=fsd+csd"],
}
FIGURES = {
    "ranked_first": ("first of 32", 2),
    "clip_colour": ("CLIP colour", 3),
    "clip_geometry": ("CLIP geometry", 3),
    "fid": ("FID", 3),
    "view_words": ("view words", 2),
    "diversity": ("diversity", 3),
    "distinct_colour": ("colours", 2),
    "unet_evaluations": ("UNet evaluations", 0),
    "seconds": ("seconds", 0),
}


def run_one(config: Path, prompt: str, seed: int, methods: list[str], work: Path, overrides: list[str]) -> dict:
    """metrics.json of one prompt and seed, and where its run is."""
    keys = [f"prompt={prompt}", f"method={methods[0]}", f"compare=[{', '.join(methods[1:])}]", *overrides]
    folder = work / f"{'-'.join(prompt.replace(',', '').split())}-{seed}"
    return {"seed": seed, "folder": str(folder), **finished_run(config, keys, folder, seed)}


def run_ablations(config: Path, prompt: str, seed: int, work: Path, overrides: list[str]) -> dict[str, dict]:
    """The figures of CSD changed in one part at a time."""
    found = {}
    for name, changes in ABLATIONS.items():
        run = run_one(config, prompt, seed, ["csd"], work / name, [*overrides, *changes])
        (found[name],) = run["results"].values()
    return found


def grid(runs: list[dict], path: Path) -> None:
    """A row a method; of every run the view at 30°, of each of its assets."""
    rows = []
    for method in dict.fromkeys(name for run in runs for name in run["results"] if name not in ABLATIONS):
        folders = [Path(run["folder"]) / "images" / slug(method) for run in runs]
        assets = [asset for folder in folders if folder.is_dir() for asset in sorted(folder.iterdir())]
        pictures = [sorted(asset.iterdir())[1] for asset in assets]
        rows.append(ViewRow(title(method), [iio.imread(picture) for picture in pictures]))
    save_grid(path, rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change keys of the config")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmark-text-to-3d"))
    parser.add_argument("--config", type=Path, help="default: csd-text-to-3d.yaml, with --diverse csd-diverse.yaml")
    parser.add_argument("--methods", nargs="+", help="default: all; with --diverse csd and sds")
    parser.add_argument("--prompts", nargs="+", help="default: six, with --diverse two")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--diverse", action="store_true", help="four assets a prompt")
    parser.add_argument("--ablations", action="store_true", help="CSD with one part of it changed at a time")
    args = parser.parse_intermixed_args()
    config = args.config or CONFIGS / ("csd-diverse.yaml" if args.diverse else "csd-text-to-3d.yaml")
    methods = args.methods or (["csd", "sds"] if args.diverse else list(method_names()))
    runs = []
    for prompt in args.prompts or (OPEN_PROMPTS if args.diverse else PROMPTS):
        for seed in args.seeds:
            work = args.work / args.json.stem
            run = run_one(config, prompt, seed, methods, work, args.overrides)
            run["results"] |= run_ablations(config, prompt, seed, work, args.overrides) if args.ablations else {}
            runs.append(run)
            write_results(args.json, runs, FIGURES, args.overrides)
    grid(runs, args.json.with_suffix(".png"))
    print("\n".join(mean_table(runs, FIGURES)))


if __name__ == "__main__":
    main()
