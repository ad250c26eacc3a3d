import itertools
import json
from collections import Counter
from pathlib import Path
from xml.dom import minidom

import pytest
import torch

from benchmarks import flame, scaling, speed, speed_jobs
from csd3d.run import read
from custom_kernels import hashgrid


def test_keys_of_every_job_exist(tmp_path):
    for config, *keys in speed_jobs.JOBS.values():
        read(speed_jobs.ROOT / "configs" / f"{config}.yaml", keys)
    assert speed_jobs.LIMITS.keys() == speed_jobs.JOBS.keys()


def test_jobs_are_judged_by_their_limits(monkeypatch, tmp_path):
    def run_child(command):
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir()
        assert f"scene.path={tmp_path}" in command
        seconds = {"reconstruct": 50.0, "total": 70.0}
        metrics = {"seconds": seconds, "reconstruction": {"psnr": 26.0}, "results": {"csd_edit": {}}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return {"wall_seconds": 80.0, "cpu_seconds": 90.0, "peak_gib": 1.0}, b""

    monkeypatch.setattr(speed_jobs, "run_child", run_child)
    found = speed_jobs.run_jobs(["fox_270x480", "fox_135x240"], tmp_path, tmp_path)
    assert list(found) == ["fox_135x240", "fox_270x480"]
    assert found["fox_135x240"]["reached"] == {"reconstruct": True, "held_out_psnr": False}
    assert speed_jobs.run_jobs(["fox_270x480"], None, tmp_path) == {"fox_270x480": None}


def test_nerfstudio_s_encoding_interpolates_its_hashed_corners():
    generator = torch.Generator().manual_seed(0)
    points, entries = torch.rand(5, 3, generator=generator), 64
    table, sizes = torch.randn(2 * entries, 2, generator=generator), torch.tensor([4.0, 9.0])
    found = speed.nerfstudio_encode(points, table, sizes, entries)
    for point, row in zip(points, found, strict=True):
        for level, size in enumerate(sizes):
            wanted, cell = torch.zeros(2), (point * size).floor().long()
            for corner in itertools.product((0, 1), repeat=3):
                at = cell + torch.tensor(corner)
                share = (1 - (point * size - at).abs()).prod()
                hashed = 0
                for a, prime in zip(at.tolist(), hashgrid.PRIMES, strict=True):
                    hashed ^= a * prime
                wanted += share * table[level * entries + hashed % entries]
            torch.testing.assert_close(row[2 * level : 2 * level + 2], wanted)


def test_bars_are_told_apart(capsys):
    results = {
        "ratios_against": "c559e0b",
        "view_ratio": 4.0,
        "reconstruct_step_ratio": 2.0,
        "splats": {"peak_gib": 0.5},
    }
    speed.print_bars(results)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines["view_ratio"].endswith("yes")
    assert lines["splats.peak_gib"].endswith("yes")
    assert lines["reconstruct_step_ratio"].endswith("NO")
    assert "null" in lines["field_share_of_peak_bf16"]


def test_a_child_s_memory_and_output_are_its_own():
    ballast = torch.ones(2**26)  # 256 MiB, which the child must not be charged for
    figures, printed = speed_jobs.run_child(["sh", "-c", "sleep 0.5; echo done"])
    assert printed == b"done\n"
    assert figures["peak_gib"] < 0.1 < ballast.nbytes / 2**30
    with pytest.raises(RuntimeError, match="ended with 3"):
        speed_jobs.run_child(["sh", "-c", "exit 3"])


def test_curves_and_flames_are_svg(tmp_path):
    svg = scaling.plot({name: {10: 1.0, 100: 9.0, 1000: 95.0} for name in scaling.TITLES})
    assert len(minidom.parseString(svg).getElementsByTagName("polyline")) == len(scaling.TITLES)
    raw = tmp_path / "raw"
    raw.write_text("<module> (launch.py:1);render (a/render.py:4);inner (a/b.py:7) 30\nrender (a/render.py:4) 70\n")
    stacks = flame.read(raw)
    assert stacks == Counter({("render (render)", "inner (b)"): 30, ("render (render)",): 70})
    titles = [title.firstChild.data for title in minidom.parseString(flame.draw(stacks)).getElementsByTagName("title")]
    assert titles == ["render (render): 100.0%", "inner (b): 30.0%"]
