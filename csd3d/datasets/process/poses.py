"""Poses of pictures by structure from motion: COLMAP through pycolmap (Schönberger and Frahm 2016).

Every random choice has its seed, and the mapping runs on one thread, so that the result depends on nothing else.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csd3d.datasets.listing import Listing
from csd3d.datasets.readers.colmap import Colmap
from csd3d.errors import InputError

MAX_FEATURES = 4096  # of a picture
LENS = "SIMPLE_RADIAL"  # what a telephone's or a camera's own correction leaves; one for all pictures of a size
EXHAUSTIVE = 40  # "auto" matches all pairs of this many frames of a film, else neighbours in time
NEIGHBOURS = 10
BATCH = 200  # pairs matched between two words on progress
LEAST_POSED = 5
LEAST_ANGLE_DEG = 1.5  # at which a point is seen, or it is left out
FOCALS_AGREE = 0.02  # of the focal lengths that pictures of one camera tell
LEAST_SHIFT = 0.02  # of a camera between two pictures, over its distance from what it sees
MATCHINGS = ("auto", "sequential", "exhaustive")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Posed:
    """The largest reconstruction, undistorted: `listing` has its frames (by file) and sparse points."""

    listing: Listing
    images: Path
    error_px: float
    angle_deg: float
    components: list[int]  # pictures in each, the largest first
    pairs: int  # that show the same things


def import_pycolmap() -> Any:
    """pycolmap, silenced; InputError that says how to install it."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # of each of its threads, read at import: more wait for each other, spinning
    import PIL.Image  # noqa: F401  Pillow crashes when it writes a PNG if it is imported after pycolmap

    try:
        import pycolmap
    except ImportError as error:
        hint = 'pip install -c constraints.txt -e ".[process]"'
        raise InputError(f"csd3d process needs pycolmap, which is not installed ({error}): {hint}") from None
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    pycolmap.logging.minloglevel = 3
    return pycolmap


def threads() -> int:
    """As many as OMP_NUM_THREADS says, or as there are cores. Results do not depend on it."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) > 0 else len(os.sched_getaffinity(0))


def find_poses(
    folder: Path,
    names: list[str],
    sizes: list[tuple[int, int]],
    focals: dict[tuple[int, int], float],
    pairs: list[tuple[int, int]],
    seed: int,
    tell: Tell,
) -> Posed:
    """Poses of the pictures `names` in `folder`, with matches looked for in `pairs`; works beside it.

    focals: where to begin, in pixels, for the pictures of a size; without, from 1.2 times the longer side.

    Raises InputError where nothing matches, nothing can be mapped, or everything was taken from one point.
    """
    pycolmap = import_pycolmap()
    work = folder.parent
    database = work / "database.db"
    _features(pycolmap, database, folder, names, sizes, focals, tell)
    _matches(pycolmap, database, work, names, pairs, seed, tell)
    verified, homographies = _verified(pycolmap, database)
    if verified == 0:
        hint = "let neighbouring pictures overlap by two thirds, and keep the object, not the camera, still"
        raise InputError(f"no two of {len(names)} pictures show the same details: nothing matched; {hint}")
    if len(homographies) > 0.9 * verified and shift_seen(np.array(homographies), sizes[0]) < LEAST_SHIFT:
        raise InputError(
            f"the camera only turns: no parallax between {verified} pairs of {len(names)} pictures, as from a tripod; "
            "walk around the object instead"
        )
    error = max(2.0, max(map(max, sizes)) / 480)  # pixels: 4, as COLMAP has it, at 1920 a side
    models = _map(pycolmap, database, folder, work / "models", len(names), error, seed, tell)
    best = max(models, key=lambda k: models[k].num_reg_images(), default=None)
    if best is None or models[best].num_reg_images() < LEAST_POSED:
        posed = 0 if best is None else models[best].num_reg_images()
        raise InputError(
            f"only {posed} of {len(names)} pictures could be posed, expected at least {LEAST_POSED}, though {verified} "
            "pairs match; walk around the object, slowly, in good light, with two thirds of overlap"
        )
    model = models[best]
    _refine(pycolmap, model, error)
    tell(f"undistorting {model.num_reg_images()} pictures")
    (work / "best").mkdir()
    model.write_binary(str(work / "best"))
    pycolmap.undistort_images(work / "flat", work / "best", folder, num_threads=threads())
    counts = sorted((found.num_reg_images() for found in models.values()), reverse=True)
    listing = Colmap().read(work / "flat")
    error = model.compute_mean_reprojection_error()
    return Posed(listing, work / "flat" / "images", error, _median_angle(model), counts, verified)


def agreed_focals(sizes: list[tuple[int, int]], focals: list[float | None]) -> dict[tuple[int, int], float]:
    """The median focal length in pixels of the pictures of each size that all tell one, within 2 % of each other."""
    agreed = {}
    for size in dict.fromkeys(sizes):
        told = [focal for focal, other in zip(focals, sizes, strict=True) if other == size]
        if all(told) and max(told) <= (1 + FOCALS_AGREE) * min(told):
            agreed[size] = float(np.median(told))
    return agreed


def make_pairs(count: int, matching: str, is_film: bool) -> list[tuple[int, int]]:
    """Which pictures to match: all with all, or each with those near it in time and, coarsely, with all others.

    sequential: 10 neighbours, then those 16, 32, 64, ... away; and every 5th with every 5th, which closes loops (at
    most 25 frames in this, evenly spaced).
    """
    if matching == "exhaustive" or (matching == "auto" and (not is_film or count <= EXHAUSTIVE)):
        return list(itertools.combinations(range(count), 2))
    steps = [*range(1, NEIGHBOURS + 1), *(2**k for k in range(4, 20))]
    near = {(i, i + step) for step in steps for i in range(count - step)}
    return sorted(near | set(itertools.combinations(range(0, count, max(5, count // 24)), 2)))


def _features(
    pycolmap: Any,
    database: Path,
    folder: Path,
    names: list[str],
    sizes: list[tuple[int, int]],
    focals: dict[tuple[int, int], float],
    tell: Tell,
) -> None:
    reader = pycolmap.ImageReaderOptions()
    reader.camera_model = LENS
    options = pycolmap.FeatureExtractionOptions()
    options.num_threads, options.sift.max_num_features = threads(), MAX_FEATURES
    pycolmap.Database.open(database).close()  # makes the file
    for size in dict.fromkeys(sizes):  # one camera for all pictures of a size
        same = [name for name, other in zip(names, sizes, strict=True) if other == size]
        if size in focals:
            reader.camera_params = f"{focals[size]!r},{size[0] / 2},{size[1] / 2},0"
        else:
            reader.camera_params = ""
        pycolmap.import_images(database, folder, pycolmap.CameraMode.SINGLE, same, reader)
    reader.camera_params = ""
    for name in _counted(names, "features", "pictures", tell):
        pycolmap.extract_features(
            database, folder, [name], extraction_options=options, reader_options=reader, device=pycolmap.Device.cpu
        )


def _matches(
    pycolmap: Any, database: Path, work: Path, names: list[str], pairs: list[tuple[int, int]], seed: int, tell: Tell
) -> None:
    matching, pairing = pycolmap.FeatureMatchingOptions(), pycolmap.ImportedPairingOptions()
    matching.num_threads = threads()
    geometry = pycolmap.TwoViewGeometryOptions()
    geometry.ransac.random_seed = seed
    pairing.match_list_path = work / "pairs.txt"
    batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    for batch in _counted(batches, "matching", f"batches of {BATCH} pairs", tell):
        pairing.match_list_path.write_text("".join(f"{names[i]} {names[j]}\n" for i, j in batch))
        pycolmap.match_image_pairs(database, matching, pairing, geometry, pycolmap.Device.cpu)


def _verified(pycolmap: Any, database: Path) -> tuple[int, list[np.ndarray]]:
    """How many pairs match; and the homographies [3, 3] of those that have one, as turning cameras and walls do."""
    opened = pycolmap.Database.open(database)
    try:
        _, found = opened.read_two_view_geometries()
    finally:
        opened.close()
    kinds = pycolmap.TwoViewGeometryConfiguration
    some = [g for g in found if len(g.inlier_matches) > 0 and g.config != kinds.WATERMARK]
    flat = (kinds.PLANAR, kinds.PANORAMIC, kinds.PLANAR_OR_PANORAMIC)
    return len(some), [g.H for g in some if g.config in flat]


def shift_seen(homographies: np.ndarray, size: tuple[int, int]) -> float:
    """How far cameras moved between pictures, over their distance from what they see: 0 where they only turned.

    homographies [P, 3, 3] in pixels. K^-1 H K is a rotation for a camera that turns, else R (1 + t n^T / d), whose
    singular values differ by about |t| / d (Ma et al. 2004, 5.3). The median over pairs, at the focal length in K
    for which it is least.
    """
    width, height = size
    shifts = []
    for focal in max(size) * np.geomspace(0.4, 4, 100):
        k = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        values = np.linalg.svd(np.linalg.inv(k) @ homographies @ k, compute_uv=False)
        shifts.append(np.median(np.log(values[:, 0] / np.maximum(values[:, 2], 1e-12))))
    return float(min(shifts))


def _map(
    pycolmap: Any, database: Path, folder: Path, models: Path, count: int, error: float, seed: int, tell: Tell
) -> dict[int, Any]:
    """Every reconstruction found; `error`: the reprojection error in pixels beyond which a point is wrong."""
    options = pycolmap.IncrementalPipelineOptions()
    options.min_model_size, options.max_num_models = 3, 10
    options.num_threads = options.mapper.num_threads = 1  # sums in one order
    options.random_seed = options.mapper.random_seed = options.triangulation.random_seed = seed
    options.mapper.filter_max_reproj_error = error
    options.triangulation.merge_max_reproj_error = options.triangulation.complete_max_reproj_error = error
    models.mkdir()
    steps = _counted(itertools.count(), "mapping", "pictures", tell, count)
    return pycolmap.incremental_mapping(
        database, folder, models, options, next_image_callback=lambda: next(steps, None) and None
    )


def _refine(pycolmap: Any, model: Any, error: float) -> None:
    """Adjusts everything once more, with little weight for large errors: halves the pose errors on rendered films."""
    options, config = pycolmap.BundleAdjustmentOptions(), pycolmap.BundleAdjustmentConfig()
    options.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
    options.ceres.loss_function_scale = error / 4
    options.ceres.solver_options.num_threads = 1
    options.print_summary = False
    for image in model.reg_image_ids():
        config.add_image(image)
    config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    pycolmap.create_default_bundle_adjuster(options, config, model).solve()
    pycolmap.ObservationManager(model).filter_all_points3D(error, LEAST_ANGLE_DEG)
    model.update_point_3d_errors()


def _median_angle(model: Any) -> float:
    """Median over points of the largest angle in degrees between the rays that see one."""
    centres = {i: image.projection_center() for i, image in model.images.items() if image.has_pose}
    angles = []
    for point in itertools.islice(model.points3D.values(), 0, None, max(1, len(model.points3D) // 2000)):
        rays = np.array([centres[element.image_id] - point.xyz for element in point.track.elements])
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        angles.append(np.degrees(np.arccos((rays @ rays.T).min().clip(-1, 1))))
    return float(np.median(angles)) if angles else 0.0


def _counted(things: Iterable, what: str, unit: str, tell: Tell, total: int | None = None) -> Iterator:
    """Passes things on, and tells every ten seconds how many are done and how long the rest takes."""
    total = len(things) if total is None else total
    start = last = time.monotonic()
    for done, thing in enumerate(things):
        now = time.monotonic()
        if now - last > 10 and 0 < done < total:
            last, left = now, (now - start) / done * (total - done)
            tell(f"{what}: {done} of {total} {unit}, about {left:.0f} s left")
        yield thing
    tell(f"{what}: done in {time.monotonic() - start:.0f} s")
