"""What a sweep found: results.json, table.md with mean ± standard deviation over seeds, and one HTML page."""

import json
import math
import statistics
from html import escape
from pathlib import Path
from typing import Any

from csd3d.files import write_text
from csd3d.report.labels import metric_label
from csd3d.report.page import TEMPLATE
from csd3d.sweep.grid import Sweep
from csd3d.sweep.work import finished

FIRST = 6  # figures in the table where the sweep names none
PICTURES = ("images/views.png", "images/grid.png", "result.png")


def write_report(folder: Path, sweep: Sweep, errors: dict[str, str]) -> str:
    """Write the three files into `folder`; return the Markdown table."""
    runs = []
    for run in sweep.runs:
        place = folder / run.name
        metrics = json.loads((place / "metrics.json").read_text()) if finished(place) else {}
        runs.append({"name": run.name, "values": run.values, "error": errors.get(run.name), **metrics})
    rows = rows_of(runs, sweep.metrics)
    table = markdown(rows)
    write_text(folder / "results.json", json.dumps({"config": str(sweep.config), "runs": runs}, indent=2) + "\n")
    write_text(folder / "table.md", table + "\n")
    write_text(folder / "report.html", page(folder, sweep, runs, rows))
    return table


def rows_of(runs: list[dict[str, Any]], wanted: list[str]) -> list[list[str]]:
    """The head of the table, then a row a method of each group of runs that differ in their seed alone."""
    keys = [key for key in (runs[0]["values"] if runs else {}) if key != "seed"]
    groups: dict[str, list[dict]] = {}
    for run in runs:
        cells = {key: run["values"][key] for key in keys}
        for method, figures in run.get("results", {}).items():
            groups.setdefault(json.dumps([*cells.values(), method]), []).append(figures)
    names = wanted or list(dict.fromkeys(name for found in groups.values() for name in found[0] if name != "seconds"))
    names = [name for name in names if wanted or any(numbers(found, name) for found in groups.values())]
    names = names if wanted else names[:FIRST]
    rows = [[*keys, "method", "runs", *(metric_label(name) for name in names)]]
    for group, found in groups.items():
        values = [value if isinstance(value, str) else json.dumps(value) for value in json.loads(group)]
        rows.append([*values, str(len(found)), *(spread(numbers(found, name)) for name in names)])
    return rows


def numbers(found: list[dict[str, Any]], name: str) -> list[float]:
    """The values of a figure in the runs that have it."""
    values = [figures.get(name) for figures in found]
    return [float(x) for x in values if isinstance(x, (int, float)) and math.isfinite(x)]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation (n − 1) of values, to four digits."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def markdown(rows: list[list[str]]) -> str:
    """Rows as a Markdown table; the first is its head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def page(folder: Path, sweep: Sweep, runs: list[dict[str, Any]], rows: list[list[str]]) -> str:
    """The HTML page: the table, then a picture of each run with a link to its report."""
    style = TEMPLATE.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    cells = [[f"<td>{escape(cell)}</td>" for cell in row] for row in rows]
    table = "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells).replace("<td>", "<th>", len(rows[0]))
    done = sum("results" in run for run in runs)
    parts = [f"<h1>{escape(sweep.config.stem)}</h1>", f"<p>{done} of {len(runs)} runs are done.</p>"]
    parts += [f'<div style="overflow-x:auto"><table>{table}</table></div>']
    for run in runs:
        name, told = run["name"], ", ".join(f"{key} = {value}" for key, value in run["values"].items())
        picture = next((path for path in PICTURES if (folder / name / path).is_file()), "")
        image = f'<img src="{name}/{picture}" alt="{escape(told, quote=True)}">' if picture else ""
        note = escape(run["error"] or ("" if "results" in run else "not finished"))
        link = f'<a href="{name}/report.html">{name}</a>'
        parts.append(f"<section><h2>{escape(told)}</h2><p>{link} {note}</p>{image}</section>")
    title = f"<title>{escape(sweep.config.stem)}: {len(runs)} runs</title>"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{style}</style>'
    return f"{head}<main>{''.join(parts)}</main></html>\n"
