"""From a film or a folder of photos to a posed dataset: `csd3d process VIDEO_OR_FOLDER --output DIR`.

Sharp frames (frames.py), their poses by COLMAP (poses.py), and what is written: undistorted pictures, nerfstudio's
transforms.json, the sparse points, and a report. All of it appears at once, at the end.
"""

import contextlib
import errno
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from csd3d import files
from csd3d.arguments import Parser, path_of, show
from csd3d.datasets.points import write_ply
from csd3d.datasets.process import apart
from csd3d.datasets.process.frames import Chosen, choose_frames
from csd3d.datasets.process.poses import MATCHINGS, Posed, agreed_focals, find_poses, import_pycolmap, make_pairs
from csd3d.errors import InputError
from csd3d.temporary import TemporaryFolder, is_being_made

FRAMES = 120  # of a film
MAX_FRAMES = 1000
KIND = "partial"  # of the folder beside the output that is renamed to it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FEW = 0.8  # of the frames posed; below, the report says what to do
ADVICE = (
    "walk slowly, so that neighbouring pictures overlap by two thirds",
    "good light, no motion blur; lock focus and exposure",
    "go round the object more than once, at two heights, and end where you began",
    "avoid mirrors, glass, plain walls; put something with texture (a newspaper) beside a plain object",
    "try --frames 200, or --matching exhaustive",
)


def process(
    source: Path,
    output: Path,
    frames: int | None = None,
    matching: str = "auto",
    seed: int = 0,
    tell: Callable[[str], None] = print,
    named_by: str = "--output",
) -> dict:
    """Makes a posed dataset of `source` in the new folder `output`; returns what process.json holds.

    frames: the most that are used; by default 120 of a film and all photos of a folder. Same arguments, same result,
    whatever the number of threads.  named_by: what the user names `output` by, for messages. Raises InputError, one
    line; whatever is raised, `output` is then not there.
    """
    if frames is not None and not 8 <= frames <= MAX_FRAMES:
        raise InputError(f"--frames: {frames}; expected 8 to {MAX_FRAMES}")
    if not 0 <= seed < 2**31:
        raise InputError(f"--seed: {seed}; expected 0 to {2**31 - 1}")
    import_pycolmap()
    try:
        place = _place(output, named_by)
        with _parents(place), TemporaryFolder(KIND, beside=place) as partial, TemporaryFolder("process") as work:
            report = _into(partial, work, source, frames, matching, seed, tell)
            if place.exists():
                place.rmdir()
            os.replace(partial, place)
    except InputError:
        raise
    except OSError as error:
        raise InputError(_told(error, output, named_by)) from error
    except (RuntimeError, ValueError) as error:  # what COLMAP raises
        raise InputError(f"{source}: COLMAP failed ({' '.join(str(error).split())[:200]})") from error
    return report


def _into(
    folder: Path, work: Path, source: Path, frames: int | None, matching: str, seed: int, tell: Callable[[str], None]
) -> dict:
    """Writes the dataset to `folder`; pictures in between to `work`."""
    started = time.monotonic()
    is_film = not source.is_dir()
    pictures = work / "frames"
    pictures.mkdir()
    chosen = choose_frames(source, frames or (FRAMES if is_film else MAX_FRAMES), pictures, tell)
    tell(f"{len(chosen.files)} of {chosen.looked_at} frames chosen")
    pairs = make_pairs(len(chosen.files), matching, is_film)
    focals = agreed_focals(chosen.sizes, chosen.focals)
    for (width, height), focal in focals.items():
        tell(f"focal length of the photos of {width}x{height} from their EXIF: {focal:.0f} pixels, to begin with")
    arguments = (pictures, chosen.files, chosen.sizes, focals, pairs, seed)
    posed = apart.call(find_poses, *arguments, tell=tell, folder=work)
    _write_dataset(folder, chosen, posed)
    report = _report(source, chosen, posed, matching, seed, time.monotonic() - started)
    files.write_text(folder / "process.json", json.dumps(report, indent=1))
    files.write_text(folder / "report.txt", "\n".join(sentences(report)) + "\n")
    return report


def _place(output: Path, named_by: str) -> Path:
    """Where `output` is, links followed; InputError, before any work, if nothing could be renamed to it in the end."""
    place = Path(os.path.realpath(output))
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"{named_by}: {output} is there and not empty; choose another folder")
    if place.is_dir() and (os.path.ismount(place) or place == Path.cwd()):
        what = "a mount point" if os.path.ismount(place) else "the current folder"
        raise InputError(f"{named_by}: {output} is {what}, which cannot be replaced; choose a new folder inside it")
    if is_being_made(KIND, place):
        raise InputError(f"{named_by}: another process is making {output}; wait for it, or choose another folder")
    above = next((parent for parent in place.parents if os.path.lexists(parent)), place)
    if not above.is_dir():
        raise InputError(f"{named_by}: {above} is no folder, so that there can be none in it; choose another")
    return place


@contextlib.contextmanager
def _parents(place: Path) -> Iterator[None]:
    """Makes the folders above `place`, and removes those again if what is done within fails."""
    missing = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                parent.rmdir()
        raise


def _told(error: OSError, output: Path, named_by: str) -> str:
    """An error of the file system in one line; copying names the file that it reads first."""
    file = error.filename2 or error.filename or output
    what = f"; free some space there, or choose another disk by {named_by} and TMPDIR" if error.errno in FULL else ""
    return f"{file}: {error.strerror or error}{what}"


def _write_dataset(folder: Path, chosen: Chosen, posed: Posed) -> None:
    """images/, transforms.json and sparse.ply; poses in COLMAP's own frame and scale, which is arbitrary."""
    (folder / "images").mkdir()
    origin = dict(zip(chosen.files, chosen.origins, strict=True))
    entries = []
    for frame in posed.listing.frames:
        shutil.copyfile(frame.file, folder / "images" / frame.name)
        entries.append(
            {
                "file_path": f"images/{frame.name}",
                "source": origin[frame.name],
                **dict(zip(("fl_x", "fl_y"), frame.focal, strict=True)),
                **dict(zip(("cx", "cy"), frame.centre, strict=True)),
                **dict(zip(("w", "h"), frame.size, strict=True)),
                "transform_matrix": frame.pose.tolist(),
            }
        )
    write_ply(folder / "sparse.ply", posed.listing.points)
    meta = {"camera_model": "PINHOLE", "ply_file_path": "sparse.ply", "frames": entries}
    files.write_text(folder / "transforms.json", json.dumps(meta, indent=1))


def _report(source: Path, chosen: Chosen, posed: Posed, matching: str, seed: int, seconds: float) -> dict:
    names = {frame.name for frame in posed.listing.frames}
    return {
        "source": str(source.absolute()),
        "frames_seen": chosen.looked_at,
        "frames_blurred": chosen.blurred,
        "frames_repeated": chosen.repeated,
        "frames_used": len(chosen.files),
        "frames_posed": len(names),
        "not_posed": [o for file, o in zip(chosen.files, chosen.origins, strict=True) if file not in names],
        "notes": chosen.notes,
        "reprojection_error_px": round(posed.error_px, 3),
        "median_angle_deg": round(posed.angle_deg, 1),
        "points": len(posed.listing.points.xyz),
        "matching_pairs": posed.pairs,
        "components": posed.components,
        "matching": matching,
        "seed": seed,
        "seconds": round(seconds, 1),
    }


def sentences(report: dict) -> list[str]:
    """The report in plain lines."""
    used, posed = report["frames_used"], report["frames_posed"]
    lines = [
        f"{report['frames_seen']} frames seen, {used} used "
        f"({report['frames_blurred']} blurred, {report['frames_repeated']} repetitions left out)",
        f"{posed} of {used} posed ({100 * posed / used:.0f} %), mean reprojection error "
        f"{report['reprojection_error_px']} px, {report['points']} points seen at {report['median_angle_deg']} degrees",
    ]
    if len(report["components"]) > 1:
        others = ", ".join(map(str, report["components"][1:]))
        lines.append(
            f"the pictures fall into {len(report['components'])} parts that do not connect: "
            f"the largest is kept, the others, of {others} pictures, are not"
        )
    if posed < FEW * used:
        shown = ", ".join(map(str, report["not_posed"][:8]))
        lines.append(f"not posed: {shown}{', ...' if len(report['not_posed']) > 8 else ''}")
        lines += ["fewer than usual. What helps:", *(f"  - {advice}" for advice in ADVICE)]
    return lines


def build_parser() -> Parser:
    """The arguments of `csd3d process`."""
    parser = Parser(
        prog="csd3d process",
        description="Finds the camera poses of a film or a folder of photos; writes a dataset for scene.path.",
    )
    parser.add_argument("source", metavar="VIDEO_OR_FOLDER", type=path_of, help="a film, or a folder of photos")
    parser.add_argument("--output", metavar="DIR", type=path_of, required=True, help="the new folder of the dataset")
    parser.add_argument("--frames", metavar="N", type=int, help=f"use at most N (default: {FRAMES} of a film)")
    parser.add_argument("--matching", choices=MATCHINGS, default="auto", help="which pictures are compared")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of everything random (default: 0)")
    return parser


def main(argv: Sequence[str]) -> int:
    """`csd3d process ...`; returns the exit code: 0, 130 when stopped by Ctrl+C. Raises InputError."""
    args = build_parser().parse_all(argv)
    start = time.monotonic()

    def tell(line: str) -> None:
        show(f"[{time.monotonic() - start:4.0f} s] {line}")

    try:
        report = process(args.source, args.output, args.frames, args.matching, args.seed, tell)
    except KeyboardInterrupt:
        print(f"Stopped; nothing was written to {args.output}.", file=sys.stderr)
        return 130
    show("\n".join(sentences(report)))
    show(f"Dataset in {args.output}; to edit it (without a GPU: docs/captures.md, section 3):")
    show(f'csd3d --config configs/csd-edit-capture.yaml scene.path={shlex.quote(str(args.output))} prompt="..."')
    return 0
