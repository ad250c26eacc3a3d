"""A data set of coloured discs in the format of the world's pairs, small enough to train on in seconds."""

import json

import numpy as np

from csd3d.world.scene import COLOURS

SIZE = 32


def write_discs(folder, count=24, seed=0):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    mask = np.stack([(x - a) ** 2 + (y - b) ** 2 < 64 for a, b in rng.uniform(10, 22, (count, 2))])
    names = [rng.choice(list(COLOURS), 2, replace=False) for _ in range(count)]
    for k, file in enumerate(("source", "target")):
        colour = np.array([COLOURS[pair[k]] for pair in names])[:, None, None]
        (255 * np.where(mask[..., None], colour, 0.4)).astype(np.uint8).tofile(folder / f"{file}.u8")
    mask.astype(np.uint8).tofile(folder / "mask.u8")
    records = [
        {
            "instruction": f"make it {b}",
            "caption": f"a {a} disc",
            "target_caption": f"a {b} disc",
            "family": "recolour" if i % 3 else "paint",
            "ambiguous": False,
            "changes": True,
        }
        for i, (a, b) in enumerate(names)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "meta.json").write_text(json.dumps({"count": count, "size": SIZE, "seed": seed}))
    return folder
