"""The referee's tables, in Markdown: a row a method, and the paired differences of CSD-Edit and the other rows."""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.lines import Lines, difference, mean, paired, read_lines, spread
from benchmarks.referee.protocol import VERSION
from benchmarks.referee.rows import Row
from benchmarks.statistics import bootstrap
from csd3d.errors import InputError

FIGURES = {
    "psnr": ("PSNR to one answer, dB", 2),
    "agree": ("views that agree", 2),
    "warped_error": ("warped error", 3),
    "left_alone": ("left alone, dB", 1),
    "detail": ("detail", 2),
    "pictures_agree": ("pictures that agree", 2),
    "pictures_detail": ("detail of pictures", 2),
    "seams": ("seams, over the source's", 2),
    "evaluations": ("evaluations", 0),
    "seconds": ("seconds", 1),
}
CLAIMS = ("psnr", "agree", "warped_error", "detail")  # what `claims` compares
ALONE = "csd_edit_alone_shared"  # ours without collaboration
KINDS = ("several answers", "one answer", "geometry", "several at once", "nothing")
OURS = "csd_edit"
PLACE = ("scene", "instruction", "seed")


def tables(path: Path, rows: dict[str, Row]) -> str:
    """All tables of a level's lines; InputError where there are none, or lines that are not of this version."""
    lines = read_lines(path, ("row", *PLACE), VERSION)
    if not lines:
        raise InputError(f"{path}: no lines yet; `python -m benchmarks.referee run` makes them")
    for line, key in ((line, key) for line in lines for key in ("kind", "psnr", "answers")):
        if "error" not in line and line.get(key) is None:
            raise InputError(f"{path}: {line['row']} on {line['scene']}, {line['instruction']!r}: has no {key}")
    failed = [line for line in lines if "error" in line]
    lines = [line for line in lines if "error" not in line]
    present = [name for name in rows if any(line["row"] == name for line in lines)]
    parts = [overview(lines, present, rows), by_kind(lines, present, rows)]
    if OURS in present:
        parts += [differences(lines, present, rows), claims(lines, present, rows)]
    parts += [f"`{line['row']}` raised on {line['scene']}, {line['instruction']!r}: {line['error']}" for line in failed]
    return "\n\n".join(parts)


def overview(lines: Lines, present: Sequence[str], rows: dict[str, Row]) -> str:
    """Means over all edits of a row, of the figures that any edit has."""
    figures = {key: about for key, about in FIGURES.items() if any(line.get(key) is not None for line in lines)}
    out = [f"| | n | {' | '.join(label for label, _ in figures.values())} |", "|" + "---|" * (len(figures) + 2)]
    for name in present:
        own = [line for line in lines if line["row"] == name]
        cells = [mean(own, key, digits) for key, (_, digits) in figures.items()]
        out.append(f"| {rows[name].title} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(out)


def by_kind(lines: Lines, present: Sequence[str], rows: dict[str, Row]) -> str:
    """Mean PSNR with its interval, by kind of instruction."""
    kinds = [kind for kind in KINDS if any(line["kind"] == kind for line in lines)]
    out = [f"| PSNR, dB | {' | '.join(kinds)} |", "|" + "---|" * (len(kinds) + 1)]
    for name in present:
        cells = []
        for kind in kinds:
            own = [line for line in lines if line["row"] == name and line["kind"] == kind]
            cells.append(
                spread(bootstrap([line["psnr"] for line in own], [line["scene"] for line in own])) if own else "–"
            )
        out.append(f"| {rows[name].title} | {' | '.join(cells)} |")
    return "\n".join(out)


def differences(lines: Lines, present: Sequence[str], rows: dict[str, Row]) -> str:
    """CSD-Edit minus every other row, on the same inputs: mean and interval; bold where it is clear of 0."""
    out = [f"| CSD-Edit minus …, dB | {' | '.join(CHOSEN)} |", "|" + "---|" * (len(CHOSEN) + 1)]
    for name in present:
        if name != OURS:
            pairs = paired(lines, OURS, name, "psnr", PLACE)
            cells = [
                difference([pair for pair in pairs if chosen(pair[0])], "psnr", "scene") for chosen in CHOSEN.values()
            ]
            out.append(f"| {rows[name].title} | {' | '.join(cells)} |")
    return "\n".join(out)


def claims(lines: Lines, present: Sequence[str], rows: dict[str, Row]) -> str:
    """CSD-Edit against the best baseline of equal cost and against itself without collaboration, figure by figure."""
    few = [line for line in lines if several(line)]
    equal = [name for name in present if not (name.startswith(OURS) or rows[name].free)]
    baselines = [name for name in equal if paired(few, OURS, name, "psnr", PLACE)]
    best = max(baselines, key=lambda name: psnr_beside(few, name), default=None)
    others = [name for name in (best, ALONE if ALONE in present else None) if name]
    out = [
        "| several answers: CSD-Edit; other; difference | PSNR, dB | agree | warped error | detail |",
        "|---|---|---|---|---|",
    ]
    for name in others:
        cells = [compared(few, name, key) for key in CLAIMS]
        out.append(f"| {rows[name].title}{' (the best baseline)' if name == best else ''} | {' | '.join(cells)} |")
    return "\n".join(out)


def several(line: dict) -> bool:
    """Whether a line's instruction has several right answers."""
    return line["kind"] in ("several answers", "several at once") and line["answers"] > 1


CHOSEN: dict[str, Callable[[dict], bool]] = {
    "several answers": several,
    "one answer": lambda line: line["answers"] == 1,
    "all": lambda line: True,
}


def psnr_beside(lines: Lines, name: str) -> float:
    """A row's mean PSNR on the inputs that CSD-Edit has lines of too."""
    found = [other["psnr"] for _, other in paired(lines, OURS, name, "psnr", PLACE)]
    return sum(found) / len(found)


def compared(lines: Lines, name: str, key: str) -> str:
    """One cell of `claims`: both means on the same inputs, and their difference with its interval."""
    pairs = paired(lines, OURS, name, key, PLACE)
    if not pairs:
        return "–"
    digits = FIGURES[key][1]
    means = (f"{sum(side[key] for side in sides) / len(pairs):.{digits}f}" for sides in zip(*pairs, strict=True))
    return "; ".join([*means, difference(pairs, key, "scene", digits)])
