"""Loading a capture: pictures, cameras, split and box, in a normalised frame.

Frames of reference:
    own          the capture's own, before nerfstudio's applied_transform (if it has one)
    normalised   z up, centred, cameras within [-1, 1]^3: x = scale (R x_own + t), [R | t] = Capture.transform
"""

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from csd3d import fingerprint
from csd3d.cameras import Cameras
from csd3d.datasets.framing import Layout, frame_cameras, lay_out
from csd3d.datasets.images import BACKGROUNDS, MAX_PIXELS, decode, face, read_mask
from csd3d.datasets.listing import Frame, Listing, Points, read_listing
from csd3d.datasets.normalise import (
    camera_scale,
    looks_inward,
    move_box,
    move_poses,
    normalising_transform,
    warn_of_one_place,
)
from csd3d.datasets.reading import shown
from csd3d.datasets.splat_files import moved as move_splats
from csd3d.datasets.splat_files import read_splats
from csd3d.errors import InputError
from csd3d.memory import size_text
from csd3d.schema import Chosen, OneOf, path_key
from custom_kernels.splats import Splats

log = logging.getLogger("csd3d")

AnyReader, AUTO = Annotated[Chosen, OneOf("reader", also=("auto",))], Chosen("auto")
FARTHEST = 1e4  # sizes of the box between it and the nearest camera
FOR_MESSAGES = ("Frame.where", "Frame.name", "Listing.folder", "Listing.file", "Listing.reader")  # not what it is
WITHOUT = (*FOR_MESSAGES, "Listing.splats")  # which has a fingerprint of its own
CHOICES = {
    "orientation": ("auto", "up", "none"),
    "centre": ("auto", "poses", "focus", "none"),
    "unbounded": ("auto", "true", "false"),
    "background": tuple(BACKGROUNDS),
}


@dataclass
class SceneConfig:
    """Which capture to load, and how; "auto" is explained in `load_capture`."""

    path: str = path_key()  # a capture's folder, or its JSON file
    reader: AnyReader = AUTO  # auto | the name of a reader | {type: NAME, and keys of that reader}
    orientation: str = "auto"  # up: turn the mean up direction of the cameras to +z; or auto, none
    centre: str = "auto"  # origin: poses (mean camera), focus (the point the cameras look at); or auto, none
    auto_scale: bool = True  # scale the scene so that all cameras are in [-1, 1]^3
    unbounded: str = "auto"  # whether the scene reaches beyond its box: auto | true | false
    downscale: float = 1.0  # factor by which pictures are made smaller
    holdout_every: int = 8  # hold out every n-th frame for evaluation, if the capture has no split; 0: none
    background: str = "white"  # colour behind transparent pictures: white | black
    max_pixels: int = MAX_PIXELS  # most pixels of one picture file
    max_memory_gib: float = 4.0  # most memory for all loaded pictures
    allow_outside: bool = False  # read listed files outside the capture's folder, or behind links that lead out of it

    def __post_init__(self):
        self.unbounded = str(self.unbounded).lower()  # YAML's true and false
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise InputError(f"scene.{key}: {getattr(self, key)!r}; expected one of {', '.join(choices)}")
        if not 1 <= self.downscale < math.inf:
            raise InputError(f"scene.downscale: {self.downscale}; expected a factor of at least 1")
        if self.holdout_every < 0 or self.holdout_every == 1:
            raise InputError(f"scene.holdout_every: {self.holdout_every}; expected 0 (none) or at least 2")
        if self.max_pixels < 1 or not self.max_memory_gib > 0:
            raise InputError("scene.max_pixels, scene.max_memory_gib: expected positive numbers")


@dataclass
class Capture:
    """A posed capture in its normalised frame (module docstring); B frames on one raster.

    Pictures of several sizes are padded to the raster; `masks` is False in the padding, and `places` says where each
    picture is.
    """

    cameras: Cameras
    images: Tensor  # [B, H, W, 3] float32 in 0..1, alpha composited
    masks: Tensor | None  # [B, H, W] bool, True = use this pixel
    names: list[str]
    train: Tensor  # [Nt] long
    test: Tensor  # [Ne] long
    transform: Tensor  # [4, 4] float64, own -> normalised before scaling: rotation and translation
    scale: float
    aabb: Tensor  # [6] x0 y0 z0 x1 y1 z1; of an unbounded capture the part that is not contracted
    unbounded: bool
    folder: Path
    composited: bool = False  # pictures had alpha and show SceneConfig.background behind the scene
    points: Points | None = None  # the capture's sparse points, if any, in the normalised frame
    splats: Splats | None = None  # the splats that the scene already is, if it is, in the normalised frame
    reader: str = ""  # title of the reader that read it
    places: Tensor | None = None  # [B, 4] long: left, top, width, height of each picture; None: all fill the raster
    fingerprint: str = ""  # of what was read of it: pictures, masks, poses, and what a reader found

    def map_back(self, points: Tensor) -> Tensor:
        """Return points [..., 3] of the normalised frame in the capture's own frame: R^T (x / scale - t), as float64.

        Coordinates such as UTM's, of millions of metres, keep their millimetres only in float64.
        """
        transform = self.transform.to(points.device)
        return (points.double() / self.scale - transform[:3, 3]) @ transform[:3, :3]

    def cropped(self, images: Tensor, indices: Tensor) -> list[Tensor]:
        """Pictures [N, H, W, ...] of the frames `indices` [N], each without its padding."""
        if self.places is None:
            return list(images)
        windows = [_window(place) for place in self.places[indices].tolist()]
        return [image[window] for image, window in zip(images, windows, strict=True)]

    def padding(self, indices: Tensor) -> Tensor:
        """[N, H, W] bool, True where the rasters of the frames `indices` [N] hold no picture."""
        found = torch.zeros(len(indices), *self.images.shape[1:3], dtype=torch.bool)
        for i, place in enumerate(() if self.places is None else self.places[indices].tolist()):
            found[i] = True
            found[i][_window(place)] = False
        return found

    def completed(self, render: Callable[[Tensor], Tensor]) -> "Capture":
        """A capture whose padding shows `render(indices [1])` [1, H, W, 3], so that an editor sees no frame."""
        if self.places is None:
            return self
        images = self.images.clone()
        for i in range(len(images)):
            index = torch.tensor([i])
            hidden = self.padding(index)[0]
            if hidden.any():
                images[i][hidden] = render(index)[0].clamp(0, 1).to(images)[hidden]
        return replace(self, images=images)


def _window(place: list[int]) -> tuple[slice, slice]:
    left, top, width, height = place
    return slice(top, top + height), slice(left, left + width)


def load_capture(config: SceneConfig) -> Capture:
    """Read, check and normalise a capture. Raises InputError, one line naming file and key.

    reader "auto": the one reader that recognises `path`.  orientation, centre "auto": captures that their reader calls
    bounded keep their frame (Blender's layout, or a JSON with "aabb" or an "aabb_scale" up to 1); others use "up", and
    "focus" if their cameras look inward, else "poses".  unbounded "auto": true unless the reader calls it bounded.
    """
    listing = read_listing(_path(config.path), config.reader.thing, config.allow_outside)
    frames = _present(listing)
    train, test = _split(frames, config.holdout_every, listing)
    poses = np.stack([frame.pose for frame in frames])
    warn_of_one_place(poses[train.numpy()], str(listing.file))
    _check_box(listing, poses)
    transform, scale = _normalisation(poses, listing, config)
    moved = torch.from_numpy(move_poses(poses, transform, scale)[:, :3]).float()
    layout = lay_out(frames, config.max_pixels, config.downscale)
    cameras = frame_cameras(frames, layout, moved)
    images, masks, composited = _pixels(frames, layout, config)
    own, own_scale = _own_transform(listing, transform, scale)
    return Capture(
        cameras=cameras,
        images=images,
        masks=masks,
        names=[frame.name for frame in frames],
        train=train,
        test=test,
        transform=torch.from_numpy(own),
        scale=own_scale,
        aabb=_box(listing, transform, scale, config),
        unbounded=_is_unbounded(listing, config),
        folder=listing.folder,
        composited=composited,
        points=listing.points and _moved(listing.points, transform, scale),
        splats=None if listing.splats is None else _own_splats(listing.splats, torch.from_numpy(own), own_scale),
        reader=listing.reader,
        places=torch.tensor([astuple(place) for place in layout.places]) if layout.padded else None,
        fingerprint=_fingerprint(listing),
    )


def _path(value: str) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"scene.path: {shown(value)}; expected a capture's folder or its JSON file")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # ~NAME of an unknown user
        raise InputError(f"scene.path: {shown(value)}: {error}") from error


def _present(listing: Listing) -> list[Frame]:
    """The frames whose picture (and mask, if listed) exists; one warning counts the others."""
    frames = [frame for frame in listing.frames if frame.file is not None]
    missing = [frame for frame in listing.frames if frame.file is None]
    first = shown(missing[0].name) if missing else ""
    if not frames:
        raise InputError(f"{missing[0].where}.file_path: {first} does not exist, nor does any other picture")
    if missing:
        counts = f"{len(missing)} of {len(listing.frames)}"
        log.warning("%s: %s listed frames skipped: no such file (first: %s)", listing.file, counts, first)
    return frames


def _split(frames: list[Frame], holdout_every: int, listing: Listing) -> tuple[Tensor, Tensor]:
    """Indices (train, test) of the capture's own split if it has one, else every `holdout_every`-th frame is test.

    A split whose test pictures are all missing, as where only the training views were rendered, counts as none.
    """
    wanted, found = (any(frame.split == "test" for frame in some) for some in (listing.frames, frames))
    if any(frame.split is not None for frame in frames) and wanted <= found:
        held_out = torch.tensor([frame.split == "test" for frame in frames])
    else:
        every = holdout_every if len({frame.file for frame in frames}) > 1 else 0
        numbers = {file: i for i, file in enumerate(dict.fromkeys(frame.file for frame in frames))}
        held_out = torch.tensor([every > 0 and numbers[frame.file] % every == 0 for frame in frames])
        if wanted > found:
            log.warning("%s: no held-out picture is there; every %d-th frame is held out", listing.file, every)
    train, test = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    if len(train) == 0:
        raise InputError(f"{listing.file}: no frame is left to train on; expected some outside the held-out split")
    if len(test) == 0:
        log.warning("%s: no frame is held out, so the reconstruction can't be judged on unseen views", listing.file)
    return train, test


def _pixels(frames: list[Frame], layout: Layout, config: SceneConfig) -> tuple[Tensor, Tensor | None, bool]:
    """Images [B, H, W, 3], masks [B, H, W] or None, and whether any picture had alpha. Padding shows the background.

    Raises InputError before allocating more than `max_memory_gib`.
    """
    shape = (len(frames), layout.height, layout.width)
    with_masks = layout.padded or any(frame.mask is not None for frame in frames)
    needed, allowed = math.prod(shape) * (13 if with_masks else 12), config.max_memory_gib * 2**30
    if needed > allowed:
        need = f"{len(frames)} pictures of {layout.width}x{layout.height} take {size_text(needed)}"
        raise InputError(
            f"scene.max_memory_gib: {need}, the limit is {size_text(allowed)}; raise it or scene.downscale"
        )
    images = torch.full((*shape, 3), BACKGROUNDS[config.background])
    masks = torch.zeros(shape, dtype=torch.bool) if with_masks else None
    composited = False
    rows = enumerate(zip(frames, layout.rasters, layout.places, strict=True))
    for file, shown_by in itertools.groupby(rows, key=lambda row: row[1][0].file):  # a panorama is decoded once
        decoded = None
        for i, (frame, raster, place) in shown_by:
            decoded = decoded or decode(file, config.background, raster.turned)
            full, size = (raster.width, raster.height), (place.width, place.height)
            window = _window(astuple(place))
            images[i][window] = torch.from_numpy(face(decoded[0], frame.cut, full, size))
            composited |= decoded[1]
            if frame.mask is not None:
                masks[i][window] = torch.from_numpy(read_mask(frame.mask, size, frame.cut, full))
            elif with_masks:
                masks[i][window] = True
    return images, masks, composited


def _is_unbounded(listing: Listing, config: SceneConfig) -> bool:
    return config.unbounded == "true" or (config.unbounded == "auto" and not listing.bounded)


def _check_box(listing: Listing, poses: np.ndarray) -> None:
    """Raise InputError for a scene's box so far from all cameras that they cannot have photographed it."""
    if listing.box is None or not listing.bounded:
        return
    low, high = listing.box
    away = (
        np.abs(poses[:, :3, 3] - poses[:, :3, 3].clip(low, high)).max(axis=1).min() / np.ptp(listing.box, axis=0).max()
    )
    if away > FARTHEST:
        raise InputError(
            f"{listing.file}: aabb: the box is {away:.3g} times its size away from the nearest camera; "
            "expected the box of what the cameras see, in the coordinates of their positions"
        )


def _normalisation(poses: np.ndarray, listing: Listing, config: SceneConfig) -> tuple[np.ndarray, float]:
    """Transform [4, 4] and scale from the frame of the listed poses to the normalised frame."""
    orientation, centre = config.orientation, config.centre
    if orientation == "auto":
        orientation = "none" if listing.bounded else "up"
    if centre == "auto":
        centre = "none" if listing.bounded else "focus" if looks_inward(poses) else "poses"
    transform = normalising_transform(poses, orientation, centre)
    if listing.bounded and config.centre == "auto":
        transform[:3, 3] -= transform[:3, :3] @ _far_centre(listing.box)
    return transform, camera_scale(poses, transform) if config.auto_scale else 1.0


def _far_centre(box: np.ndarray | None) -> np.ndarray:
    """The centre [3] of a box [2, 3] that is far from the origin for its size, as in UTM coordinates, else zero.

    float32 positions in a frame that is not centred would be too coarse for such a scene.
    """
    if box is None or np.abs(box.mean(axis=0)).max() <= 100 * np.ptp(box, axis=0).max():
        return np.zeros(3)
    return box.mean(axis=0)


def _box(listing: Listing, transform: np.ndarray, scale: float, config: SceneConfig) -> Tensor:
    """aabb [6] in the normalised frame: the reader's box; [-1, 1]^3 without one or for unbounded captures."""
    if _is_unbounded(listing, config) or listing.box is None:
        box = np.array([[-1.0] * 3, [1.0] * 3])
    else:
        box = move_box(listing.box, transform, scale)
    return torch.from_numpy(box).float().reshape(6)


def _own_splats(file: Path, transform: Tensor, scale: float) -> Splats:
    """The splats of a file in the capture's own frame, moved to the normalised frame."""
    shift = scale * transform[:3, 3]
    return move_splats(read_splats(file, "scene.path"), transform[:3, :3], scale, shift)


def _fingerprint(listing: Listing) -> str:
    """Of all that was read; without splats it is what it was before there were any."""
    found = fingerprint.of_value(listing, without=WITHOUT)
    return found if listing.splats is None else fingerprint.of_value((found, listing.splats))


def _moved(points: Points, transform: np.ndarray, scale: float) -> Points:
    """Points of the poses' frame, moved to the normalised frame."""
    return Points(scale * (points.xyz @ transform[:3, :3].T + transform[:3, 3]), points.rgb)


def _own_transform(listing: Listing, transform: np.ndarray, scale: float) -> tuple[np.ndarray, float]:
    """Transform and scale from the capture's own frame, where the listed poses are x_listed = a (A x_own + b).

    s (R x_listed + t) = s a (R A x_own + R b + t / a). (nerfstudio leaves t undivided, which is right only for a = 1.)
    """
    own = transform @ listing.applied_transform
    own[:3, 3] += transform[:3, 3] * (1 / listing.applied_scale - 1)
    return own, scale * listing.applied_scale
