"""Judge any system's edit: `csd3d score BEFORE AFTER`, two folders of views, or two videos.

inputs.py opens and checks them, geometry.py reads cameras and depths, measure.py makes the figures, page.py shows
them. docs/score.md says what each figure means.
"""

import argparse
import importlib.util
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from csd3d.arguments import Parser, check_new_file, is_utf8, path_of, show
from csd3d.devices import FORMS, choose_device
from csd3d.errors import InputError, one_line
from csd3d.files import write_text

NONE = "none"  # no CLIP


def build_parser() -> Parser:
    """Return the parser of `csd3d score`."""
    parser = Parser(
        prog="csd3d score",
        description="Judge an edit by its pictures: do the views agree, what is left of the source, and, where right "
        "answers are known, how near is it to one of them? Each of BEFORE, AFTER and DIR is a folder of pictures or a "
        "video; the pictures belong together by name, or by order where no name is in both. docs/score.md explains "
        "every figure.",
    )
    add = parser.add_argument
    add("before", metavar="BEFORE", type=path_of, help="the views before the edit")
    add("after", metavar="AFTER", type=path_of, help="the same views after it")
    add("--truth", metavar="DIR", type=path_of, nargs="+", action="extend", default=[],
        help="a right answer; several where there are")  # fmt: skip
    add(
        "--cameras", metavar="FILE", type=path_of, help="a transforms.json: neighbours by angle, and depth if it has it"
    )
    add("--depth", metavar="DIR", type=path_of, help="depth of each view before: .npy, or 16-bit .png; needs --cameras")
    add("--depth-unit", metavar="X", type=float, default=0.001, help="a whole number's step in the cameras' unit "
        "(default 0.001); .npy of floats are in that unit")  # fmt: skip
    add("--depth-along", choices=("axis", "ray"), default="axis", help="what depth is measured along (default axis)")
    add("--captions", metavar=("BEFORE", "AFTER"), nargs=2, help="what both show, for CLIP directional similarity")
    add("--clip", metavar="NAME", default="world", help="world (the shipped one, of the toy world; default), a folder, "
        "a hub name, open_clip:ARCHITECTURE/WEIGHTS, or none")  # fmt: skip
    add("--every", metavar="N", type=int, default=1, help="judge every N-th view only (default 1)")
    add("--json", metavar="FILE", type=path_of, help="write the figures here")
    add("--page", metavar="FILE", type=path_of, help="write a page with figures and pictures here, such as score.html")
    add("--device", metavar="NAME", default="auto", help=f"for the networks: {FORMS}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0. Raises InputError for bad input, before anything is written."""
    parser = build_parser()
    args = parser.parse_all(argv)
    _check(args, parser)
    show(f"csd3d score: {args.after} against {args.before}")
    started = time.monotonic()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # what was odd in a picture or a capture
    from csd3d.score.inputs import open_inputs  # torch takes seconds to import, and mistakes above need none
    from csd3d.score.measure import measure
    from csd3d.score.page import table, write_page

    with open_inputs(args.before, args.after, args.truth, args.every) as inputs:
        if args.cameras is not None:
            from csd3d.score.geometry import Depths, add_geometry

            inputs = add_geometry(inputs, args.cameras, Depths(args.depth, args.depth_unit, args.depth_along))
        clip = "" if args.clip == NONE else args.clip
        found = measure(inputs, clip, args.captions, choose_device(args.device, "--device"))
        found["seconds"] = round(time.monotonic() - started, 1)
        if args.page is not None:
            _written(args.page, "--page", lambda: write_page(args.page, inputs, found))
    if args.json is not None:
        text = json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        _written(args.json, "--json", lambda: write_text(args.json, text))
    show(table(found))
    return 0


def _check(args: argparse.Namespace, parser: Parser) -> None:
    """Tell what is wrong with the options before anything is opened."""
    if args.depth is not None and args.cameras is None:
        parser.error("--depth says where surfaces are only together with --cameras")
    if args.every < 1:
        parser.error(f"--every: {args.every}; expected at least 1")
    if not 0 < args.depth_unit < 1e6:
        parser.error(f"--depth-unit: {args.depth_unit:g}; expected a positive number")
    if args.captions and args.clip == NONE:
        parser.error("--captions are compared by a CLIP; leave out --clip none")
    if args.captions and not all(text.strip() and is_utf8(text) for text in args.captions):
        parser.error("--captions: expected two texts of UTF-8, got an empty one or other bytes")
    if not args.clip:
        parser.error(f"--clip: expected a name, got nothing; {NONE} leaves CLIP out")
    given = [args.before, args.after, *args.truth, *(path for path in (args.cameras, args.depth) if path)]
    for name, path in (("--json", args.json), ("--page", args.page)):
        check_new_file(path, name)
        if path is not None and path.exists() and any(_would_lose(path, each) for each in given):
            raise InputError(
                f"{name}: {path} is one of the pictures that are judged, or belongs to them; choose another"
            )
    if args.json is not None and args.page is not None and args.json.resolve() == args.page.resolve():
        raise InputError(f"--json and --page: both are {args.json}; give each a file of its own")
    if args.clip.startswith("open_clip:") and importlib.util.find_spec("open_clip") is None:
        from csd3d.metrics.clip import INSTALL

        raise InputError(f"--clip: {args.clip} needs the package open_clip_torch, which is not installed: {INSTALL}")


def _would_lose(path: Path, given: Path) -> bool:
    """Whether writing a file would replace an input: that itself, or a picture or depth map in its folder."""
    from csd3d.media.videos import SUFFIXES

    inside = path.resolve().parent == given.resolve() and path.suffix.lower() in (*SUFFIXES, ".npy")
    return inside or path.resolve() == given.resolve()


def _written(path: Path, option: str, write) -> None:
    try:
        write()
    except OSError as error:
        raise InputError(f"{option}: {path}: cannot be written ({error.strerror or one_line(error)})") from None
