"""Text to 3D by every method: the same prompts, seeds, steps and cameras.

`python -m benchmarks.text_to_3d --json FILE [--methods csd sds …] [--prompts …] [--seeds …] [--diverse] [--ablations]`

Each prompt, seed and method is a run of the method's own config, in a folder under --work and the JSON's name.
Finished runs are not repeated; interrupted ones are resumed. Prints the Markdown table of docs/results.md, and writes
the grid of all methods beside the JSON.

With --diverse all methods use configs/csd-diverse.yaml: four assets of a prompt with open attributes. --ablations also
runs CSD with one part changed at a time.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio

from benchmarks.runs import finished_run, mean_table, write_results
from csd3d.distillation.named import method_title, names_for, parse_name
from csd3d.report.labels import name_judge
from csd3d.report.page import ViewRow
from csd3d.report.pictures import save_grid
from csd3d.report.text import slug

CONFIGS = Path(__file__).parent.parent / "configs"
PROMPTS = (
    "a red chair with yellow stripes",
    "a blue duck",
    "a green mug",
    "an orange house",
    "a yellow robot",
    "a pink snowman, wearing a blue hat",
)
OPEN_PROMPTS = ("a chair", "a duck")  # with open attributes, in which the four assets should differ
OWN_CONFIGS = {"csd": "csd-text-to-3d", "bridge": "sds-bridge", "vsd": "prolificdreamer", "lmc": "lmc-sds"}
NO_SVGD = "distill.svgd=null"  # for methods that do not collaborate
SVGD = "distill.svgd={normalize: row, space: clean, bandwidth: 10.24}"  # csd-text-to-3d.yaml's, for NAME+csd
ABLATIONS = {  # of csd-text-to-3d.yaml, whose kernel has a fixed width on clean latents, normalised by row
    "median_kernel": ("distill.svgd.bandwidth=median",),
    "noisy_kernel": ("distill.svgd.space=noisy", "distill.svgd.bandwidth=median"),
    "feature_kernel": ("distill.svgd.space=features", "distill.svgd.bandwidth=median"),  # the paper's
    "no_repulsion": ("distill.svgd.repulsion=0",),
    "mean_normalised": ("distill.svgd.normalize=mean",),
    "shared_noise": ("distill.noise=shared",),
    "camera_noise": ("method=fsd+csd",),
}
FIGURES = {  # CLIP and FD are printed by the name of the judge, such as CLIP (world) and FD (world)
    "object_psnr": ("PSNR on the object", 2),
    "object_ssim": ("SSIM", 3),
    "mask_iou": ("mask IoU", 2),
    "chamfer": ("Chamfer", 3),
    "volume_iou": ("volume IoU", 2),
    "colours_found": ("colours", 2),
    "pattern_found": ("pattern", 2),
    "stray_matter": ("not the object", 2),
    "ranked_first": ("first of 32", 2),
    "clip_colour": ("CLIP (world) colour", 3),
    "clip_geometry": ("CLIP (world) geometry", 3),
    "fd": ("FD", 3),
    "fd_floor": ("FD of true renders, its floor", 3),
    "view_words": ("view words", 2),
    "diversity": ("CLIP (world) diversity", 3),
    "distinct_colour": ("distinct colours", 2),
    "unet_evaluations": ("UNet evaluations", 0),
    "seconds": ("seconds", 0),
}


@dataclass(frozen=True)
class Plan:
    """How a row of the table is made: a config and its overrides."""

    config: Path
    changes: tuple[str, ...] = ()


def plans(methods: list[str], diverse: bool, ablations: bool) -> dict[str, Plan]:
    """{name: plan} of the methods and of the ablations of CSD."""
    if diverse:
        diverse_config = CONFIGS / "csd-diverse.yaml"
        return {n: Plan(diverse_config, (f"method={n}", *(() if parse_name(n)[1] else (NO_SVGD,)))) for n in methods}
    found, csd = {}, CONFIGS / f"{OWN_CONFIGS['csd']}.yaml"
    for name in methods:
        own, collaborates, _ = name.partition("+")  # "nfsd+csd"
        config = CONFIGS / f"{OWN_CONFIGS.get(own, own)}.yaml"
        changes = (f"method={name}", SVGD) if collaborates else ()
        # a method without its own config uses csd-text-to-3d.yaml
        found[name] = Plan(config, changes) if config.exists() else Plan(csd, (f"method={name}", NO_SVGD))
    return found | {name: Plan(csd, changes) for name, changes in ABLATIONS.items() if ablations}


def run_one(rows: dict[str, Plan], prompt: str, seed: int, work: Path, overrides: list[str]) -> dict:
    """Run all plans for one prompt and seed; return their figures and folders."""
    run = {"prompt": prompt, "seed": seed, "results": {}, "folders": {}, "peak_memory_gib": {}}
    for name, plan in rows.items():
        folder = work / f"{'-'.join(prompt.replace(',', '').split())}-{seed}" / slug(name)
        keys = [f"prompt={prompt}", "compare=[]", *overrides, *plan.changes]
        metrics = finished_run(plan.config, keys, folder, seed)
        (run["results"][name],) = metrics["results"].values()
        run["folders"][name], run["judge"] = str(folder), metrics["judge"]
        run["peak_memory_gib"][name] = metrics["peak_memory_gib"]
    return run


def grid(runs: list[dict], path: Path) -> None:
    """Write a grid with a row a method, showing each asset of each run at 30°."""
    rows = []
    for name in runs[0]["folders"]:
        folders = [Path(run["folders"][name]) / "images" for run in runs]
        assets = [asset for folder in folders for asset in sorted(folder.glob("*/*/")) if asset.is_dir()]
        rows.append(ViewRow(label(name), [iio.imread(sorted(asset.iterdir())[1]) for asset in assets]))
    save_grid(path, rows)


def label(name: str) -> str:
    """The name of a row of the grid."""
    if name == "dreamfusion":
        return "SDS, DreamFusion's settings"
    return name.replace("_", " ").capitalize() if name in ABLATIONS else method_title(name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change keys of the config")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmark-text-to-3d"))
    parser.add_argument("--methods", nargs="+", help="default: all; with --diverse csd and sds")
    parser.add_argument("--prompts", nargs="+", help="default: six, with --diverse two")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--diverse", action="store_true", help="four assets a prompt")
    parser.add_argument("--ablations", action="store_true", help="CSD with one part of it changed at a time")
    args = parser.parse_intermixed_args()
    methods = args.methods or (["csd", "sds"] if args.diverse else [*names_for(), "dreamfusion"])
    rows, runs = plans(methods, args.diverse, args.ablations), []
    for prompt in args.prompts or (OPEN_PROMPTS if args.diverse else PROMPTS):
        for seed in args.seeds:
            runs.append(run_one(rows, prompt, seed, args.work / args.json.stem, args.overrides))
            write_results(args.json, runs, FIGURES, args.overrides)
    grid(runs, args.json.with_suffix(".png"))
    judge = runs[0]["judge"] or ""
    print(
        "\n".join(mean_table(runs, {f: (name_judge(label, judge), digits) for f, (label, digits) in FIGURES.items()}))
    )


if __name__ == "__main__":
    main()
