import shlex

import imageio.v3 as iio
import numpy as np
import pytest

from benchmarks.golden import ROOT, changed, differences, figures, frames_of, read_jobs
from csd3d.run import read

JOBS = read_jobs(ROOT / "benchmarks" / "golden.yaml")


@pytest.mark.parametrize("name", JOBS)
def test_keys_of_every_job_exist(name):
    config, *keys = shlex.split(JOBS[name])
    read(ROOT / "configs" / f"{config}.yaml", keys)


def test_every_config_has_a_job_or_is_a_method_that_another_compares():
    compared = {"sds", "fsd", "sdi", "lmc-sds", "sds-bridge", "classifier", "ism", "esd", "rsd", "particle-guidance"}
    used = {shlex.split(job)[0] for job in JOBS.values()}
    assert used | compared == {path.stem for path in (ROOT / "configs").glob("*.yaml")}


def test_figures_leave_out_times_and_memory_at_any_depth():
    metrics = {"results": {"csd": {"psnr": 1.5, "seconds": 3}}, "seconds": {"edit": 1}, "list": [{"a": 1}, 2]}
    assert figures(metrics | {"peak_memory_gib": 1.0}) == {"results.csd.psnr": 1.5, "list.0.a": 1, "list.1": 2}


def test_figures_may_differ_by_a_millionth():
    assert changed({"a": 1.0, "b": float("nan")}, {"a": 1 + 5e-7, "b": float("nan")}) == []
    assert changed({"a": 1.0, "b": 2}, {"a": 1 + 5e-6, "c": "x"}) == [
        "a: 1.0 -> 1.000005",
        "b: 2 -> none",
        "c: none -> x",
    ]


def test_one_changed_value_of_one_pixel_is_told_with_its_size(tmp_path):
    pixels, results = np.full((20, 30, 3), 100, np.uint8), []
    for run, value in (("before", 100), ("now", 103)):
        pixels[4, 5, 1] = value
        (tmp_path / run).mkdir()
        iio.imwrite(tmp_path / run / "a.png", pixels)
        results.append({"rc": 0, "pictures": {"a.png": frames_of(tmp_path / run / "a.png")}})
    runs = (tmp_path / "before", tmp_path / "now")
    assert differences(results[0], results[0], runs) == []
    assert differences(*results, runs) == ["a.png: pixels differ, greatest difference of pixels 3"]
    (line,) = differences(*results, (tmp_path / "gone", runs[1]))
    assert "thumbnail" in line


def test_missing_new_and_failed_are_told():
    runs = (ROOT, ROOT)
    before = {"rc": 0, "meshes": {"a.glb": {"vertices": 3}, "b.glb": {"vertices": 3}}}
    now = {"rc": 0, "meshes": {"a.glb": {"vertices": 4}, "c.glb": {"vertices": 3}}}
    assert sorted(differences(before, now, runs)) == ["a.glb: vertices: 3 -> 4", "b.glb: missing", "c.glb: new"]
    assert differences({"rc": 0}, {"rc": 2, "error": "error: x"}, runs) == ["rc: 0 -> 2", "error: None -> error: x"]
