"""`python -m benchmarks.referee tune|run|table|page --level 1|2|3|strips|videos`: see docs/referee.md.

tune   every trial of every row on the tuning scenes; the best are kept in benchmarks/results/referee-tuning-N.json
run    the rows with their best trials on the level's scenes, instructions and seeds
table  the tables of what has run, as Markdown
page   those of all levels, written into docs/referee-results.md below its summary, which is kept

Edits that are done are not done again, so each command goes on where it was stopped. --jobs N runs N scenes at once.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.lines import as_text, at_least_one, do_shares, exit_code, keep_lines, merged, read_lines
from benchmarks.referee.canvas import FILES as CANVAS_CONFIGS
from benchmarks.referee.canvas import canvas_editor_of
from benchmarks.referee.protocol import LEVELS, TUNING_INSTRUCTIONS, VERSION, Instruction, Level
from benchmarks.referee.rows import FILES, Row, editor_of, read_rows
from benchmarks.referee.table import tables
from benchmarks.referee.work import ALL_SCENES, Asked, Share
from benchmarks.runs import provenance
from csd3d.arguments import Parser, path_of
from csd3d.errors import InputError, at_key
from csd3d.files import read_json, write_text
from csd3d.world.language import find_edit

RESULTS = Path(__file__).parents[1] / "results"
WORK = Path("outputs/referee")
LINE = ("row", "scene", "instruction", "seed")  # what a line is the only one of
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
    return chosen(rows, names, "--rows", f"level {level.number}") if names else rows


def chosen(known: Mapping[Any, Any], names: Iterable[Any], option: str, of: str) -> dict[Any, Any]:
    """Those of `known` that an option names; InputError for one that is not among them."""
    for name in names:
        if name not in known:
            there = ", ".join(map(str, known))
            raise InputError(f"{option}: {of} has no {name}; there are {there}")
    return {name: known[name] for name in names}


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


def count(level: Level) -> int:
    """The number of edits of a row."""
    found = [one for scene in level.scenes for one in level.instructions if applies(level, scene, one.text)]
    return len(found) * len(level.seeds)


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
    path = tuning_file(level.number)
    found = tuned_rows(path)
    check_keys(level, {f"{name}, trial {number + 1}": keys for (name, number), keys in trials.items()})
    lines = do(level, asked, work / "tuning", jobs)
    check_whole(lines, count(level) * len(trials))  # means over other edits do not compare
    for name in dict.fromkeys(name for name, _ in trials):
        means = []
        for number, trial in enumerate(rows[name].trials):
            keys = trials[name, number]
            scores = [line.get("psnr") for line in lines if line["row"] == name and line["editor"] == keys]
            complete = bool(scores) and None not in scores
            means.append({"trial": trial, "psnr": sum(scores) / len(scores) if complete else None, "n": len(scores)})
        complete = [number for number, mean in enumerate(means) if mean["psnr"] is not None]
        if not complete:
            print(f"{name}: no trial can win, since each raised in some edit", file=sys.stderr)
            found.pop(name, None)
            continue
        found[name] = {"best": max(complete, key=lambda number: means[number]["psnr"]), "trials": means}
    about = {"scenes": list(level.scenes), "instructions": [one.text for one in level.instructions], "seeds": [0]}
    text = {**provenance("referee"), "level": level.number, **about, "rows": found}
    write_text(path, json.dumps(text, indent=1) + "\n")


def tuned_rows(path: Path) -> dict[str, Any]:
    """The rows of a file of trials, none if it is not there; InputError for one that is damaged."""
    if not path.exists():
        return {}
    rows = read_json(path, "the referee's trials").get("rows")
    if not isinstance(rows, dict):
        raise InputError(f"{path}: has no rows; expected the referee's trials")
    for name, row in rows.items():
        try:
            _ = row["trials"][row["best"]]["trial"]
        except (LookupError, TypeError):
            raise InputError(f"{path}: rows.{name}: names no best of its trials; tune the row again") from None
    return rows


def check_keys(level: Level, keys: Mapping[str, dict]) -> None:
    """Raise InputError, which begins with the row, for keys that make no editor."""
    for name, each in keys.items():
        with at_key(f"rows: {name}"):
            canvas_editor_of(as_text(each), CANVAS_CONFIGS[level.clip]) if level.clip else editor_of(as_text(each))


def check_whole(lines: Sequence[dict], expected: int) -> None:
    """Raise InputError if some lines were not made, because a process ended."""
    if len(lines) < expected:
        lacking = f"{expected - len(lines)} of {expected} edits"
        raise InputError(f"{lacking} were not done, see above; the same command goes on with them")


def tell_untuned(level: Level, rows: dict[str, Row]) -> None:
    """Say which rows are not run with the best of their trials, as those in the file are now."""
    tuned = tuned_rows(tuning_file(level.number))
    for name, row in rows.items():
        row = every_row(level)[row.of] if row.of else row
        known = {as_text(each["trial"]) for each in tuned.get(row.name, {}).get("trials", ())}
        if row.trials and known != {as_text(trial) for trial in row.trials}:
            print(f"{name}: its trials are not tuned; tune --level {level.number} --rows {row.name}", file=sys.stderr)


def best_keys(rows: dict[str, Row], level: Level) -> dict[str, dict]:
    """The editor's keys of every row: with its best trial, or as the row that it is an ablation of."""
    tuned = tuned_rows(tuning_file(level.number))
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
    """Write the tables of all levels that have run; what stands above them is kept. InputError if none has."""
    summary, mark, _ = path.read_text(encoding="utf-8").partition(TABLES)
    if not mark:
        raise InputError(f"{path}: has no line {TABLES!r}, below which the tables would stand; add it")
    parts = [
        f"## {str(level.number).capitalize() if level.clip else f'Level {level.number}'}: {level.title}\n\n"
        f"{tables(results_file(level.number), every_row(level))}\n"
        for level in LEVELS.values()
        if results_file(level.number).exists()
    ]
    if not parts:
        raise InputError(f"{RESULTS}: no level has lines, so the tables of {path} are left as they are")
    write_text(path, "\n".join([summary + TABLES + "\n", *parts]))


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.referee", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("tune", "run", "table", "page"))
    parser.add_argument("--level", type=lambda text: int(text) if text.isdigit() else text, choices=tuple(LEVELS))
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--scenes", nargs="+", help="only these scenes; for run")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds; for run")
    parser.add_argument("--work", type=path_of, default=WORK)
    parser.add_argument("--jobs", type=at_least_one, default=2)
    return parser


def part(level: Level, scenes: Sequence[str] | None, seeds: Sequence[int] | None) -> Level:
    """The level with these of its scenes and seeds alone; InputError for any that it has not."""
    of = f"level {level.number}"
    scenes = chosen(dict.fromkeys(level.scenes), scenes or level.scenes, "--scenes", of)
    seeds = chosen(dict.fromkeys(level.seeds), seeds or level.seeds, "--seeds", of)
    return replace(level, scenes=tuple(scenes), seeds=tuple(seeds))


def run(level: Level, rows: dict[str, Row], work: Path, jobs: int) -> None:
    """Do the rows with their best trials, and keep the lines; InputError if some are not there in the end."""
    keys = best_keys(rows, level)
    check_keys(level, keys)
    tell_untuned(level, rows)
    path = results_file(level.number)
    read_lines(path, LINE, VERSION)  # damage is told before the work
    lines = do(level, [one for name in rows for one in ask(level, name, keys[name])], work, jobs)
    keep_lines(path, lines, LINE, VERSION)
    check_whole(lines, count(level) * len(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code is that of `benchmarks.lines.exit_code`."""
    parser = build_parser()
    args = parser.parse_all(argv)
    if args.what != "run" and (args.scenes or args.seeds or (args.rows and args.what != "tune")):
        parser.error("--scenes and --seeds are of run, --rows of tune and run")
    if args.what != "page" and args.level is None:
        parser.error(f"--level: give one of {', '.join(map(str, LEVELS))}")
    if args.what == "tune" and LEVELS[args.level].whole:
        parser.error(f"level {args.level} takes the trials of level 2; give tune --level 2")
    if args.work.exists() and not args.work.is_dir():
        parser.error(f"--work: {args.work} is a file; expected a folder")
    return exit_code(lambda: do_command(args))


def do_command(args: argparse.Namespace) -> None:
    """What the command line asks for; raises InputError for what is wrong in files and rows."""
    if args.what == "page":
        write_page(PAGE)
        return
    level = LEVELS[args.level]
    rows = rows_of(level, args.rows)
    if args.what == "tune":
        tune(level, rows, args.work, args.jobs)
        return
    if args.what == "run":
        run(part(level, args.scenes, args.seeds), rows, args.work, args.jobs)
    print(tables(results_file(level.number), every_row(level)))


if __name__ == "__main__":
    sys.exit(main())
