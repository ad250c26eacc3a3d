"""The command line: `python launch.py --config FILE [key.sub=value ...]`, also installed as `csd3d`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from csd3d.errors import InputError
from csd3d.interrupt import StopRequest

RESULTS = ("result.*", "report.html", "images/*.png", "videos/*.mp4", "mesh/*.glb", "mesh/*.obj", "metrics.json")


def build_parser() -> argparse.ArgumentParser:
    """The arguments; everything else is a key of the config."""
    parser = argparse.ArgumentParser(
        prog="csd3d", description="Edits captured 3D scenes by Collaborative Score Distillation."
    )
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--config", metavar="FILE", type=Path, help="start the job in this YAML file")
    job.add_argument("--resume", metavar="RUN_DIR", type=Path, help="continue a run that was stopped or killed")
    job.add_argument(
        "--export", metavar="RUN_DIR", type=Path, help="write mesh, video and report again from a run's last checkpoint"
    )
    parser.add_argument("overrides", metavar="key.sub=value", nargs="*", help="change a key of the config")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="the run folder (default: outputs/<config name>/<timestamp>)"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="the same as seed=N")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one"
    )
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; exits with 2 on a mistake in it."""
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    if args.config is None and (args.output is not None or args.seed is not None):
        parser.error("--output and --seed belong to --config: a run that is resumed or exported keeps its own")
    return args


def run(args: argparse.Namespace, stop: StopRequest) -> Path:
    """Does the job; returns the run folder."""
    if args.config is not None:
        from csd3d.config import read_config

        read_config(args.config)  # the commonest mistakes are told before torch is imported, which takes seconds
    from csd3d import run as jobs

    if args.resume is not None:
        return jobs.resume(args.resume, args.overrides, args.device, stop=stop)
    if args.export is not None:
        return jobs.export(args.export, args.overrides, args.device, stop=stop)
    return jobs.start(args.config, args.overrides, args.output, args.seed, args.device, stop=stop)


def summary(folder: Path, stopped: bool) -> str:
    """Where the results are, one a line, and how to go on with a run that was stopped."""
    found = [path for pattern in RESULTS for path in sorted(folder.glob(pattern))[:4]]
    lines = [f"Results in {folder}:", *(f"  {path.relative_to(folder)}" for path in found)]
    if stopped:
        lines.append(f"Stopped before the end. To go on: python launch.py --resume {folder}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job; returns the exit code: 0, 2 for bad input (one line on stderr), 130 when aborted by Ctrl+C."""
    args = parse(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns at import of parts that are not used here
    try:
        with StopRequest() as stop:
            folder = run(args, stop)
    except InputError as error:
        for line in getattr(error, "lines", [str(error)]):
            print(f"error: {' '.join(line.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Aborted. `--resume RUN_DIR` continues from the last checkpoint.", file=sys.stderr)
        return 130
    print(summary(folder, stop.requested))
    return 0


if __name__ == "__main__":
    sys.exit(main())
