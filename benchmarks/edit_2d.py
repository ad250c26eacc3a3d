"""CSD-Edit of panoramas and videos against InstructPix2Pix, MultiDiffusion, Pix2Video and FateZero; its ablations.

`python -m benchmarks.edit_2d --json FILE [--inputs panorama video] [--seeds …] [--sweep]`

Each input, prompt and seed (of the world's strip or orbit, and of the noise) is a run of its config with all baselines,
and one more run for each ablation, in folders under --work. Finished runs are not repeated; interrupted ones are
resumed. Prints the Markdown tables of docs/results.md and writes, beside the JSON, a grid of all methods' pictures for
each input. --sweep repeats everything at text scales 3, 5, 7.5 and 10 and draws directional similarity against
similarity to the source, by CLIP (world) if the config names no other, one curve a method.

The ablations keep the step size: the weights over the particles sum to 1 (`svgd.normalize` "row"), with SVGD or not.
"""

import argparse
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from benchmarks.runs import finished_run, mean, mean_table, write_results
from csd3d import registry
from csd3d.media import open_video
from csd3d.report import canvas as report
from csd3d.report.charts import Curves
from csd3d.report.labels import metric_label, name_judge
from csd3d.report.page import ReportData, ViewRow, write_report
from csd3d.report.pictures import save_grid

MAIN = "csd_edit"
CONFIGS = Path(__file__).parent.parent / "configs"
INPUTS = {"panorama": CONFIGS / "csd-edit-panorama.yaml", "video": CONFIGS / "csd-edit-video.yaml"}
PROMPTS = ("paint it a bright colour",)
BASELINES = {
    "panorama": ("ip2p", "ip2p_multidiffusion", "ip2p_downscaled"),
    "video": ("ip2p", "ip2p_multidiffusion", "ip2p_downscaled", "pix2video", "fatezero"),
}
ABLATIONS = {"no_svgd": ["editors.csd_edit.edit.svgd=null"], "random_noise": ["editors.csd_edit.baseline=noise"]}
CORRESPONDENCES = {"panorama": "overlap", "video": "flow"}  # compared with the default, none
SCALES = (3.0, 5.0, 7.5, 10.0)
FIGURES = {
    "psnr_truth": ("PSNR to truth, dB", 2),
    "ssim_truth": ("SSIM to truth", 3),
    "flow_warped_error": ("flow-warped error", 4),
    "neighbour_distance": ("LPIPS-like between neighbours", 4),
    "seam_visibility": ("seam visibility", 3),
    "seam_visibility_relative": ("over the source's", 3),
    "clip_directional": ("CLIP (world) directional", 3),
    "clip_image": ("CLIP (world) to source", 3),
    "clip_consistency": ("CLIP (world) consistency", 3),
    "unet_evaluations": ("UNet evaluations", 0),
    "seconds": ("seconds", 0),
}


def variants(kind: str) -> dict[str, list[str]]:
    """Overrides of the other runs of CSD-Edit, by name."""
    along = CORRESPONDENCES[kind]
    return ABLATIONS | {f"correspondence_{along}": [f"editors.csd_edit.correspondence={along}"]}


def run_one(kind: str, prompt: str, seed: int, args: argparse.Namespace) -> dict:
    """Results of all methods and all variants of CSD-Edit on one input."""
    keys = [f"prompt={prompt}", f"world.seed={seed}", *args.overrides]
    base = args.work / f"{kind}-{'-'.join(prompt.split())}-{seed}"
    metrics = finished_run(INPUTS[kind], [*keys, compared(kind, args)], base / "main", seed)
    folders = dict.fromkeys(metrics["results"], str(base / "main"))
    for name, changes in variants(kind).items():
        if args.variants is not None and name not in args.variants:
            continue
        found = finished_run(INPUTS[kind], [*keys, "compare=[]", *changes], base / name, seed)
        metrics["results"][name] = found["results"][MAIN]
        folders[name] = str(base / name)
    return {"input": kind, "instruction": prompt, "seed": seed, "folders": folders, **metrics}


def compared(kind: str, args: argparse.Namespace) -> str:
    """The override that chooses the baselines."""
    chosen = [name for name in BASELINES[kind] if args.baselines is None or name in args.baselines]
    return f"compare=[{', '.join(chosen)}]"


def run_sweep(kind: str, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Run all prompts and seeds at each text scale: {"3": runs, ...}."""
    found = {}
    for scale in SCALES:
        keys = [f"editors.csd_edit.text_scale={scale}", f"sampling.text_scale={scale}", compared(kind, args)]
        runs = []
        for prompt, seed in ((prompt, seed) for prompt in args.prompts for seed in args.seeds):
            folder = args.work / f"{kind}-{'-'.join(prompt.split())}-{seed}" / f"scale-{scale:g}"
            own = [f"prompt={prompt}", f"world.seed={seed}", *args.overrides, *keys]
            runs.append({"seed": seed, **finished_run(INPUTS[kind], own, folder, seed)})
        found[f"{scale:g}"] = runs
    return found


def curves(sweep: dict[str, list[dict]]) -> dict[str, list[tuple[float, float, str]]]:
    """Return {method: [(clip_image, clip_directional, text scale), ...]}."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for scale, runs in sweep.items():
        for method in runs[0]["results"]:
            x, y = (mean(runs, method, figure) for figure in ("clip_image", "clip_directional"))
            if x is not None and y is not None:
                found.setdefault(title(method), []).append((x, y, scale))
    return found


def draw(path: Path, points: dict[str, list[tuple[float, float, str]]], judge: str) -> None:
    """Write a page with the chart of `curves`."""
    lines = {method: tuple(zip(*found, strict=True))[:2] for method, found in points.items()}
    title, x_label = (metric_label(figure, judge) for figure in ("clip_directional", "clip_image"))
    chart = Curves(title, lines, x_label=x_label)
    write_report(path, ReportData("Text scales", curves=[chart]))


def grid(runs: list[dict], path: Path) -> None:
    """Write a grid: a row a method, with each run's picture or three frames of its video; first the source."""
    methods = list(runs[0]["results"])
    wanted = methods if runs[0]["input"] == "video" else ["before", *methods]
    rows = []
    for method in wanted:
        folders = [Path(run["folders"][MAIN if method == "before" else method]) for run in runs]
        rows.append(ViewRow(title(method), [shown for folder in folders for shown in pictures(folder, method)]))
    save_grid(path, rows)


def pictures(folder: Path, method: str) -> list[np.ndarray]:
    """A method's results in a run, [H, W, 3] uint8: a picture, or the first, middle and last frame of a video."""
    baseline = method in registry.names("canvas_editor") and method != MAIN
    stem = folder / "videos" / method if baseline else folder / "result"
    if (video := stem.with_suffix(".mp4")).exists():
        with open_video(video) as reader:
            return list(reader.frames([0, reader.count // 2, reader.count - 1]))
    still = folder / "images" / f"{method}.png" if baseline or method == "before" else folder / "result.png"
    return [iio.imread(still)[..., :3]]


def title(method: str) -> str:
    """A method's name in the grid and the chart."""
    known = method in registry.names("canvas_editor")
    return report.title(method) if known else method.replace("_", " ").capitalize()


def tables(runs: list[dict]) -> list[str]:
    """Markdown tables, one for each kind of input, with a row a method and all figures that any method has."""
    lines = []
    for kind in dict.fromkeys(run["input"] for run in runs):
        own = [run for run in runs if run["input"] == kind]
        measured = {figure for run in own for figures in run["results"].values() for figure in figures}
        judge = own[0]["judge"] or ""
        known = {f: (name_judge(label, judge), digits) for f, (label, digits) in FIGURES.items() if f in measured}
        lines += ["", kind, ""]
        lines += mean_table(own, known)
    return [*lines, "", f"peak memory, of all in one process: {max(run['peak_memory_gib'] for run in runs):.2f} GiB"]


def main() -> None:
    """The command line."""
    args = build_parser().parse_intermixed_args()
    runs, sweep = [], {}
    for kind in args.inputs:
        for prompt, seed in ((prompt, seed) for prompt in args.prompts for seed in args.seeds):
            runs.append(run_one(kind, prompt, seed, args))
            write_results(args.json, runs, FIGURES, args.overrides)
        own = [run for run in runs if run["input"] == kind]
        grid(own, args.json.with_name(f"{args.json.stem}-{kind}.png"))
    for kind in args.inputs if args.sweep else ():
        sweep[kind] = curves(run_sweep(kind, args))
        write_results(args.json, runs, FIGURES, args.overrides, sweep=sweep)
        if sweep[kind]:
            draw(args.json.with_name(f"{args.json.stem}-{kind}-sweep.html"), sweep[kind], runs[0]["judge"] or "")
    print("\n".join(tables(runs)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change keys of the configs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmark-edit-2d"))
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--baselines", nargs="*", help="all that the input has, if not given")
    parser.add_argument("--variants", nargs="*", help="ablations and correspondences; all if not given")
    parser.add_argument("--sweep", action="store_true", help="also at text scales 3, 5, 7.5 and 10")
    return parser


if __name__ == "__main__":
    main()
