"""A tiny capture written to a folder, for tests to load or to spoil."""

import copy
import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

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


def save(file: Path, seed: int) -> None:
    """Writes a picture as a JPEG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(file, quality=100)


def polycam(folder: Path, prefix: str = "", shift: float = 0.0) -> Path:
    """Writes a ring of photos as Polycam's raw export, the poses moved by `shift`."""
    for i, pose in enumerate(ring().camera_to_world.double().numpy()):
        said = {f"t_{r}{c}": pose[r, c] + (shift if c == 3 else 0) for r in range(3) for c in range(4)}
        said |= {"fx": FOCAL, "fy": FOCAL, "cx": 5.5, "cy": 4.5, "width": WIDTH, "height": HEIGHT, "blur_score": 1.0}
        file = folder / f"keyframes/{prefix}cameras/{1000 + i}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(said))
        save(folder / f"keyframes/{prefix}images/{1000 + i}.jpg", i)
    return folder


def record3d(folder: Path) -> Path:
    """Writes a ring of photos as Record3D's folder."""
    poses = ring().camera_to_world.double().numpy()
    rows = [[*Rotation.from_matrix(pose[:, :3]).as_quat(), *pose[:, 3]] for pose in poses]
    said = {"K": [FOCAL, 0, 0, 0, FOCAL, 0, 5.5, 4.5, 1], "w": WIDTH, "h": HEIGHT, "fps": 30, "poses": rows}
    folder.mkdir(exist_ok=True)
    (folder / "metadata").write_text(json.dumps(said))
    for i in range(len(rows)):
        save(folder / f"rgbd/{i}.jpg", i)
    return folder
