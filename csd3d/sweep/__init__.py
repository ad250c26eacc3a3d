"""Many runs from one file: `csd3d sweep FILE.yaml --on local|slurm`. The grid, its runs, and one table of them.

config: csd-edit-scene.yaml          # beside this file, or one of configs/
set: {fit.steps: 500}                # keys of every run
grid:                                # every combination is a run
  prompt: [make it red, paint it a bright colour]
  seed: [0, 1, 2]
metrics: [psnr_truth, warped_error]  # columns of the table; without it, the first six figures
slurm: {partition: gpu, timeout_min: 240, gpus_per_node: 1}    # of submitit, for --on slurm
"""

import argparse
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from csd3d.arguments import Parser, path_of, show
from csd3d.devices import FORMS
from csd3d.sweep.grid import read_sweep
from csd3d.sweep.table import write_report
from csd3d.sweep.work import check_device, do_runs


def build_parser() -> Parser:
    """Return the parser of `csd3d sweep`."""
    parser = Parser(
        prog="csd3d sweep",
        description="Do every combination of a grid of settings; finished runs are skipped, killed ones resumed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(__doc__ or "").partition("\n")[2],
    )
    parser.add_argument("sweep", metavar="FILE.yaml", type=path_of)
    parser.add_argument("--on", choices=("local", "slurm"), default="local", help="this machine, or a SLURM cluster")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="most runs at a time (default 1)")
    parser.add_argument("--output", metavar="DIR", type=path_of, help="default: outputs/<name of the file>")
    parser.add_argument("--retries", metavar="N", type=int, default=2, help="how often a killed run is started again")
    parser.add_argument("--device", default="auto", help=FORMS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0, or 1 if a run failed. Raises InputError for bad input, before anything is started."""
    parser = build_parser()
    args = parser.parse_all(argv)
    if args.jobs < 1 or args.retries < 0:
        parser.error("--jobs must be at least 1, --retries at least 0")
    check_device(args.device, args.on)
    sweep = read_sweep(args.sweep)
    folder = args.output or Path("outputs") / args.sweep.stem
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C, which ends the runs too
    started = time.monotonic()
    errors = do_runs(sweep, folder, args.on, args.jobs, args.retries, args.device, tell=show)
    table = write_report(folder, sweep, errors)
    took = time.monotonic() - started
    show(f"{table}\n\n{len(sweep.runs)} runs, {len(errors)} failed, {took:.0f} s: {folder}/report.html")
    return int(bool(errors))
