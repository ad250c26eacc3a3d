"""Cameras of the views to be judged, from a transforms.json, and their depth maps.

Depth maps are listed there (nerfstudio's `depth_file_path`), or are in a folder, by the names of the views. They are
.npy or one-channel .png files: floats in the cameras' unit, or whole numbers times `unit`. Depth is measured along the
camera's axis, as in nerfstudio, or along the ray of each pixel; 0, NaN and inf mean no surface.
"""

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.datasets.framing import Layout, Place, Raster, frame_cameras
from csd3d.datasets.listing import Frame, read_listing
from csd3d.datasets.readers.nerfstudio import Nerfstudio
from csd3d.datasets.reading import listed_file
from csd3d.errors import InputError, one_line
from csd3d.files import natural_key, read_json
from csd3d.media import read_image
from csd3d.media.pictures import MAX_PIXELS
from csd3d.score.inputs import Inputs, working_size

SAME_ASPECT = 0.02


@dataclass(frozen=True)
class Depths:
    """How depth is given."""

    folder: Path | None  # None: as the transforms.json lists it
    unit: float
    along: str  # "axis" or "ray"


def add_geometry(inputs: Inputs, file: Path, depths: Depths) -> Inputs:
    """The inputs with the cameras of `file` and, where known, with depth. Raises InputError, one line."""
    if not file.is_file():
        told = "a folder" if file.is_dir() else "no such file"
        raise InputError(f"--cameras: {file}: {told}; expected a transforms.json")
    frames, listed = _read(file)
    frames = [frames[i] for i in _match(inputs, [frame.name for frame in frames], file)]
    cameras = _cameras(frames, inputs)
    found = _depth_files(inputs, frames, listed, file, depths.folder)
    maps = None if found is None else torch.stack([_depth(*each, inputs, depths.unit) for each in found])
    if maps is not None and depths.along == "axis":
        maps = along_rays(maps, cameras)
    return replace(inputs, cameras=cameras, depths=maps)


def along_rays(depths: Tensor, cameras: Cameras) -> Tensor:
    """Depths [V, H, W] along the axis as distances along the rays: divided by the cosine between both."""
    for view in range(len(cameras)):
        _, rays_d = cameras.image_rays(view)
        cosine = -(rays_d @ cameras.camera_to_world[view, :, 2]).reshape(depths.shape[1:])
        depths[view] = torch.where(cosine > 1e-6, depths[view] / cosine, torch.inf)
    return depths


def _read(file: Path) -> tuple[list[Frame], dict[str, str]]:
    """The frames, and the depth files that they list, by the frame's name."""
    try:
        frames = read_listing(file, Nerfstudio(), allow_outside=True).frames  # the pictures listed are not opened
    except InputError as error:
        raise InputError(f"--cameras: {str(error).removeprefix('scene.path: ')}") from None
    if any(frame.cut is not None for frame in frames):
        raise InputError(f"--cameras: {file}: lists panoramas; expected pinhole or fisheye cameras")
    entries = [entry for entry in read_json(file, "a transforms.json")["frames"] if entry.get("depth_file_path")]
    return frames, {entry["file_path"].removeprefix("./"): entry["depth_file_path"] for entry in entries}


def _match(inputs: Inputs, names: list[str], file: Path) -> list[int]:
    """For each chosen view, the number of its frame: by name, else in order where there are as many."""
    number = {PurePosixPath(name).stem: i for i, name in enumerate(names)}
    for views in (inputs.before, inputs.after):
        wanted = views.names or []
        missing = [name for name in wanted if name not in number]
        if wanted and not missing and len(number) == len(names):
            return [number[wanted[i]] for i in inputs.chosen]
        if 0 < len(missing) < len(wanted):
            raise InputError(f"--cameras: {file}: lists no frame named {missing[0]}, as a view of {views.name} is")
    count = inputs.before.reader.count
    if len(names) != count:
        raise InputError(
            f"--cameras: {file}: {len(names)} frames for {count} views, with other names; expected as many"
        )
    inputs.notes.append(f"{file}: no frame has a view's name, so the frames were taken in the order of their names")
    order = sorted(range(count), key=lambda i: natural_key(names[i]))
    return [order[i] for i in inputs.chosen]


def _cameras(frames: list[Frame], inputs: Inputs) -> Cameras:
    """Cameras of the frames at the working size; their w and h may be of larger or smaller pictures."""
    width, height = inputs.before.size
    for frame in frames:
        stated = [expected or side for expected, side in zip(frame.size, (width, height), strict=True)]
        if abs(stated[0] * height / (stated[1] * width) - 1) > SAME_ASPECT:
            raise InputError(
                f"--cameras: {frame.where}: w and h say {stated[0]}x{stated[1]}, the views are {width}x{height}; "
                "expected that size, or another of the same aspect"
            )
    rasters = [Raster(width, height, False, None if None in frame.size else frame.size) for frame in frames]
    layout = Layout(width, height, rasters, [Place(0, 0, width, height)] * len(frames))
    poses = torch.from_numpy(np.stack([frame.pose[:3] for frame in frames])).float()
    rows, columns = working_size((width, height))
    return frame_cameras(frames, layout, poses).resized(columns, rows)


# --------------------------------------------------------------------------------------------------------------- depth


def _depth_files(
    inputs: Inputs, frames: list[Frame], listed: dict[str, str], file: Path, folder: Path | None
) -> list[tuple[Path, str]] | None:
    """(depth file, where it is named) of each view; None where no depth is given."""
    if folder is None:
        if not any(frame.name in listed for frame in frames):
            return None
        found = []
        for frame in frames:
            where = f"--cameras: {frame.where}.depth_file_path"
            if frame.name not in listed:
                raise InputError(f"{where}: missing, but other frames have one; expected it for all, or --depth DIR")
            try:
                path = listed_file(file.parent, listed[frame.name], where)
            except InputError as error:
                raise InputError(str(error).replace("scene.allow_outside=true", "--depth DIR")) from None
            if path is None:
                raise InputError(f"{where}: {listed[frame.name]!r:.80} does not exist")
            found.append((path, where))
        return found
    if not folder.is_dir():
        raise InputError(f"--depth: {folder}: no such folder")
    maps = [path for path in folder.iterdir() if path.suffix.lower() in (".npy", ".png") and path.is_file()]
    maps.sort(key=lambda path: natural_key(path.name))
    by_name = {path.stem: path for path in maps if path.suffix.lower() == ".png"}
    by_name |= {path.stem: path for path in maps if path.suffix.lower() == ".npy"}  # a .png beside it shows the same
    wanted = [PurePosixPath(frame.name).stem for frame in frames]
    if all(name in by_name for name in wanted):
        return [(by_name[name], "--depth") for name in wanted]
    if any(name in by_name for name in wanted) or len(maps) != inputs.before.reader.count:
        lacking = next(name for name in wanted if name not in by_name)
        raise InputError(f"--depth: {folder}: has no {lacking}.npy or {lacking}.png, and {len(maps)} maps in all")
    return [(maps[i], "--depth") for i in inputs.chosen]


def _depth(path: Path, where: str, inputs: Inputs, unit: float) -> Tensor:
    """A depth map [h, w] at the working size, nearest pixel, in the cameras' unit; 0 where there is no surface."""
    values = _npy(path, where) if path.suffix.lower() == ".npy" else _png(path, where)
    with np.errstate(over="ignore"):  # too far is no surface
        values = values.astype(np.float32) * (1.0 if values.dtype.kind == "f" else unit)
    (height, width), (full_width, full_height) = values.shape, inputs.before.size
    if abs(width * full_height / (height * full_width) - 1) > SAME_ASPECT:
        told = f"{width}x{height}, the views are {full_width}x{full_height}"
        raise InputError(f"{where}: {path}: {told}; expected that size, or another of the same aspect")
    known = torch.from_numpy(np.where(np.isfinite(values) & (values > 0), values, 0.0))
    return F.interpolate(known[None, None], working_size(inputs.before.size), mode="nearest-exact")[0, 0]


def _npy(path: Path, where: str) -> np.ndarray:
    """An array [H, W] or [H, W, 1] of numbers, whose header is checked before it is read."""
    try:
        with np.errstate(all="ignore"):  # sizes that overflow are refused by the line below
            values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of a hostile header: OSError, ValueError, TokenError, OverflowError, ...
        raise InputError(f"{where}: {path}: cannot be read as .npy ({one_line(error)})") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu" or values.dtype.itemsize > 8:
        raise InputError(f"{where}: {path}: holds no plain numbers; expected an array [H, W]")
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 1)) or not 0 < values.size <= MAX_PIXELS:
        raise InputError(f"{where}: {path}: an array {list(values.shape)}; expected [H, W]")
    return np.array(values.reshape(values.shape[:2]))


def _png(path: Path, where: str) -> np.ndarray:
    picture = read_image(path)
    if picture.bits != 16:
        raise InputError(f"{where}: {path}: has 8 bits a pixel; expected a depth map of 16")
    if picture.notes or (picture.rgb != picture.rgb[:, :, :1]).any():  # read as colours, these were other numbers
        raise InputError(f"{where}: {path}: is a picture in colours; expected a depth map of one channel, no profile")
    return np.round(picture.rgb[:, :, 0] * 65535.0).astype(np.uint16)
