"""Which metric to trust: how well each proxy orders edits, and assets of text to 3D, as their true errors do.

`python -m benchmarks.which_metric [--edits FILE.jsonl …] [--assets FILE.jsonl …] [--doc docs/which-metric.md]`

A line is one result: {"scene", "instruction", "kind", "psnr": dB to the nearest right answer, PROXY: value, …}, as
`benchmarks.referee` writes it, or {"prompt", "object_psnr": dB to the nearest right object, PROXY: value, …}, as
`benchmarks.assets` does. Lines with an "error" are left out. Proxies are found by their names in `PROXIES`; others are
skipped. Writes the document, and beside it a PNG of all results for each kind of file. Pairs are two results of one
scene and instruction; the 95 % intervals draw whole scenes anew.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.rank_statistics import accuracy_interval, pairwise_accuracy, spearman, spearman_interval
from csd3d.errors import InputError
from csd3d.files import write_text
from csd3d.report.pictures import save_png

PROXIES = {  # name: (label, 1: higher is better, -1: lower is better)
    "object_ssim": ("SSIM on the object", 1),
    "mask_iou": ("overlap of silhouettes", 1),
    "volume_iou": ("overlap of volumes", 1),
    "chamfer": ("distance between surfaces", -1),
    "colours_found": ("colours found", 1),
    "pattern_found": ("pattern found", 1),
    "normal_consistency": ("consistency of normals", 1),
    "warped_error": ("warped error", -1),
    "met3r": ("MEt3R's formula", -1),
    "agreement": ("agreement of views", 1),
    "clip_directional": ("CLIP (world) directional", 1),
    "clip_consistency": ("CLIP (world) consistency of neighbours", 1),
    "clip_direction_consistency": ("CLIP (world) consistency of directions", 1),
    "clip_similarity": ("CLIP (world) similarity to the source", 1),
    "clip_image": ("CLIP (world) similarity to the source, of frames", 1),
    "lpips_like": ("LPIPS-like distance to the source", -1),
    "lpips_warped": ("LPIPS-like distance of warped views", -1),
    "psnr_source": ("PSNR to the source", 1),
    "preservation": ("preservation", 1),
    "clip_colour": ("CLIP (world), in colour", 1),
    "clip_geometry": ("CLIP (world), shape alone", 1),
    "rank": ("rank among 32 prompts", -1),
    "view_words": ("views classified right", 1),
    "fd": ("FD (world)", -1),
}
# these need the right answer themselves
TRUTHS = {"object_ssim", "mask_iou", "volume_iou", "chamfer", "colours_found", "pattern_found"}
NEEDED = ("scene", "instruction", "kind", "psnr")
MOST_BYTES = 1 << 28
NOTES = "<!-- notes: what stands below is kept when this file is written again -->"
PANEL, COLUMNS = 210, 4
COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75))
INTRODUCTION = """# Which metric to trust

Made by
`{command}`.

The procedural world knows every right answer, so the true error of a result is known: PSNR to the nearest right answer.
A proxy is a figure that can be had without it. Two figures say what a proxy is worth:

* **pairs**: of two results for the same scene and instruction, how often the proxy prefers the one that is truly
  nearer. 1 is perfect, .5 is a coin.
* **rank**: Spearman's correlation with the true PSNR over all results, signed so that 1 is perfect.

In brackets: 95 % intervals from a bootstrap over scenes. CLIP (world) and FD (world) are networks of this toy world;
what is said of them does not carry over to real CLIP or FID.
"""


def read_lines(paths: list[Path]) -> list[dict]:
    """Read results; InputError names file and line of one that is not as the module says."""
    found = []
    for path in paths:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: no file of JSON lines below {MOST_BYTES >> 20} MiB")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                found.append(_read_line(line, f"{path}:{number}"))
    return [row for row in found if "error" not in row]


def _read_line(line: str, at: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{at}: not JSON; give one object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{at}: lacks an object")
    if "error" in row:
        return row
    if "prompt" in row and "object_psnr" in row:
        row = asset_line(row)
    if lacking := [key for key in NEEDED if key not in row]:
        raise InputError(f"{at}: lacks {', '.join(lacking)}")
    if not _number(row["psnr"]):
        raise InputError(f"{at}: psnr is {row['psnr']!r:.40}; give dB")
    return row


def asset_line(row: dict) -> dict:
    """A line of `benchmarks.assets` with the keys of an edit's: its prompt is the scene."""
    prompt = str(row["prompt"])
    kind = "pattern" if " with " in prompt else "no pattern"
    return row | {"scene": prompt, "instruction": "", "kind": kind, "psnr": row["object_psnr"]}


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def worth(rows: list[dict], proxy: str, rank: bool = True) -> dict | None:
    """What a proxy is worth on these results, with intervals; None if fewer than two have it. rank: also `spearman`."""
    rows = [row for row in rows if _number(row.get(proxy))]
    if len(rows) < 2:
        return None
    values = np.array([PROXIES[proxy][1] * float(row[proxy]) for row in rows])
    truth = np.array([float(row["psnr"]) for row in rows])
    scenes = [str(row["scene"]) for row in rows]
    groups = [(str(row.get("level", "")), str(row["scene"]), str(row["instruction"])) for row in rows]
    found = {"count": len(rows), "accuracy": pairwise_accuracy(values, truth, groups)}
    found["accuracy_interval"] = accuracy_interval(values, truth, groups, scenes)
    if rank:
        found["spearman"] = spearman(values, truth)
        found["spearman_interval"] = spearman_interval(values, truth, scenes)
    return found


def known_proxies(rows: list[dict]) -> dict[str, dict]:
    """What each proxy is worth that at least two results have, the one that orders pairs best first."""
    found = {proxy: told for proxy in PROXIES if (told := worth(rows, proxy))}
    return dict(sorted(found.items(), key=lambda pair: -np.nan_to_num(pair[1]["accuracy"], nan=-1.0)))


def table(rows: list[dict], proxies: dict[str, dict]) -> list[str]:
    """Markdown: a row for each of `known_proxies`, over all results and by kind of instruction."""
    kinds = [kind for kind, _ in Counter(str(row["kind"]) for row in rows).most_common()]
    lines = [f"| proxy | results | pairs | rank |{''.join(f' pairs, {kind} |' for kind in kinds if len(kinds) > 1)}"]
    lines.append("|" + "---|" * (4 + (len(kinds) if len(kinds) > 1 else 0)))
    for proxy, told in proxies.items():
        star = " *" if proxy in TRUTHS else ""
        cells = [PROXIES[proxy][0] + star, str(told["count"]), _cell(told, "accuracy"), _cell(told, "spearman")]
        for kind in kinds if len(kinds) > 1 else ():
            part = worth([row for row in rows if str(row["kind"]) == kind], proxy, rank=False)
            cells.append(_cell(part, "accuracy") if part else "–")
        lines.append(f"| {' | '.join(cells)} |")
    starred = TRUTHS & proxies.keys()
    return lines + (["", "\\* needs the right answer too: another true figure, not a proxy."] if starred else [])


def _cell(told: dict, key: str) -> str:
    low, high = told[f"{key}_interval"]
    interval = f" [{low:.2f}, {high:.2f}]" if math.isfinite(low) else ""
    return f"{told[key]:.2f}{interval}" if math.isfinite(told[key]) else "–"


def scatter(rows: list[dict], proxies: dict[str, dict], path: Path) -> None:
    """Write a panel a proxy: its value upwards, better is higher, by the true PSNR to the right; a colour a kind."""
    kinds = [kind for kind, _ in Counter(str(row["kind"]) for row in rows).most_common()]
    height = math.ceil(len(proxies) / COLUMNS) * PANEL + 24
    page = Image.new("RGB", (min(COLUMNS, max(len(proxies), 1)) * PANEL, height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=11)
    for k, proxy in enumerate(proxies):
        _panel(draw, font, (k % COLUMNS * PANEL, k // COLUMNS * PANEL), rows, proxy, kinds)
    x = 8
    for k, kind in enumerate(kinds):
        draw.text((x, height - 18), kind, COLOURS[k % len(COLOURS)], font)
        x += int(draw.textlength(kind, font)) + 14
    save_png(path, page.quantize(32))


def _panel(
    draw: ImageDraw.ImageDraw, font, at: tuple[int, int], rows: list[dict], proxy: str, kinds: list[str]
) -> None:
    label, sign = PROXIES[proxy]
    known = [row for row in rows if _number(row.get(proxy))]
    xs, ys = ([float(row[key]) for row in known] for key in ("psnr", proxy))
    left, top, side = at[0] + 12, at[1] + 20, PANEL - 42
    draw.rectangle((left, top, left + side, top + side), outline=(170, 170, 170))
    draw.text((left, at[1] + 4), label, "black", font)
    draw.text((left, top + side + 3), f"{min(xs):.1f} … {max(xs):.1f} dB", (110, 110, 110), font)

    def share(value: float, values: list[float]) -> float:
        return (value - min(values)) / ((max(values) - min(values)) or 1.0)

    for row, x, y in zip(known, xs, ys, strict=True):
        u, v = share(x, xs), share(sign * y, [sign * value for value in (min(ys), max(ys))])
        px, py = left + 3 + u * (side - 6), top + side - 3 - v * (side - 6)
        draw.ellipse((px - 1.5, py - 1.5, px + 1.5, py + 1.5), COLOURS[kinds.index(str(row["kind"])) % len(COLOURS)])


def document(parts: dict[str, list[dict]], doc: Path, command: str) -> None:
    """Write the document and its pictures."""
    text = [INTRODUCTION.format(command=command)]
    for name, rows in parts.items():
        picture = doc.with_name(f"{doc.stem}-{name}.png")
        proxies = known_proxies(rows)
        scatter(rows, proxies, picture)
        scenes = len({str(row["scene"]) for row in rows})
        what = {"edits": "scenes", "assets": "prompts"}.get(name, "scenes")
        text += [
            f"## {name.capitalize()}",
            "",
            f"{len(rows)} results of {scenes} {what}.",
            "",
            *table(rows, proxies),
            "",
        ]
        caption = "Each proxy (upwards, better is higher) against the true PSNR (to the right), a colour a kind"
        text += [f"![{caption}]({picture.name})", ""]
    kept = doc.read_text(encoding="utf-8").partition(NOTES)[2] if doc.exists() else ""
    write_text(doc, "\n".join([*text, NOTES]) + (kept or "\n"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", nargs="+", type=Path, default=[], help="JSON lines of edits")
    parser.add_argument("--assets", nargs="+", type=Path, default=[], help="JSON lines of assets of text to 3D")
    parser.add_argument("--doc", type=Path, default=Path("docs/which-metric.md"))
    args = parser.parse_args()
    parts = {name: read_lines(getattr(args, name)) for name in ("edits", "assets") if getattr(args, name)}
    if not any(parts.values()):
        raise InputError("which_metric: no results; give --edits or --assets files of JSON lines")
    document(parts, args.doc, " ".join(["python -m benchmarks.which_metric", *sys.argv[1:]]))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
