"""Whole inputs of every kind that csd3d reads, small, for benchmarks/mutations.py to damage, and how each is opened."""

import contextlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from PIL.Image import Exif

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "datasets")]

import tiny_captures  # noqa: E402 (of the tests)
import tiny_jobs  # noqa: E402
from tiny_models import save_tiny_pipeline  # noqa: E402

from csd3d import run as jobs  # noqa: E402
from csd3d.datasets import SceneConfig, load_capture  # noqa: E402
from csd3d.datasets.listing import Points  # noqa: E402
from csd3d.datasets.points import write_ply  # noqa: E402
from csd3d.datasets.process.frames import choose_frames  # noqa: E402
from csd3d.engine.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from csd3d.engine.state import pack, unpack  # noqa: E402
from csd3d.interrupt import StopRequest  # noqa: E402
from csd3d.media import encode, open_video, read_image  # noqa: E402
from csd3d.media.ffmpeg import command, source  # noqa: E402
from csd3d.metrics.clip import load_clip  # noqa: E402
from csd3d.priors import PriorConfig, load_prior  # noqa: E402
from csd3d.priors.expected import ExpectedReconstruction, load_expected  # noqa: E402
from csd3d.world.dataset import read_scene, true_answers, write_capture  # noqa: E402
from csd3d.world.render import camera_row, render  # noqa: E402
from csd3d.world.scene import Scene  # noqa: E402

RUN_FILES = ["config.yaml", "environment.json", "cmd.txt", "log.txt", "metrics.json", "curves/csd_edit/curves.jsonl"]
SCENE_RUN_FILES = [*RUN_FILES, "scene.json", "videos/camera_path.json", "checkpoints/in2n/checkpoint.json"]


@dataclass
class Sort:
    """The inputs of one kind: a folder that is copied, the files in it that are damaged, and how it is opened."""

    folder: Path
    targets: list[str]
    use: Callable[[Path, str], object]  # (folder, the damaged file)
    weight: float = 1.0  # its share of all inputs; little where one takes seconds


def make_inputs(place: Path) -> dict[str, Sort]:
    """Write a whole input of every kind."""
    capture, prior = place / "capture", place / "prior"
    write_capture(capture, Scene("cube", "yellow", azimuth_deg=20), train=5, test=2, size=32)
    save_tiny_pipeline(prior, "edit")
    tree = {"step": 7, "adam": {0: {"exp_avg": torch.ones(3)}}, "betas": (0.9, 0.999)}
    save_checkpoint(place / "checkpoint", "last", *pack(tree), identity={"seed": 0})
    configs = shutil.copytree(ROOT / "configs", place / "configs", ignore=shutil.ignore_patterns("paper", "real"))
    (place / "world").mkdir()
    shutil.copy(capture / "world.json", place / "world")
    networks = place / "networks"
    ExpectedReconstruction(width=8, blocks=1).save_pretrained(networks / "lmc")
    shutil.copytree(ROOT / "csd3d/assets/clip", networks / "clip")
    run, scene_run = (_finished(place / name, task, prior, capture) for name, task in RUNS.items())
    sorts = {
        "config": Sort(configs, _names(configs, "*.yaml"), lambda folder, file: jobs.read(folder / file, []), 16),
        "capture": Sort(capture, ["transforms.json"] * 9 + ["images/000.png"], _load_capture, 10),
        "points": _of_folders(_points(place / "points"), 4, "*/sparse.ply"),
        "apps": _of_folders(_apps(place / "apps"), 8, "blender/*.json", "record3d/metadata", "polycam/*/cameras/*"),
        "photos": Sort(_photos(place / "photos"), [f"{i}.jpg" for i in range(9)], _choose_frames, 3),
        "picture": Sort(_pictures(place / "pictures"), [], lambda folder, file: read_image(folder / file), 16),
        "video": Sort(_videos(place / "videos"), [], _read_video, 3),
        "checkpoint": Sort(place / "checkpoint", _names(place / "checkpoint", "last/*"), _load_checkpoint, 8),
        "prior": Sort(prior, _names(prior, "**/*.*"), _load_prior, 1),
        "network": Sort(networks, _names(networks, "*/*.*"), _load_network, 3),
        "world": Sort(place / "world", ["world.json"], _read_world, 12),
        "run": Sort(run, RUN_FILES, _export, 0.4),
        "scene run": Sort(scene_run, SCENE_RUN_FILES, _export, 0.15),
    }
    if importlib.util.find_spec("pycolmap"):
        sorts["colmap"] = _of_folders(_colmap(place / "colmap"), 12, "*/sparse/0/*")
    for name in ("picture", "video"):
        sorts[name].targets = _names(sorts[name].folder, "*.*")
    return sorts


RUNS = {"run": "edit_image", "scene run": "edit_scene"}


def _of_folders(folder: Path, weight: float, *patterns: str) -> Sort:
    """Captures, each a folder of `folder`, of which the files of these patterns are damaged."""
    targets = [name for pattern in patterns for name in _names(folder, pattern)]
    return Sort(folder, targets, lambda place, file: _load_capture(place / Path(file).parts[0], file), weight)


def _names(folder: Path, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob(pattern) if path.is_file())


# ------------------------------------------------------------------------------------------------------------- writing


def _finished(folder: Path, task: str, prior: Path, capture: Path) -> Path:
    """A finished run of a tiny job."""
    job = tiny_jobs.write_job(folder.with_name(f"{folder.name} job"), task, {"edit": prior}, capture)
    keys = [f"{key}={job.parent / path}" for key, path in tiny_jobs.INPUTS[task].items()]
    with contextlib.redirect_stderr(io.StringIO()):
        return jobs.start(job, keys, folder, None, "cpu", stop=StopRequest())


def _pictures(folder: Path) -> Path:
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (12, 17, 4), dtype=np.uint8)
    rgb = Image.fromarray(pixels[..., :3])
    Image.fromarray(pixels).save(folder / "alpha.png")
    rgb.convert("P").save(folder / "palette.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(folder / "grey16.png")
    for suffix in ("jpg", "webp", "tif", "bmp", "avif"):
        rgb.save(folder / f"rgb.{suffix}")
    rgb.save(folder / "lzw.tiff", compression="tiff_lzw")
    Image.fromarray(pixels[..., 0].astype(np.float32) / 255).save(folder / "float.tif")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    rgb.save(folder / "turned.jpg", exif=_turned(6), icc_profile=profile)
    rgb.save(folder / "profile.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    return folder


def _turned(orientation: int) -> Exif:
    exif = Exif()
    exif[0x0112], exif[0x010F], exif[0x920A] = orientation, "a phone", 4.2
    return exif


def _photos(folder: Path) -> Path:
    """Nine photos, each of another part of one pattern, as a phone writes them."""
    folder.mkdir()
    pattern = np.random.default_rng(2).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(pattern).resize((320, 160), Image.Resampling.NEAREST))
    for i in range(9):
        shown = large[:64, 20 * i : 20 * i + 96]
        Image.fromarray(shown).save(folder / f"{i}.jpg", exif=_turned(1 + i % 8))
    return folder


def _videos(folder: Path) -> Path:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)
    encode(folder / "a.mp4", pixels, 24)
    for suffix in ("mkv", "mov", "avi", "ts"):
        output = ["-c", "copy", str(folder / f"a.{suffix}")]
        subprocess.run(command(*source(folder / "a.mp4"), *output), check=True, capture_output=True)
    return folder


def _points(folder: Path) -> Path:
    """A capture with sparse points in a binary PLY file, and one with the same in a text file."""
    xyz = np.random.default_rng(3).normal(size=(20, 3))
    for name in ("binary", "text"):
        tiny_captures.write_capture(folder / name, tiny_captures.transforms(ply_file_path="sparse.ply"))
        write_ply(folder / name / "sparse.ply", Points(xyz, np.full((20, 3), 0.5, np.float32)))
    rows = "".join(f"{x} {y} {z} 9 8 7\n" for x, y, z in xyz)
    kinds = [*(f"property float {axis}" for axis in "xyz"), *(f"property uchar {c}" for c in ("red", "green", "blue"))]
    head = "\n".join(["ply", "format ascii 1.0", "comment a", "element vertex 20", *kinds, "end_header", ""])
    (folder / "text/sparse.ply").write_text(head + rows)
    return folder


def _apps(folder: Path) -> Path:
    tiny_captures.polycam(folder / "polycam")
    tiny_captures.record3d(folder / "record3d")
    tiny_captures.write_capture(folder / "blender", tiny_captures.transforms(), "transforms_train.json")
    return folder


def _colmap(folder: Path) -> Path:
    """One synthetic reconstruction in COLMAP's binary files, one in its text files."""
    import pycolmap

    options = pycolmap.SyntheticDatasetOptions()
    options.camera_width, options.camera_height, options.camera_params = 48, 32, [40, 23.5, 16.5, -0.1]
    options.num_points3D, options.num_frames_per_rig, options.num_rigs = 20, 4, 1
    options.camera_model_id = pycolmap.CameraModelId.SIMPLE_RADIAL
    model = pycolmap.synthesize_dataset(options)
    for name, write in (("binary", model.write_binary), ("text", model.write_text)):
        (folder / name / "sparse/0").mkdir(parents=True)
        write(str(folder / name / "sparse/0"))
        for image in model.images.values():
            file = folder / name / "images" / image.name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 32), "gray").save(file)
    return folder


# ------------------------------------------------------------------------------------------------------------- opening


def _load_capture(folder: Path, _file: str) -> object:
    return load_capture(SceneConfig(path=str(folder)))


def _choose_frames(folder: Path, _file: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        choose_frames(folder, 20, Path(place), lambda line: None)


def _read_video(folder: Path, file: str) -> None:
    with open_video(folder / file) as video:
        for number in range(min(video.count, 50)):
            video.frames([number])


def _load_checkpoint(folder: Path, _file: str) -> object:
    return unpack(*load_checkpoint(folder / "last", identity={"seed": 0}))


def _load_prior(folder: Path, _file: str) -> None:
    prior = load_prior(PriorConfig(str(folder), device="cpu"), require="edit")
    prior.condition(["", "a red it"])


def _load_network(folder: Path, file: str) -> None:
    if file.startswith("lmc"):
        load_expected(folder / "lmc")(torch.zeros(1, 4, 4, 4), 3)
    else:
        load_clip(str(folder / "clip"), "cpu").embed_texts(["a red chair"])


def _read_world(folder: Path, _file: str) -> None:
    scene = read_scene(folder)
    if scene is not None:
        for answer in (scene, *true_answers(scene, "paint it blue")[:1]):
            render([answer], np.stack([camera_row(20.0, 30.0, 4.0, 40.0, 16)]), 16, 16)


def _export(folder: Path, file: str) -> None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        jobs.export(folder, [], "cpu", stop=StopRequest())
    if Path(file).name in ("metrics.json", "scene.json", "camera_path.json"):
        json.loads((folder / file).read_text())  # it is written again, whole
