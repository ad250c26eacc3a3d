"""Evaluate the shipped priors on held-out pairs: reconstruction, named colours, edits against the true edit.

Models are opened, sampled and decoded by csd3d itself, so that what is judged is what a job gets.

Symbols: B images in a batch, x images [B,3,S,S] in [0, 1], ω_y text scale, ω_s image scale.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from csd3d.arguments import path_of
from csd3d.distillation.ddim import ddim_sample
from csd3d.distillation.guidance import edit_predictor
from csd3d.editors.canvas import Sampling
from csd3d.errors import InputError
from csd3d.files import write_text
from csd3d.metrics import psnr
from csd3d.priors import Prior, PriorConfig, load_prior
from tools.train_shipped.data import Pairs, gather, open_pairs
from tools.train_shipped.sheet import edit_rows, save_sheet

SCALES = tuple(itertools.product((1.0, 1.5, 2.0, 3.0, 5.0), (1.0, 1.5)))


def add_options(part: argparse.ArgumentParser) -> None:
    """The options of `judge`."""
    add_common_options(part)
    part.add_argument("--model", type=Path, required=True, help="pipeline folder")
    part.add_argument("--count", type=int, default=300, help="unambiguous pairs to edit")
    part.add_argument("--ambiguous", type=int, default=90, help="ambiguous pairs with known answers to edit")
    part.add_argument("--sweep", type=int, default=60, help="further pairs on which the scales are chosen")
    part.add_argument("--text-scale", type=float, help="no sweep: this scale")
    part.add_argument("--image-scale", type=float, help="no sweep: this scale")


def add_common_options(part: argparse.ArgumentParser) -> None:
    """Options of both `judge` and `judge-text`."""
    part.add_argument("--pairs", type=Path, required=True, help="held-out pairs")
    part.add_argument("--json", type=path_of, required=True, help="where the numbers go")
    part.add_argument("--sheet", type=path_of, help="contact sheet (PNG)")
    part.add_argument("--log", type=Path, nargs="*", default=[], help="log.jsonl files whose curves go into the report")
    part.add_argument("--steps", type=int, default=20, help="DDIM steps")
    part.add_argument("--seed", type=int, default=0)
    part.add_argument("--threads", type=int)
    part.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))


def run(options: argparse.Namespace) -> None:
    """Judge a pipeline folder by the options and write the JSON report and the contact sheet."""
    pairs = open_pairs(options.pairs)
    with torch.no_grad():
        report, edits = judge(pairs, open_judged(options, "edit"), options)
    write_report(report, options)
    if options.sheet:
        save_sheet(options.sheet, edit_rows(pairs, edits))
    print(json.dumps({k: v for k, v in report.items() if k != "curves"}, indent=1))


def judge(pairs: Pairs, prior: Prior, options: argparse.Namespace) -> tuple[dict, dict]:
    """The report and the edits {pair index: image [3,S,S]}; scales are swept on pairs that are not judged."""
    clear = [i for i, record in enumerate(pairs.records) if not record["ambiguous"]]
    vague = [i for i, record in enumerate(pairs.records) if record["ambiguous"] and record.get("answers")]
    if not clear:
        raise InputError(f"{options.pairs}/pairs.jsonl: no unambiguous pairs to judge by")
    judged = clear[: options.count] + (vague[: options.ambiguous] if pairs.answers is not None else [])

    def edit(indices: list[int], scales: tuple[float, float]) -> Tensor:
        way = Sampling(steps=options.steps, text_scale=scales[0], image_scale=scales[1])
        return edit_pairs(pairs, indices, prior, way, options.seed)

    report = {"vae": judge_vae(pairs, prior)}
    scales = (options.text_scale, options.image_scale)
    if None in scales:
        tried = clear[options.count : options.count + options.sweep] or clear[: options.sweep]
        report["sweep"] = {scales: mean_psnr(pairs, tried, edit(tried, scales)) for scales in SCALES}
        scales = max(report["sweep"], key=report["sweep"].get)
        report["sweep"] = {f"text {y} image {s}": psnr for (y, s), psnr in report["sweep"].items()}
    edits = edit(judged, scales)
    report |= {"text_scale": scales[0], "image_scale": scales[1], "steps": options.steps}
    report["edits"] = judge_edits(pairs, judged, edits)
    return report, dict(zip(judged, edits, strict=True))


def open_judged(options: argparse.Namespace, kind: str) -> Prior:
    """Open the model as a job does; `kind` is "edit" or "text"."""
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[options.precision]
    return load_prior(PriorConfig(model=str(options.model), device="cpu", dtype=dtype), require=kind)


def reconstruct(prior: Prior, images: Tensor) -> Tensor:
    """Images through the VAE's posterior mode and back, clamped to [0, 1], in batches of 32."""
    return torch.cat([prior.decode(prior.encode(part)) for part in images.split(32)])


def judge_vae(pairs: Pairs, prior: Prior, count: int = 500) -> dict:
    """Mean PSNR over source images, and the share of objects whose mean keeps its nearest named colour."""
    indices = torch.arange(min(count, len(pairs)))
    images = gather(pairs.source, indices)
    decoded = reconstruct(prior, images)
    scores = psnr(images.permute(0, 2, 3, 1), decoded.permute(0, 2, 3, 1))
    report = {"images": len(indices), "psnr": scores.mean().item()}
    masks = pairs.mask[indices][:, None] > 0
    seen = masks.sum((1, 2, 3)) >= 16
    names, before = nearest_colours(images[seen], masks[seen])
    _, after = nearest_colours(decoded[seen], masks[seen])
    lost = [f"{names[a]} to {names[b]}" for a, b in zip(before.tolist(), after.tolist(), strict=True) if a != b]
    report |= {"colour_kept": (before == after).float().mean().item(), "colours_lost": sorted(lost)}
    return report


def nearest_colours(images: Tensor, masks: Tensor) -> tuple[list[str], Tensor]:
    """Names, and for each image [B,3,S,S] the index of the name nearest in RGB to its mean over masks [B,1,S,S]."""
    from csd3d.world.language import COLOURS

    palette = torch.tensor([list(rgb) for rgb in COLOURS.values()], dtype=torch.float32)
    palette = palette / 255 if palette.max() > 1 else palette
    means = (images * masks).sum((2, 3)) / masks.sum((2, 3))
    return list(COLOURS), torch.cdist(means, palette).argmin(1)


def edit_pairs(pairs: Pairs, indices: list[int], prior: Prior, way: Sampling, seed: int, batch: int = 32) -> Tensor:
    """Edits [N,3,S,S] of the pairs at `indices` by their own instructions; the noise depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    edits = []
    for first in range(0, len(indices), batch):
        chunk = indices[first : first + batch]
        images = gather(pairs.source, torch.tensor(chunk))
        edits.append(edit_images(prior, images, [pairs.records[i]["instruction"] for i in chunk], way, generator))
    return torch.cat(edits)


@torch.no_grad()
def edit_images(
    prior: Prior, images: Tensor, instructions: list[str], way: Sampling, generator: torch.Generator
) -> Tensor:
    """Images [B,3,S,S] edited by their instructions: DDIM from noise, guided as InstructPix2Pix is."""
    source = prior.encode_condition(images)
    predict = edit_predictor(prior.predict, tuple(instructions), source, way.text_scale, way.image_scale)
    z = torch.randn(source.shape, generator=generator)
    return prior.decode(ddim_sample(predict, z, prior.alphas_cumprod, way.timesteps(prior.num_train_timesteps)))


def best_psnr(pairs: Pairs, index: int, image: Tensor) -> float:
    """PSNR of one image against the nearest of the pair's valid answers."""
    truths = pairs.truths(index).float() / 255
    return psnr(image.permute(1, 2, 0).expand_as(truths), truths).max().item()


def mean_psnr(pairs: Pairs, indices: list[int], edits: Tensor) -> float:
    """Mean over pairs of `best_psnr`."""
    return sum(best_psnr(pairs, i, image) for i, image in zip(indices, edits, strict=True)) / len(indices)


def judge_edits(pairs: Pairs, indices: list[int], edits: Tensor) -> dict:
    """PSNR to the truth, and the share of changed pairs whose edit beats the source; over all and by family."""
    rows = []
    for i, image in zip(indices, edits, strict=True):
        record = pairs.records[i]
        source = gather(pairs.source, torch.tensor([i]))[0]
        row = {"family": record["family"], "ambiguous": record["ambiguous"], "changes": record["changes"]}
        rows.append(row | {"psnr": best_psnr(pairs, i, image), "source_psnr": best_psnr(pairs, i, source)})
    families = sorted({row["family"] for row in rows})
    return {
        "unambiguous": summary(rows, lambda row: not row["ambiguous"]),
        "ambiguous": summary(rows, lambda row: row["ambiguous"]),
        "all": summary(rows, lambda row: True),
        "families": {name: summary(rows, lambda row, name=name: row["family"] == name) for name in families},
    }


def summary(rows: list[dict], chosen: Callable[[dict], bool]) -> dict:
    """Counts, mean PSNRs and closer-than-source share of the rows that `chosen` accepts; null if there are none."""
    rows = [row for row in rows if chosen(row)]
    changed = [row["psnr"] > row["source_psnr"] for row in rows if row["changes"]]
    return {
        "pairs": len(rows),
        "psnr": _mean([row["psnr"] for row in rows]),
        "source_psnr": _mean([row["source_psnr"] for row in rows]),
        "closer_than_source": _mean(changed),
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def write_report(report: dict, options: argparse.Namespace) -> None:
    """Write the report, with the learning curves of the given logs, to --json."""
    report["curves"] = {str(path): _curve(path) for path in options.log}
    write_text(options.json, json.dumps(report, indent=1) + "\n")


def _curve(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return rows[:: max(1, len(rows) // 60)]
