"""transforms.json of nerfstudio and instant-ngp.

A value in a frame overrides the same value given for the whole file. Lens and pose conventions: csd3d.cameras.
"""

import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from csd3d.datasets.listing import Frame, Listing, Points, sorted_by_name
from csd3d.datasets.panoramas import cut_frame
from csd3d.datasets.points import read_ply
from csd3d.datasets.reading import (
    listed_file,
    matrix,
    name_key,
    number,
    pixel_count,
    positive,
    rigid,
    scaled_rigid,
    shown,
    text,
)
from csd3d.errors import InputError
from csd3d.files import read_json
from csd3d.registry import register

LENS_KEYS = ("k1", "k2", "k3", "k4", "p1", "p2")
RATIONAL_KEYS = ("k1", "k2", "k3", None, "p1", "p2", "k4", "k5", "k6")  # of FULL_OPENCV, in the order of csd3d.cameras
FULL, PANORAMA = "FULL_OPENCV", "EQUIRECTANGULAR"
PERSPECTIVE = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", FULL, PANORAMA)
FISHEYE = ("OPENCV_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE")
NGP_SCALE = 0.33  # instant-ngp maps positions to its unit cube by 0.33 x + 0.5 (docs/nerf_dataset_tips.md)


@register("reader", "nerfstudio", title="nerfstudio and instant-ngp")
@dataclass(frozen=True)
class Nerfstudio:
    """A folder with transforms.json, or a JSON file of that format.

    Additional keys: `split` of a frame, "train" or "test"; `aabb`, the scene's box [[x, y, z], [x, y, z]].
    The scene is bounded if the file has `aabb`, or an `aabb_scale` (of instant-ngp) up to 1.

        scene: {path: captures/kitchen, downscale: 2}
    """

    wants: ClassVar[str] = "transforms.json"

    @staticmethod
    def matches(path: Path) -> bool:
        return (path / "transforms.json").exists() or (path.suffix == ".json" and path.name != "transforms_train.json")

    def read(self, path: Path) -> Listing:
        return listing_of({path if path.is_file() else path / "transforms.json": None})


def listing_of(files: dict[Path, str | None]) -> Listing:
    """Read JSON files, each with the split of its frames (None: the file may give splits itself).

    Values for the whole capture are read from the first file. Raises InputError.
    """
    metas = {file: read_json(file, "a capture's JSON") for file in files}
    frames: list[Frame] = []
    for file, split in files.items():
        frames += sorted_by_name(_frames(metas[file], file, split))
    first = next(iter(files))
    meta = metas[first]
    box = None if meta.get("aabb") is None else _box(meta["aabb"], f"{first}: aabb")
    scale = None if meta.get("aabb_scale") is None else positive(meta["aabb_scale"], f"{first}: aabb_scale")
    applied = meta.get("applied_transform")
    return Listing(
        frames=frames,
        folder=first.parent,
        file=first,
        bounded=box is not None or (scale is not None and scale <= 1),
        points=_points(meta, first),
        box=box if box is not None or scale is None else 0.5 * scale / NGP_SCALE * np.array([[-1.0] * 3, [1.0] * 3]),
        applied_transform=np.eye(4) if applied is None else rigid(applied, f"{first}: applied_transform"),
        applied_scale=positive(meta.get("applied_scale", 1.0), f"{first}: applied_scale"),
    )


def _points(meta: dict[str, Any], file: Path) -> Points | None:
    """The sparse points of nerfstudio's `ply_file_path`, where the file is there."""
    where = f"{file}: ply_file_path"
    path = None if meta.get("ply_file_path") is None else listed_file(file.parent, meta["ply_file_path"], where)
    return None if path is None else read_ply(path, where)


def _frames(meta: dict[str, Any], file: Path, split: str | None) -> list[Frame]:
    entries = meta.get("frames")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{file}: frames: {shown(entries)}; expected a non-empty list of frames")
    _refuse_repeated(entries, file)
    frames = [_frame(entry, meta, file, f"{file}: frames[{i}]") for i, entry in enumerate(entries)]
    if split is not None:
        frames = [replace(frame, split=split) for frame in frames]
    else:
        frames = _split_by_filenames(frames, meta, file)
    return [part for frame in frames for part in (cut_frame(frame) if frame.cut is not None else [frame])]


def _refuse_repeated(entries: list[Any], file: Path) -> None:
    """Refuse a name that is listed twice before looking for any file, which takes long for thousands of frames."""
    seen: dict[str, int] = {}
    for i, entry in enumerate(entries):
        name = entry.get("file_path") if isinstance(entry, dict) else None
        if isinstance(name, str) and seen.setdefault(name, i) != i:
            raise InputError(f"{file}: frames[{i}].file_path: {shown(name)} is listed already, by frames[{seen[name]}]")


def _frame(entry: Any, meta: dict[str, Any], file: Path, where: str) -> Frame:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {shown(entry)}; expected an object with file_path and transform_matrix")
    for key in ("file_path", "transform_matrix"):
        if key not in entry:
            raise InputError(f"{where}: has no {key}")
    merged = ChainMap(entry, meta)
    model = _model(merged, where)
    keys = RATIONAL_KEYS if model == FULL else () if model == PANORAMA else LENS_KEYS
    image = listed_file(file.parent, entry["file_path"], f"{where}.file_path")
    mask = None
    if entry.get("mask_path") is not None:
        mask = listed_file(file.parent, entry["mask_path"], f"{where}.mask_path")
        image = None if mask is None else image  # without its mask, the picture would show what the mask hides
    pose, scale = scaled_rigid(entry["transform_matrix"], f"{where}.transform_matrix")
    return Frame(
        where=where,
        name=entry["file_path"].removeprefix("./"),
        file=image,
        mask=mask,
        pose=pose,
        pose_scale=scale,
        **_intrinsics(entry, meta, where),
        lens=tuple(_coefficient(merged.get(key, 0.0), f"{where}.{key}") if key else 0.0 for key in keys) or (0.0,) * 6,
        fisheye=model in FISHEYE,
        cut=0 if model == PANORAMA else None,
        split=_frame_split(entry, where),
    )


def _intrinsics(entry: dict[str, Any], meta: dict[str, Any], where: str) -> dict[str, tuple]:
    """focal, angle, centre and size, the frame's own if given; a frame's angle overrides a focal length of `meta`."""
    focal, angle = [], []
    for axis in "xy":
        source = entry if f"fl_{axis}" in entry or f"camera_angle_{axis}" in entry else meta
        focal.append(_optional(positive, source, f"fl_{axis}", where))
        angle.append(_optional(_field_of_view, source, f"camera_angle_{axis}", where))
    merged = ChainMap(entry, meta)
    centre = tuple(_optional(number, merged, key, where) for key in ("cx", "cy"))
    size = tuple(_optional(pixel_count, merged, key, where) for key in ("w", "h"))
    return {"focal": tuple(focal), "angle": tuple(angle), "centre": centre, "size": size}


def _optional(check, source: Mapping[str, Any], key: str, where: str):
    return None if source.get(key) is None else check(source[key], f"{where}.{key}")


def _coefficient(value: Any, where: str) -> float:
    k = number(value, where)
    if abs(k) > 1e4:
        raise InputError(f"{where}: {k:g}; expected a lens coefficient, most often between -1 and 1")
    return k


def _field_of_view(value: Any, where: str) -> float:
    angle = number(value, where)
    if not 1e-4 < angle < math.pi - 1e-4:
        raise InputError(f"{where}: {angle:g}; expected a field of view in radians, between 0 and pi")
    return angle


def _model(merged: Mapping[str, Any], where: str) -> str:
    if merged.get("camera_model") is None:
        return FISHEYE[0] if merged.get("is_fisheye") is True else PERSPECTIVE[0]  # instant-ngp
    model = text(merged["camera_model"], f"{where}.camera_model")
    if model not in PERSPECTIVE + FISHEYE:
        raise InputError(f"{where}.camera_model: {shown(model)}; expected one of {', '.join(PERSPECTIVE + FISHEYE)}")
    return model


def _frame_split(entry: dict[str, Any], where: str) -> str | None:
    split = entry.get("split")
    if split not in (None, "train", "test", "val"):
        raise InputError(f"{where}.split: {shown(split)}; expected 'train' or 'test'")
    return "test" if split == "val" else split


def _split_by_filenames(frames: list[Frame], meta: dict[str, Any], file: Path) -> list[Frame]:
    """Apply nerfstudio's train_filenames and test_filenames (or val_filenames); frames in neither are dropped."""
    lists = {split: meta.get(f"{split}_filenames") for split in ("train", "test", "val")}
    if all(names is None for names in lists.values()):
        return frames
    held_out = "test" if lists["test"] is not None else "val"
    splits = {}
    for key, split in ((held_out, "test"), ("train", "train")):
        for name in _names(lists[key], f"{file}: {key}_filenames"):
            if splits.setdefault(name, split) != split:
                raise InputError(f"{file}: {shown(name)} stands in both train_filenames and {held_out}_filenames")
    unknown = splits.keys() - {name_key(frame.name) for frame in frames}
    if unknown:
        raise InputError(f"{file}: {shown(min(unknown))} in train_ or {held_out}_filenames is no frame's file_path")
    if not splits:
        raise InputError(f"{file}: train_filenames and {held_out}_filenames are empty; expected names of frames")
    found = [(frame, splits.get(name_key(frame.name))) for frame in frames]
    return [replace(frame, split=split) for frame, split in found if split is not None]


def _names(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InputError(f"{where}: {shown(value)}; expected a list of file names")
    return [name_key(text(name, f"{where}[{i}]")) for i, name in enumerate(value)]


def _box(value: Any, where: str) -> np.ndarray:
    box = matrix(value, ((2, 3),), where)
    if not (box[1] - box[0] > 1e-6).all() or np.abs(box).max() > 1e8:
        raise InputError(f"{where}: {shown(value)}; expected [[x, y, z], [x, y, z]], the smallest corner first")
    return box
