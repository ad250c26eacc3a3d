"""`python -m benchmarks.referee tune|run|table|page --level 1|2|3|strips|videos`: see docs/referee.md.

tune   every trial of every row on the tuning scenes; the best are kept in benchmarks/results/referee-tuning-N.json
run    the rows with their best trials on the level's scenes, instructions and seeds
table  the tables of what has run, as Markdown
page   those of all levels, written into docs/referee-results.md below its summary, which is kept

Edits that are done are not done again, so each command goes on where it was stopped. --jobs N runs N scenes at once.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.lines import as_text, do_shares, keep_lines, merged
from benchmarks.referee.protocol import LEVELS, TUNING_INSTRUCTIONS, Instruction, Level
from benchmarks.referee.rows import FILES, Row, read_rows
from benchmarks.referee.table import tables
from benchmarks.referee.work import ALL_SCENES, Asked, Share
from benchmarks.runs import provenance
from csd3d.files import write_text
from csd3d.world.language import find_edit

RESULTS = Path(__file__).parents[1] / "results"
WORK = Path("outputs/referee")
PAGE = Path(__file__).parents[2] / "docs" / "referee-results.md"
TABLES = "<!-- tables: what stands below is written by `python -m benchmarks.referee page` -->"


def tuning_level(level: Level) -> Level:
    """The level on the scenes and instructions that rows are tuned on."""
    asked = tuple(Instruction(text, "tuning", held_out=False) for text in TUNING_INSTRUCTIONS)
    return replace(level, scenes=level.tuning, instructions=asked, seeds=(0,), whole=False)


def every_row(level: Level) -> dict[str, Row]:
    """All rows of the file that has those of a level."""
    return read_rows(FILES[level.clip])


def rows_of(level: Level, names: Sequence[str] | None) -> dict[str, Row]:
    """The rows that a level has: under the exact prior none that work inside a UNet."""
    rows = {name: row for name, row in every_row(level).items() if not (row.attention and level.model)}
    return {name: rows[name] for name in names} if names else rows


def tuning_file(level: int | str) -> Path:
    """Where the trials of a level are kept; whole scenes take those of views alone."""
    return RESULTS / f"referee-tuning-{2 if level == 3 else level}.json"


def ask(level: Level, row: str, keys: dict) -> list[Asked]:
    """A row's edits of one scene."""
    text = as_text(keys)
    return [Asked(row, text, one.text, one.kind, seed) for one in level.instructions for seed in level.seeds]


def applies(level: Level, scene: str, instruction: str) -> bool:
    """Whether an instruction has a right answer in a scene; strips and videos are drawn so that it has."""
    return bool(level.clip) or find_edit(ALL_SCENES[scene], instruction) is not None


def do(level: Level, asked: Sequence[Asked], work: Path, jobs: int) -> list[dict]:
    """Do edits of all scenes, `jobs` scenes at a time, each in a process; return their lines.

    An instruction that does not apply to a scene, as snow to a white house, is left out there.
    """
    shares = [
        Share(level, scene, [one for one in asked if applies(level, scene, one.instruction)], work)
        for scene in level.scenes
    ]
    return do_shares(shares, work / "logs", jobs, f"level {level.number}")


def tune(level: Level, rows: dict[str, Row], work: Path, jobs: int) -> None:
    """Do the trials, and keep them with the best of each row, by mean PSNR."""
    trials = {(name, number): row.keys(trial) for name, row in rows.items() for number, trial in enumerate(row.trials)}
    level = tuning_level(level)
    asked = [one for (name, _), keys in trials.items() for one in ask(level, name, keys)]
    lines = do(level, asked, work / "tuning", jobs)
    path = tuning_file(level.number)
    found = json.loads(path.read_text())["rows"] if path.exists() else {}
    for name in dict.fromkeys(name for name, _ in trials):
        means = []
        for number, trial in enumerate(rows[name].trials):
            keys = trials[name, number]
            scores = [line.get("psnr") for line in lines if line["row"] == name and line["editor"] == keys]
            complete = bool(scores) and None not in scores
            means.append({"trial": trial, "psnr": sum(scores) / len(scores) if complete else None, "n": len(scores)})
        best = max(range(len(means)), key=lambda i: means[i]["psnr"] or float("-inf"))
        found[name] = {"best": best, "trials": means}
    about = {"scenes": list(level.scenes), "instructions": [one.text for one in level.instructions], "seeds": [0]}
    text = {**provenance("referee"), "level": level.number, **about, "rows": found}
    write_text(path, json.dumps(text, indent=1) + "\n")


def best_keys(rows: dict[str, Row], level: Level) -> dict[str, dict]:
    """The editor's keys of every row: with its best trial, or as the row that it is an ablation of."""
    path = tuning_file(level.number)
    tuned = json.loads(path.read_text())["rows"] if path.exists() else {}
    every = every_row(level)

    def keys(row: Row) -> dict:
        if row.of:
            return merged(keys(every[row.of]), row.editor)
        found = tuned.get(row.name)
        return row.keys(found["trials"][found["best"]]["trial"]) if found and row.trials else dict(row.editor)

    return {name: keys(row) for name, row in rows.items()}


def results_file(level: int | str) -> Path:
    """The lines of a level."""
    return RESULTS / f"referee-level-{level}.jsonl"


def write_page(path: Path) -> None:
    """Write the tables of all levels that have run; what stands above them is kept."""
    summary = path.read_text(encoding="utf-8").partition(TABLES)[0]
    parts = [
        f"## {str(level.number).capitalize() if level.clip else f'Level {level.number}'}: {level.title}\n\n"
        f"{tables(results_file(level.number), every_row(level))}\n"
        for level in LEVELS.values()
        if results_file(level.number).exists()
    ]
    write_text(path, "\n".join([summary + TABLES + "\n", *parts]))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "run", "table", "page"))
    parser.add_argument("--level", type=lambda text: int(text) if text.isdigit() else text, choices=tuple(LEVELS))
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--scenes", nargs="+", help="only these scenes")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if args.what == "page":
        return write_page(PAGE)
    if args.level is None:
        parser.error(f"--level: give one of {', '.join(map(str, LEVELS))}")
    level = LEVELS[args.level]
    level = replace(level, scenes=tuple(args.scenes or level.scenes), seeds=tuple(args.seeds or level.seeds))
    rows = rows_of(level, args.rows)
    if args.what == "tune":
        return tune(level, rows, args.work, args.jobs)
    if args.what == "run":
        asked = [one for name, keys in best_keys(rows, level).items() for one in ask(level, name, keys)]
        lines = do(level, asked, args.work, args.jobs)
        keep_lines(results_file(level.number), lines, ("row", "scene", "instruction", "seed"))
    print(tables(results_file(level.number), every_row(level)))
    return None


if __name__ == "__main__":
    main()
