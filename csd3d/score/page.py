"""What `csd3d score` shows: a table on the terminal, and one page."""

from pathlib import Path

import numpy as np
from PIL import Image

from csd3d.cameras import evenly
from csd3d.report.labels import METRICS, format_value, metric_label
from csd3d.report.page import ReportData, ViewRow, write_report
from csd3d.score.inputs import Inputs, Views

SHOWN, SIDE, HERO_SIDE = 8, 256, 768  # pictures in a row, and pixels of their longer sides
FIRST = ("psnr_truth", "answer_agreement", "agreement", "overlap")


def figures_of(found: dict) -> dict[str, float | None]:
    """The figures of `measure` in one level, with the keys of `METRICS`."""
    kept = found["preservation"]
    flat = {"psnr_source": kept["psnr"], "lpips_like": kept["lpips_like"], "clip_image": kept["clip_similarity"]}
    rest = {key: value for key, value in found.items() if key in METRICS and key != "seconds"}
    return {key: rest.pop(key) for key in FIRST} | rest | flat


def table(found: dict) -> str:
    """The figures in lines: label, value, which way is better."""
    lines = []
    for key, value in figures_of(found).items():
        if value is not None:
            _, unit, better, decimals = METRICS[key]
            hint = ", ".join(filter(None, [unit, f"{better} is better" if better else ""]))
            label = metric_label(key, found["clip"] or "")
            lines.append(f"  {label:52} {format_value(value, decimals):>9}  {hint}")
    if found["answer"] is not None:
        lines.insert(0, f"  nearest right answer: {found['answer']}")
    notes = [f"  note: {note}" for note in found["notes"]]
    head = f"{_views(found)} of {found['size'][0]}x{found['size'][1]}, {found['seconds']} s"
    return "\n".join([head, *lines, *notes])


def write_page(path: Path, inputs: Inputs, found: dict) -> None:
    """Write one page with the figures and some of the views: before, after and the nearest right answer."""
    chosen = [inputs.chosen[i] for i in evenly(len(inputs.chosen), SHOWN).tolist()]
    rows = [ViewRow("Before", _small(inputs.before, chosen), method="source")]
    rows.append(ViewRow("After", _small(inputs.after, chosen), method="after"))
    for name, views in inputs.truths.items():
        note = "the nearest" if name == found["answer"] and len(inputs.truths) > 1 else ""
        rows.append(ViewRow(f"Right answer: {name}", _small(views, chosen), note, "truth"))
    middle = inputs.chosen[len(inputs.chosen) // 2]
    how = {"depth": "through depth", "flow": "along optical flow", None: "not compared with each other"}[found["warp"]]
    names = dict(zip(inputs.chosen, inputs.view_names, strict=True))
    data = ReportData(
        prompt=f"{inputs.after.name} against {inputs.before.name}",
        scene=f"{_views(found)} of {found['size'][0]} × {found['size'][1]}, {how}",
        before=_shrunk(inputs.before.read(middle), HERO_SIDE),
        after=_shrunk(inputs.after.read(middle), HERO_SIDE),
        facts=_facts(found),
        view_names=[names[view] for view in chosen],
        rows=rows,
        methods={"after": inputs.after.name},
        results={"after": figures_of(found)},
        metric_notes=" ".join([*(f"{note}." for note in found["notes"]), "docs/score.md explains every figure."]),
        judge=found["clip"] or "",
    )
    write_report(path, data)


def _facts(found: dict) -> dict[str, str]:
    facts = {}
    if found["answer"] is not None:
        facts["Nearest right answer"] = f"{found['answer']}, {found['psnr_truth']:.2f} dB"
    for label, key in (("Views that agree on it", "answer_agreement"), ("Pixels that agree", "agreement")):
        if found[key] is not None:
            facts[label] = f"{100 * found[key]:.0f} %"
    return facts


def _small(views: Views, chosen: list[int]) -> list[np.ndarray]:
    return [_shrunk(views.read(view), SIDE) for view in chosen]


def _shrunk(picture: np.ndarray, side: int) -> np.ndarray:
    scale = side / max(picture.shape[:2])
    if scale >= 1:
        return picture
    size = tuple(max(1, round(length * scale)) for length in reversed(picture.shape[:2]))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _views(found: dict) -> str:
    return "1 view" if found["views"] == 1 else f"{found['views']} views"
