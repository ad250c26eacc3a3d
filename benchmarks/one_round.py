"""Measure how well views agree after one round of CSD-Edit, with and without sharing, before a scene is fitted.

`python -m benchmarks.one_round --json FILE`

The training views of a scene of the procedural world are edited once, as in the first round of the default editor (24
steps, the baseline of the paper). "no kernel" is the same with svgd null: no sharing, but the same noise. Figures: the
PSNR to the right answer that fits all views best, the share of views whose nearest answer is the most common one, and
the warped error between views. Writes FILE after every edit, and skips edits that it already has.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.edit_scene import CONFIG, SCENES
from csd3d.datasets import Capture, load_capture
from csd3d.editors.csd_edit_scene import CSDEditScene
from csd3d.editors.scene import SceneEdit, SceneSource
from csd3d.engine.run_folder import environment
from csd3d.evaluation.ground_truth import load_truth
from csd3d.metrics import best_answer, psnr, warped_error
from csd3d.priors import Prior, load_prior
from csd3d.run import read
from csd3d.world.dataset import write_capture

VARIANTS = ("csd_edit", "no kernel")


@dataclass
class Line:
    """One edit: its scene, its settings and its figures."""

    scene: str
    seed: int
    variant: str
    psnr: float  # to the answer that fits all views best, in dB
    agree: float  # share of views whose nearest answer is the most common one
    warped_error: float  # mean of short and long range, on the object


def editor_of(variant: str) -> CSDEditScene:
    """The shipped editor, with sharing or without."""
    editor = CSDEditScene()
    return editor if variant == "csd_edit" else replace(editor, edit=replace(editor.edit, svgd=None))


def edit_once(capture: Capture, prior: Prior, prompt: str, seed: int, variant: str) -> torch.Tensor:
    """The capture's pictures [B, H, W, 3] with edited training views."""
    source = SceneSource(prior, capture, prompt)
    edit = SceneEdit(source, None, capture.images.clone(), torch.Generator().manual_seed(seed), seed)
    editor_of(variant).update(edit, 0, lambda report: None)
    return edit.images


def measure(capture: Capture, prompt: str, images: torch.Tensor) -> dict[str, float]:
    """The figures of a `Line`."""
    truth, train = load_truth(capture, prompt), capture.train
    answers = torch.stack([truth.views(scene, train).rgb for scene in truth.answers])
    best, scores, _ = best_answer(images[train], answers)
    nearest = torch.stack([psnr(images[train], answer) for answer in answers]).argmax(0)
    views = truth.views(truth.answers[best], train)
    errors = warped_error(images[train], views.depth, capture.cameras[train], views.mask)
    return {
        "psnr": scores.mean().item(),
        "agree": nearest.bincount().max().item() / len(train),
        "warped_error": (errors["short"] + errors["long"]) / 2,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmark-one-round"))
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=["duck", "mug"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    args = parser.parse_args()
    config = read(CONFIG, [])
    prior = load_prior(config.prior, require="edit")
    lines = json.loads(args.json.read_text())["lines"] if args.json.exists() else []
    known = {(line["scene"], line["seed"], line["variant"]) for line in lines}
    for seed in args.seeds:
        for scene in args.scenes:
            folder = args.work / scene
            if not (folder / "world.json").exists():
                write_capture(folder, SCENES[scene], seed=3)
            capture = load_capture(replace(config.scene, path=str(folder)))
            for variant in VARIANTS:
                if (scene, seed, variant) in known:
                    continue
                images = edit_once(capture, prior, config.prompt, seed, variant)
                line = Line(scene, seed, variant, **measure(capture, config.prompt, images))
                lines.append(vars(line))
                print(line, flush=True)
                result = {"prompt": config.prompt, "environment": environment(), "lines": lines}
                args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
