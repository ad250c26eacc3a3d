"""How well `csd3d process` finds the poses of a film of the procedural world: a plate full of coloured blocks.

python -m benchmarks.process FOLDER [--frames 60] [--width 640] [--height 360]

renders the film (about two seconds a frame), processes it, and prints how the poses differ from the true ones.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from csd3d.world.pairs import to_bytes
from csd3d.world.render import render_arrays
from csd3d.world.scene import PATTERNS, Arrays, Scene, compile_scene
from csd3d.world.shapes import FLOOR

COLOURS, BLOCKS = 12, 45


def clutter(seed: int = 0) -> Arrays:
    """The plate of the world under `BLOCKS` boxes of random place, size, turn and colour."""
    rng = np.random.default_rng(seed)
    plain = compile_scene(Scene("cube", "white", sky="horizon", backdrop="beige", scale=0.3))
    materials = np.repeat(plain.materials[:1], COLOURS + 1, axis=0)
    materials[1:, :3] = rng.uniform(0.05, 0.95, (COLOURS, 3))
    materials[1:, 3:6] = rng.uniform(0.05, 0.95, (COLOURS, 3))
    materials[1:, 6] = rng.integers(1, len(PATTERNS), COLOURS)
    materials[0, 3:7] = (0.2, 0.3, 0.25, PATTERNS.index("dots"))
    rows = [plain.primitives[0]]
    for _ in range(BLOCKS):
        radius, angle, turn = math.sqrt(rng.uniform(0, 1)), *rng.uniform(0, 2 * math.pi, 2)
        half = rng.uniform(0.06, 0.17, 3)
        place = (radius * math.cos(angle), radius * math.sin(angle), FLOOR + half[2] + rng.uniform(0, 0.3))
        c, s = math.cos(turn), math.sin(turn)
        row = [1, rng.integers(1, COLOURS + 1), *place, c, s, 0, -s, c, 0, 0, 0, 1, *half, 0.0]
        rows.append(np.array(row, np.float32))
    return dataclasses.replace(plain, primitives=np.stack(rows), materials=materials)


def camera_rows(count: int, width: int, height: int, turn_deg: float = 360.0, fov_deg: float = 40.0) -> np.ndarray:
    """Cameras [count, 16] on an orbit that rises and falls, looking at the plate; `fov_deg` is vertical."""
    rows = []
    focal = height / 2 / math.tan(math.radians(fov_deg) / 2)
    for i in range(count):
        a = math.radians(turn_deg * i / count)
        e = math.radians(33 + 8 * math.sin(2 * a))
        back = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
        right = np.array([-math.sin(a), math.cos(a), 0.0])
        target = np.array([0.05 * math.cos(3 * a), 0.05 * math.sin(2 * a), -0.65])
        pose = np.stack([right, np.cross(back, right), back, target + 2.7 * back], axis=1)
        rows.append([*pose.ravel(), focal, focal, width / 2, height / 2])
    return np.array(rows, np.float32)


def film(rows: np.ndarray, width: int, height: int, samples: int = 2, seed: int = 0) -> np.ndarray:
    """The clutter through cameras `rows` [F, 16]: [F, height, width, 3] uint8."""
    scene = clutter(seed)
    return np.stack([to_bytes(render_arrays([scene], row[None], width, height, samples).rgb[0]) for row in rows])


def pose_errors(found: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotation errors in degrees and position errors as shares of the true path's size, after a similarity alignment.

    found, true: [B, 4, 4] camera to world. The alignment is Umeyama's (1991) of the positions; the size is the largest
    distance of a true camera from their mean.
    """
    x, y = found[:, :3, 3], true[:, :3, 3]
    x0, y0 = x.mean(0), y.mean(0)
    u, s, vt = np.linalg.svd((y - y0).T @ (x - x0) / len(x))
    sign = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ sign @ vt
    scale = (s * np.diag(sign)).sum() / ((x - x0) ** 2).sum(1).mean()
    moved = scale * (x - x0) @ rotation.T + y0
    size = np.linalg.norm(y - y0, axis=1).max()
    turned = np.einsum("ij,bjk,blk->bil", rotation, found[:, :3, :3], true[:, :3, :3])
    cosine = (np.trace(turned, axis1=1, axis2=2) - 1) / 2
    return np.degrees(np.arccos(cosine.clip(-1, 1))), np.linalg.norm(moved - y, axis=1) / size


def as_poses(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[B, 4, 4] float64 of camera rows [B, 16]."""
    rows = np.asarray(rows, np.float64)
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    poses[:, :3] = rows[:, :12].reshape(-1, 3, 4)
    return poses


def true_errors(dataset: Path, rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """How many of the film's frames are posed in `dataset`, and their `pose_errors`."""
    frames = json.loads((dataset / "transforms.json").read_text())["frames"]
    found = np.array([frame["transform_matrix"] for frame in frames])
    return len(found), *pose_errors(found, as_poses(rows)[[frame["source"] for frame in frames]])


def write_film(path: Path, pictures: np.ndarray) -> None:
    """Pictures [F, H, W, 3] uint8 as a film that looks as sharp as a telephone's."""
    iio.imwrite(path, pictures, fps=15, codec="libx264", output_params=["-crf", "18"], macro_block_size=2)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=360)
    args = parser.parse_args()
    from csd3d.datasets.process import process

    args.folder.mkdir(parents=True)
    rows = camera_rows(args.frames, args.width, args.height)
    write_film(args.folder / "film.mp4", film(rows, args.width, args.height))
    start = time.monotonic()
    process(args.folder / "film.mp4", args.folder / "dataset")
    posed, turned, moved = true_errors(args.folder / "dataset", rows)
    print(f"{posed} of {args.frames} posed in {time.monotonic() - start:.0f} s")
    print(f"rotation: mean {turned.mean():.3f}, at most {turned.max():.3f} degrees")
    print(f"position: mean {100 * moved.mean():.3f}, at most {100 * moved.max():.3f} % of the path's radius")


if __name__ == "__main__":
    main()
