"""Make small assets of text to 3D, good and bad ones, for `python -m benchmarks.which_metric --assets`.

`python -m benchmarks.which_metric_assets [--work DIR] [--json FILE] [--prompts …] [--seeds …] [--variants …]`

Runs every prompt, seed and variant (a method and how it is guided, some of them on purpose too short or weak) with
a fifth of the default steps, in folders under --work; finished runs are not repeated. Adds a line to the file for each.
"""

import argparse
import json
from pathlib import Path

from benchmarks.runs import finished_run
from csd3d.files import write_text

CONFIG = Path(__file__).parent.parent / "configs" / "csd-text-to-3d.yaml"
PROMPTS = {  # prompt: kind
    "a red chair with yellow stripes": "pattern",
    "a blue duck": "one colour",
    "a green mug": "one colour",
    "a white ball with black dots": "pattern",
    "an orange house": "parts",
    "a pink snowman, wearing a blue hat": "parts",
}
VARIANTS = {
    "csd": (),
    "sds": ("method=sds", "distill.svgd=null"),
    "weak": ("distill.guidance_scale=1.5",),
    "short": ("distill.steps=24", "losses.opacity=[4, 0, 24, 300]", "losses.distortion=[4, 0, 24, 300]"),
}
SMALL = (
    "distill.steps=60", "asset.resolution=[[0, 32]]", "asset.levels=[[0, 3], [8, 4], [16, 5]]",
    "losses.opacity=[10, 0, 60, 300]", "losses.distortion=[10, 0, 60, 300]", "optim.ema=0.9", "evaluate.size=64",
    "export.video_frames=1", "export.mesh.resolution=32", "export.mesh.texture_size=64",
    "export.mesh.face_budget=1000", "compare=[]", "save_seconds=600",
)  # fmt: skip


def made(prompt: str, variant: str, seed: int, work: Path) -> dict:
    """Return the line of one asset, after making it if that has not been done."""
    folder = work / f"{'-'.join(prompt.replace(',', '').split())}-{variant}-{seed}"
    metrics = finished_run(CONFIG, [f"prompt={prompt}", *SMALL, *VARIANTS[variant]], folder, seed)
    (found,) = metrics["results"].values()
    about = {"level": "asset", "row": variant, "scene": prompt, "instruction": "", "kind": PROMPTS.get(prompt, "other")}
    left_out = ("object_psnr", "seconds", "unet_evaluations")
    kept = {key: value for key, value in found.items() if key not in left_out and value is not None}
    return about | {"seed": seed, "psnr": found["object_psnr"]} | kept


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/which-metric-assets"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/which-metric-assets.jsonl"))
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    for prompt in args.prompts:
        for seed in args.seeds:
            for variant in args.variants:
                line = json.dumps(made(prompt, variant, seed, args.work))
                known = args.json.read_text().splitlines() if args.json.exists() else []
                write_text(args.json, "\n".join([*(old for old in known if old != line), line]) + "\n")


if __name__ == "__main__":
    main()
