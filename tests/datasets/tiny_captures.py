"""A tiny capture written to a folder, for tests to load or to spoil."""

import copy
import json
from pathlib import Path

import numpy as np
from PIL import Image

from csd3d.cameras import Cameras, orbit

WIDTH, HEIGHT, FOCAL = 12, 8, 10.0


def ring(count: int = 9, radius: float = 4.0) -> Cameras:
    return orbit(count, radius, 30.0, 2 * np.degrees(np.arctan(HEIGHT / 2 / FOCAL)), WIDTH, HEIGHT)


def transforms(cameras: Cameras | None = None, **extra) -> dict:
    """A valid transforms.json of a ring of cameras; keyword arguments are added to it."""
    poses = (ring() if cameras is None else cameras).camera_to_world.tolist()
    frames = [
        {"file_path": f"images/{i:02d}.png", "transform_matrix": [*pose, [0, 0, 0, 1]]} for i, pose in enumerate(poses)
    ]
    return {"fl_x": FOCAL, "fl_y": FOCAL, "w": WIDTH, "h": HEIGHT, "frames": frames} | copy.deepcopy(extra)


def picture(seed: int, channels: int = 3, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_capture(folder: Path, meta: dict, name: str = "transforms.json", pictures: bool = True) -> Path:
    """Writes the JSON and one RGB picture for each of its frames."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(meta))
    for i, frame in enumerate(meta["frames"] if pictures else []):
        file = folder / frame["file_path"]
        file = file if file.suffix else file.with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(file)
    return folder
