"""`python -m benchmarks.assets run|table --set methods|schedules|diverse`: which way makes the right assets.

run    make the assets of the rows, prompts and seeds, judge them, and keep their lines in results/assets-SET.jsonl
table  the tables of what has run, as Markdown

Assets that are made are not made again, and one that was stopped goes on, so a command is simply given again. Each
process (--jobs) makes the assets of one prompt. --keys changes all rows, for trials: give another --work with it.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.assets.rows import SETS, Row, chosen, config_of, read_set
from benchmarks.assets.table import tables
from benchmarks.assets.work import VERSION, ask
from benchmarks.lines import at_least_one, do_shares, keep_lines, merged, read_lines
from csd3d.config_files import parse_value
from csd3d.errors import InputError

RESULTS = Path(__file__).parents[1] / "results"
WORK = Path("outputs/assets")
PLACE = ("row", "prompt", "seed")  # what a line is the only one of


def changed(row: Row, keys: Sequence[str]) -> Row:
    """The row with keys given as `a.b=value`."""
    for text in keys:
        name, _, value = text.partition("=")
        found = parse_value(value, name)
        for part in reversed(name.split(".")):
            found = {part: found}
        row = replace(row, keys=merged(row.keys, found))
    return row


def run(args: argparse.Namespace) -> None:
    """Make what is asked for; raises InputError before any work for keys that are wrong."""
    of = read_set(args.set)
    rows = {name: changed(row, args.keys) for name, row in chosen(of.rows, args.rows).items()}
    prompts, seeds = args.prompts or of.prompts, args.seeds or of.seeds
    for row in rows.values():
        for prompt in prompts:
            config_of(row.as_keys, prompt, seeds[0])
    lines = do_shares(ask(rows, prompts, seeds, args.work / of.name), args.work / "logs", args.jobs, of.name)
    keep_lines(results_file(args), lines, PLACE, VERSION)


def results_file(args: argparse.Namespace) -> Path:
    """The lines of a set: of trials beside their work, else with all results."""
    return args.work / f"{args.set}.jsonl" if args.keys else RESULTS / f"assets-{args.set}.jsonl"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--set", choices=SETS, default="methods")
    parser.add_argument("--rows", nargs="+", help="only these: PRIOR/NAME, NAME, or patterns such as exact/*")
    parser.add_argument("--prompts", nargs="+", help="only these prompts")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--keys", nargs="+", default=[], metavar="key.sub=value", help="change keys of all rows")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--jobs", type=at_least_one, default=2)
    args = parser.parse_args()
    try:
        if args.what == "run":
            run(args)
        print(tables(read_lines(results_file(args), PLACE, VERSION), read_set(args.set)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
