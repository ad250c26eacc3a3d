"""The tables of a set, in Markdown: means, means with intervals, and differences from the row that is compared with.

Intervals are of a bootstrap that draws prompts, each with all its seeds.
"""

from collections.abc import Sequence

from benchmarks.assets.rows import Set
from benchmarks.lines import Line, Lines, difference, having, mean, paired, spread
from benchmarks.statistics import bootstrap
from csd3d.report.labels import name_judge

FIGURES = {  # CLIP and FD come last, under the name of the judge, such as CLIP (world)
    "object_psnr": ("PSNR on the object, dB", 2),
    "object_ssim": ("SSIM", 3),
    "mask_iou": ("mask IoU", 3),
    "chamfer": ("Chamfer", 3),
    "volume_iou": ("volume IoU", 3),
    "colours_found": ("colours", 2),
    "pattern_found": ("pattern", 2),
    "sides_right": ("sides right", 2),
    "stray_matter": ("not the object", 3),
    "normal_consistency": ("normals agree", 2),
    "answers_covered": ("right answers covered", 2),
    "distinct_answers": ("different answers", 2),
    "unet_evaluations": ("evaluations", 0),
    "seconds": ("seconds", 0),
    "diversity": ("CLIP (world) diversity", 3),
    "clip_colour": ("CLIP (world) colour", 3),
    "clip_geometry": ("CLIP (world) geometry", 3),
    "view_words": ("CLIP (world) view words", 2),
    "fd": ("FD", 3),
    "fd_floor": ("FD, its floor", 3),
}
COMPARED = (
    "object_psnr",
    "mask_iou",
    "chamfer",
    "volume_iou",
    "pattern_found",
    "sides_right",
    "answers_covered",
    "distinct_answers",
)
PLACE = ("prompt", "seed")


def tables(lines: Lines, of: Set) -> str:
    """All tables of a set's lines; what raised is told below."""
    good = [line for line in lines if "error" not in line]
    present = [name for name in of.rows if any(line["row"] == name for line in good)]
    parts = [f"{of.about}; {len({line['prompt'] for line in good})} prompts", overview(good, present, of)]
    parts += [with_intervals(good, present, of), against(good, present, of)]
    failed = [line for line in lines if "error" in line]
    parts += [raised(line) for line in failed]
    return "\n\n".join(part for part in parts if part)


def raised(line: Line) -> str:
    """What an asset raised that could not be made."""
    return f"`{line['row']}` raised on {line['prompt']!r}, seed {line['seed']}: {line['error']}"


def known(lines: Lines, keys: Sequence[str]) -> list[str]:
    """Those of the figures that any line has."""
    return [key for key in keys if any(line.get(key) is not None for line in lines)]


def overview(lines: Lines, present: Sequence[str], of: Set) -> str:
    """The mean of every figure."""
    keys = known(lines, list(FIGURES))
    judge = next((line["judge"] for line in lines if line.get("judge")), "")
    labels = [name_judge(FIGURES[key][0], judge) for key in keys]
    out = [f"| mean | n | {' | '.join(labels)} |", "|" + "---|" * (len(keys) + 2)]
    for name in present:
        own = [line for line in lines if line["row"] == name]
        cells = [mean(own, key, FIGURES[key][1]) for key in keys]
        out.append(f"| {of.rows[name].title} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(out)


def with_intervals(lines: Lines, present: Sequence[str], of: Set) -> str:
    """Means with their intervals, of what the rows are compared by."""
    keys = known(lines, COMPARED)
    out = [f"| mean, interval | {' | '.join(FIGURES[key][0] for key in keys)} |", "|" + "---|" * (len(keys) + 1)]
    for name in present:
        cells = []
        for key in keys:
            own = having(lines, name, key)
            found = bootstrap([line[key] for line in own], [line["prompt"] for line in own]) if own else None
            cells.append(spread(found, FIGURES[key][1]) if found else "–")
        out.append(f"| {of.rows[name].title} | {' | '.join(cells)} |")
    return "\n".join(out)


def against(lines: Lines, present: Sequence[str], of: Set) -> str:
    """Every row minus the row `of.against` under the same prior, on the same prompts and seeds; "" where there is none.

    Bold where the interval is clear of 0.
    """
    keys = known(lines, COMPARED)
    out = [f"| minus {of.against}, same prior | {' | '.join(FIGURES[key][0] for key in keys)} |"]
    out += ["|" + "---|" * (len(keys) + 1)]
    for name in present:
        other = f"{of.rows[name].prior}/{of.against}"
        if name != other and other in present:
            cells = [difference(paired(lines, name, other, key, PLACE), key, "prompt", FIGURES[key][1]) for key in keys]
            out.append(f"| {of.rows[name].title} | {' | '.join(cells)} |")
    return "\n".join(out) if len(out) > 2 else ""
