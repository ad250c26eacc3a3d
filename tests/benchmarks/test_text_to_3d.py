"""The rows of the text-to-3D table: each a config that can be run, and another one than its neighbours'."""

import numpy as np
import pytest

from benchmarks import text_to_3d as benchmark
from csd3d.config import defining_values
from csd3d.distillation.named import names_for
from csd3d.run import read


def config_of(plan):
    return read(plan.config, ["prompt=a duck", *plan.changes])


def test_every_method_has_a_config_of_its_own():
    rows = benchmark.plans([*names_for(), "dreamfusion", "nfsd+csd"], diverse=False, ablations=False)
    found = {name: config_of(plan).method.name for name, plan in rows.items()}
    assert found == {name: name for name in names_for()} | {"dreamfusion": "sds", "nfsd+csd": "nfsd+csd"}


def test_each_ablation_changes_csd_alone_and_in_one_way():
    rows = benchmark.plans(["csd"], diverse=False, ablations=True)
    assert list(rows)[1:] == list(benchmark.ABLATIONS)
    configs = [defining_values(config_of(plan)) for plan in rows.values()]
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])
    for config in configs[1:]:
        changed = {key for key in config if config[key] != configs[0].get(key)}
        assert {key.removeprefix("distill.").split(".")[0] for key in changed} in ({"svgd"}, {"noise"}, {"method"})


def test_open_prompts_are_made_by_the_diverse_config():
    for name, plan in benchmark.plans(["csd", "sds"], diverse=True, ablations=False).items():
        config = config_of(plan)
        assert (config.name, config.method.name, config.particles) == ("csd-diverse", name, 4)


def test_a_run_has_the_figures_of_each_row_and_its_grid_every_asset(tmp_path, monkeypatch):
    asked = []

    def finished_run(config, keys, folder, seed):
        asked.append((config.name, keys, seed))
        for asset in "01":
            pictures = folder / "images" / "some-method" / asset
            pictures.mkdir(parents=True)
            for azimuth in ("000", "030"):
                benchmark.iio.imwrite(pictures / f"{azimuth}.png", np.full((8, 8, 3), 200, np.uint8))
        return {"results": {"some": {"fd": len(asked)}}, "judge": "CLIP (world)", "peak_memory_gib": 1.5}

    monkeypatch.setattr(benchmark, "finished_run", finished_run)
    rows = benchmark.plans(["vsd"], diverse=False, ablations=False)
    rows |= {"shared_noise": benchmark.plans(["csd"], False, True)["shared_noise"]}
    run = benchmark.run_one(rows, "a pink snowman, wearing a blue hat", 3, tmp_path, ["export.video_frames=4"])
    assert run["results"] == {"vsd": {"fd": 1}, "shared_noise": {"fd": 2}}
    common = ["prompt=a pink snowman, wearing a blue hat", "compare=[]", "export.video_frames=4"]
    assert asked == [
        ("prolificdreamer.yaml", common, 3),
        ("csd-text-to-3d.yaml", [*common, "distill.noise=shared"], 3),
    ]
    shown = []
    monkeypatch.setattr(benchmark, "save_grid", lambda path, grid: shown.extend(grid))
    benchmark.grid([run], tmp_path / "grid.png")
    assert [(row.label, len(row.images)) for row in shown] == [("VSD (ProlificDreamer)", 2), ("Shared noise", 2)]


@pytest.mark.parametrize(("name", "label"), [("csd", "CSD"), ("dreamfusion", "SDS, DreamFusion's settings")])
def test_rows_are_called_what_they_are(name, label):
    assert benchmark.label(name) == label
