"""Write scenes of the world as captures, and read their scene back, to know the right answers of an edit.

`python -m csd3d.world.dataset FOLDER --scene '{"kind": "mug", "colour": "yellow"}'` writes a nerfstudio-style
transforms.json with its pictures, and world.json, the scene in words.
"""

import dataclasses
import json
import math
import random
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from torch import Tensor

from csd3d.arguments import Parser
from csd3d.errors import InputError
from csd3d.world.language import find_edit
from csd3d.world.pairs import FOV_DEG, sample_scene, to_bytes
from csd3d.world.render import Pictures, camera_row, render
from csd3d.world.scene import Scene

WORLD_FILE = "world.json"
BOX = [[-1.3, -1.3, -1.0], [1.3, 1.3, 1.3]]
DISTANCE = 4.0


def capture_angles(count: int, seed: int) -> list[tuple[float, float]]:
    """(azimuth, elevation) in degrees, evenly over elevations 4–56° by a golden-angle spiral, randomly turned."""
    turn = random.Random(seed).uniform(0, 360)
    low, high = math.sin(math.radians(4)), math.sin(math.radians(56))
    heights = [low + (high - low) * (i + 0.5) / count for i in range(count)]
    return [((turn + 137.50776 * i) % 360, math.degrees(math.asin(h))) for i, h in enumerate(heights)]


def write_capture(folder: Path, scene: Scene, train: int = 36, test: int = 12, size: int = 128, seed: int = 0) -> None:
    """Render `train` + `test` views of `scene` and write them as a capture with a split and a box."""
    angles = capture_angles(train + test, seed)
    held_out = {round((i + 0.5) * (train + test) / test) for i in range(test)}
    rows = np.stack([camera_row(azimuth, elevation, DISTANCE, FOV_DEG, size) for azimuth, elevation in angles])
    pictures = to_bytes(render([scene] * len(rows), rows, size, size, samples=3).rgb)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    frames = []
    for i, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        name = f"images/{i:03}.png"
        iio.imwrite(folder / name, picture)
        pose = [*row[:12].reshape(3, 4).astype(float).tolist(), [0.0, 0.0, 0.0, 1.0]]
        frames.append({"file_path": name, "transform_matrix": pose, "split": "test" if i in held_out else "train"})
    focal, centre = float(rows[0, 12]), size / 2
    intrinsics = {"fl_x": focal, "fl_y": focal, "cx": centre, "cy": centre, "w": size, "h": size}
    transforms = {"camera_model": "PINHOLE", **intrinsics, "aabb": BOX, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(transforms, indent=1))
    (folder / WORLD_FILE).write_text(json.dumps(dataclasses.asdict(scene), indent=1))


def read_scene(folder: Path) -> Scene | None:
    """The scene that a capture was rendered from, or None for other captures.

    Raises InputError if the file exists but does not describe a scene.
    """
    path = folder / WORLD_FILE
    if not path.exists():
        return None
    try:
        if not path.is_file() or path.stat().st_size > 1 << 16:
            raise ValueError("is no small file")
        return Scene(**json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise InputError(f"{path}: {error}; write the capture again with python -m csd3d.world.dataset") from None


def true_answers(scene: Scene, instruction: str) -> tuple[Scene, ...]:
    """The edited scenes that fulfil `instruction`; empty if the world does not know these words."""
    edit = find_edit(scene, instruction)
    return edit.answers if edit else ()


def render_views(scene: Scene, poses: Tensor, intrinsics: Tensor, width: int, height: int) -> Pictures:
    """Render the scene by cameras with `poses` [B,3,4] (world frame) and `intrinsics` [B,4] = fx, fy, cx, cy."""
    rows = np.concatenate([poses.reshape(-1, 12).cpu().numpy(), intrinsics.cpu().numpy()], axis=1)
    return render([scene] * len(rows), rows.astype(np.float32), width, height, samples=3)


def main() -> None:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scene", type=json.loads, help="JSON of csd3d.world.scene.Scene; a random one if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128)
    args = parser.parse_all()
    scene = Scene(**args.scene) if args.scene else sample_scene(random.Random(args.seed))
    write_capture(args.folder, scene, size=args.size, seed=args.seed)
    print(f"{args.folder}: {scene}")


if __name__ == "__main__":
    main()
