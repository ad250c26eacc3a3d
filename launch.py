"""The command line, also installed as `csd3d`.

python launch.py --config FILE [key.sub=value ...]      a job
python launch.py methods                                what a config can name; also editors, families, …
python launch.py process FILM --output DIR              a film or photos to a dataset with camera poses
python launch.py sweep FILE.yaml --jobs 2               many runs, one table
python launch.py score BEFORE/ AFTER/                   how good an edit is, of any system
python launch.py doctor                                 what is installed and works
python launch.py keys edit_scene                        the keys of a task, a method, an editor
python launch.py vocabulary                             the words that the models which ship know
"""

import argparse
import contextlib
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from csd3d import ranks
from csd3d.arguments import Parser, path_of, show
from csd3d.devices import FORMS, is_device
from csd3d.errors import InputError, closest, error_line
from csd3d.interrupt import StopRequest
from csd3d.registry import plugin_fault

EXAMPLES = (
    'csd-text-to-3d.yaml prompt="a blue duck"',
    'csd-edit-scene.yaml scene.path=MY/CAPTURE prompt="make it winter"',
    'csd-edit-video.yaml video=CLIP.mp4 prompt="make it winter"',
)
MESHES = ("mesh/*.glb", "mesh/*.obj", "mesh/splats.*")
RESULTS = ("result.*", "report.html", "images/*.png", "videos/*.mp4", *MESHES, "metrics.json")


def build_parser() -> Parser:
    """Return the parser of the options; all other settings are keys of the config."""
    parser = Parser(
        prog="csd3d",
        description="Makes 3D assets and pictures from text, and edits captured 3D scenes, pictures, panoramas and "
        "videos by an\ninstruction, by Collaborative Score Distillation and the methods it is compared with.",
        epilog=epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--config", metavar="FILE", type=path_of, help="start the job in this YAML file")
    job.add_argument("--resume", metavar="RUN_DIR", type=path_of, help="continue a run that was stopped or killed")
    job.add_argument(
        "--export", metavar="RUN_DIR", type=path_of,
        help="write mesh, video and report again from a run's last checkpoint",
    )  # fmt: skip
    parser.add_argument("overrides", metavar="key.sub=value", nargs="*", help="change a key of the config")
    parser.add_argument(
        "--output", metavar="DIR", type=path_of, help="the run folder (default: outputs/<config name>/<timestamp>)"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="the same as seed=N")
    parser.add_argument(
        "--device", metavar="NAME", type=device_name, default="auto",
        help=f"{FORMS}; default: auto, the config's prior.device, which is cuda where there is one",
    )  # fmt: skip
    return parser


def device_name(text: str) -> str:
    """Return the name of a device; argparse tells an error of this type."""
    if not is_device(text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {FORMS}")
    return text


def epilog() -> str:
    """Return the help below the options: examples, and every config with the first line of its file."""
    lines = ["examples:"]
    lines += [f"  python launch.py --config configs/{text}" for text in EXAMPLES]
    files = sorted((Path(__file__).parent / "configs").glob("*.yaml"))
    width = max((len(file.name) for file in files), default=0)
    lines += [
        "",
        "what a config can name: csd3d methods | editors | families | representations | readers | tasks",
        "the keys of any of them, with defaults: csd3d keys NAME, such as csd3d keys edit_scene",
        "many runs, and one table of them: csd3d sweep FILE.yaml (docs/many-machines.md)",
        "how good an edit is, of any system: csd3d score BEFORE/ AFTER/ (docs/score.md)",
        "what is installed and works on this machine: csd3d doctor",
        "the words that the models which ship know: csd3d vocabulary",
        "camera poses for a film or a folder of photos: csd3d process FILM --output DIR (docs/captures.md)",
        "",
        "configs (each file has the most used keys; a run writes all its keys to its config.yaml):",
    ]
    for file in files:
        about = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        lines.append(f"  {file.name:{width}}  {textwrap.shorten(about, 116 - width, placeholder=' …')}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exit with 2 on a mistake in it."""
    parser = build_parser()
    parser.hint = 'A key of the config is written key=value, such as prompt="a blue duck"'
    args = parser.parse_all(argv)
    if args.config is None and (args.output is not None or args.seed is not None):
        parser.error("--output and --seed belong to --config: a run that is resumed or exported keeps its own")
    return args


def together() -> contextlib.AbstractContextManager[None]:
    """Connect the processes that torchrun has started, if there are several."""
    if ranks.count() == 1:
        return contextlib.nullcontext()
    from csd3d.priors.messages import joined

    return joined()


def run(args: argparse.Namespace, stop: StopRequest) -> Path | None:
    """Do the job and return the run folder; None where this process only helps another."""
    if args.config is not None and ranks.rank() == 0:  # the others tell rank 0, see `assist`
        from csd3d.config_files import read_config

        read_config(args.config)  # reports the most common mistakes before torch is imported, which takes seconds
    source = args.config or args.resume or args.export
    if ranks.rank() == 0:
        show(f"csd3d: {source}; loading, which takes a few seconds")
    from csd3d import run as jobs

    if ranks.rank() > 0:
        return jobs.assist(source, args.overrides, args.seed, args.device)
    if args.resume is not None:
        return jobs.resume(args.resume, args.overrides, args.device, stop=stop)
    if args.export is not None:
        return jobs.export(args.export, args.overrides, args.device, stop=stop)
    return jobs.start(args.config, args.overrides, args.output, args.seed, args.device, stop=stop)


def summary(folder: Path, stopped: bool) -> str:
    """Return the list of results, one a line, and how to continue a run that was stopped."""
    found = [path for pattern in RESULTS for path in sorted(folder.glob(pattern))[:4]]
    lines = [f"Results in {folder}:", *(f"  {path.relative_to(folder)}" for path in found)]
    if stopped:
        lines.append(f"Stopped before the end. To go on: python launch.py --resume {folder}")
    return "\n".join(lines)


def check_word(word: str) -> None:
    """Raise InputError for a first word that is no command; `csd3d` begins with a command, an option or key=value."""
    from csd3d.catalogue import WORDS

    is_run = os.path.isfile(os.path.join(word, "config.yaml"))
    if is_run or word.endswith((".yaml", ".yml")):
        option = "--resume" if is_run else "--config"
        raise InputError(f"csd3d {word}: a job begins with an option, such as {option} {word}; see csd3d --help")
    known = ["process", "sweep", "score", "doctor", "vocabulary", "keys", *WORDS]
    if "=" not in word:
        near = f"did you mean csd3d {closest(word, known)}?"
        raise InputError(f"csd3d {word}: there is no such command; {near} Known: {', '.join(known)}, and --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job, or print a list; return the exit code.

    0; 2 for bad input, with one line on stderr; 130 when aborted by Ctrl+C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns at import of parts that are not used here
    try:
        if ranks.count() > 1 and argv and not argv[0].startswith("-"):
            raise InputError(f"csd3d {argv[0]}: is for one process; start it without torchrun")
        if argv and argv[0] == "process":
            from csd3d.datasets import process

            return process.main(argv[1:])
        if argv and argv[0] == "sweep":
            from csd3d import sweep

            return sweep.main(argv[1:])
        if argv and argv[0] == "score":
            from csd3d import score

            return score.main(argv[1:])
        if argv and argv[0] == "doctor":
            from csd3d import doctor

            return doctor.main(argv[1:])
        if argv and argv[0] == "vocabulary":
            from csd3d import vocabulary

            return vocabulary.main(argv[1:])
        if argv and not argv[0].startswith("-"):  # a job begins with an option
            from csd3d import catalogue

            if catalogue.is_asked(argv):
                show(catalogue.answer(argv))
                return 0
            check_word(argv[0])
        args = parse(argv)
        with StopRequest() as stop, together():
            folder = run(args, stop)
        if ranks.rank() == 0:
            show(summary(folder, stop.requested))
    except InputError as error:
        if not isinstance(error, ranks.RankLost) and ranks.rank() > 0:
            return 2  # rank 0 tells it
        for line in getattr(error, "lines", [str(error)]):
            print(error_line(line), file=sys.stderr)
        return 2
    except Exception as error:
        told = plugin_fault(error)
        if told is None:
            raise
        print(error_line(told), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        is_job = any(word.startswith("--") for word in argv[:1])
        hint = " `--resume RUN_DIR` continues from the last checkpoint." if is_job else " Nothing was written."
        hint = " The same command goes on with what is left." if argv[:1] == ["sweep"] else hint
        print(f"Aborted.{hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
