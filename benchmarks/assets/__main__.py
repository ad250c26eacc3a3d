"""`python -m benchmarks.assets run|table --set methods|schedules|diverse`: which way makes the right assets.

run    make the assets of the rows, prompts and seeds, judge them, and keep their lines in results/assets-SET.jsonl
table  the tables of what has run, as Markdown

Assets that are made in --work are not made again, and one that was stopped goes on, so a command is simply given again.
Each process (--jobs) makes the assets of one prompt. --keys changes all rows, for trials: give another --work with it,
in which their lines are kept too. Assets that could not be made are told, have no line there, and the exit code is 1.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.assets.rows import SETS, Row, chosen, config_of, read_set
from benchmarks.assets.table import raised, tables
from benchmarks.assets.work import VERSION, ask
from benchmarks.lines import Lines, at_least_one, do_shares, exit_code, keep_lines, merged, read_lines
from csd3d.arguments import Parser, path_of
from csd3d.config_files import parse_value
from csd3d.errors import InputError, at_key, error_line
from csd3d.world.prompts import read_prompt

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


def run(args: argparse.Namespace) -> list[str]:
    """Make what is asked for and keep the lines of what was made; a line of text on each asset that was not.

    Raises InputError before any work for keys that are wrong, prompts that are not the world's and damaged results.
    """
    of = read_set(args.set)
    rows = {name: changed(row, args.keys) for name, row in chosen(of.rows, args.rows).items()}
    prompts, seeds = (tuple(dict.fromkeys(each)) for each in (args.prompts or of.prompts, args.seeds or of.seeds))
    for prompt in prompts:
        with at_key("--prompts"):
            read_prompt(prompt)
    for row in rows.values():
        for prompt in prompts:
            config_of(row.as_keys, prompt, seeds[0])
    read_lines(results_file(args), PLACE, VERSION)
    shares = ask(rows, prompts, seeds, args.work / of.name)
    lines = do_shares(shares, args.work / "logs", args.jobs, of.name)
    made = [line for line in lines if "error" not in line]
    if made:
        keep_lines(results_file(args), made, PLACE, VERSION)
    return not_made(lines, sum(len(share.asked) for share in shares))


def not_made(lines: Lines, asked: int) -> list[str]:
    """A line of text on each asset that raised, and one on those whose process ended before them."""
    told = [raised(line) for line in lines if "error" in line]
    if len(lines) < asked:
        told.append(f"{asked - len(lines)} of {asked} assets were not made, see above; the same command goes on")
    return told


def results_file(args: argparse.Namespace) -> Path:
    """The lines of a set: of trials beside their work, else with all results."""
    return args.work / f"{args.set}.jsonl" if args.keys else RESULTS / f"assets-{args.set}.jsonl"


def build_parser() -> Parser:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m benchmarks.assets", description=__doc__, formatter_class=form)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--set", choices=SETS, default="methods", help="of rows: methods, the default, or another")
    parser.add_argument("--rows", nargs="+", help="only these: PRIOR/NAME, NAME, or patterns such as exact/*; for run")
    parser.add_argument("--prompts", nargs="+", help="only these prompts; for run")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds; for run")
    parser.add_argument("--keys", nargs="+", default=[], metavar="key.sub=value", help="change keys of all rows")
    parser.add_argument("--work", type=path_of, default=WORK, help=f"folder of what is made, {WORK} by default")
    parser.add_argument("--jobs", type=at_least_one, default=2, help="prompts at a time, 2 by default")
    return parser


def show(args: argparse.Namespace) -> None:
    """Print the tables of what has run; raises InputError if nothing has."""
    lines = read_lines(results_file(args), PLACE, VERSION)
    if not lines:
        raise InputError(f"{results_file(args)}: no lines yet; python -m benchmarks.assets run makes them")
    print(tables(lines, read_set(args.set)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code is 1 if an asset could not be made, else that of `benchmarks.lines.exit_code`."""
    parser = build_parser()
    args = parser.parse_all(argv)
    if args.what != "run" and (args.rows or args.prompts or args.seeds):
        parser.error("--rows, --prompts and --seeds are of run")

    def command() -> int:
        failed = run(args) if args.what == "run" else []
        if not failed or results_file(args).exists():
            show(args)
        for text in failed:
            print(error_line(text), file=sys.stderr)
        return 1 if failed else 0

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
