"""The benchmark of assets: its rows are jobs, its bounds are bounds, and what is made is not made again."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.assets import __main__ as command
from benchmarks.assets import work
from benchmarks.assets.__main__ import changed, main
from benchmarks.assets.priors import different
from benchmarks.assets.rows import SETS, chosen, config_of, read_set
from benchmarks.assets.table import tables
from benchmarks.assets.work import ask
from csd3d.cameras import Cameras, look_at, on_sphere
from csd3d.distillation.method import Query
from csd3d.distillation.named import names_for
from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior
from csd3d.world.objects import WorldObjects
from csd3d.world.prompts import open_attributes, read_prompt

STRIPED = "a red chair with yellow stripes"


@pytest.mark.parametrize("name", SETS)
def test_every_row_is_a_job_and_every_table_has_its_bounds(name):
    of = read_set(name)
    assert {f"{prior}/{of.against}" for prior in ("network", "exact", "exact_camera", "truth")} <= of.rows.keys()
    assert len(of.prompts) >= 6
    assert len(of.seeds) >= 3
    for prompt in of.prompts:
        left = [key for key in open_attributes(read_prompt(prompt)) if key != "backdrop"]
        assert bool(left) == (name == "diverse")
    identities = {json.dumps(row.as_keys, sort_keys=True) for row in of.rows.values()}
    assert len(identities) == len(of.rows)
    for row in (row for row in of.rows.values() if row.prior in ("network", "exact_camera")):
        config = config_of(row.as_keys, of.prompts[0], 0)
        assert (config.prompt, config.particles) == (of.prompts[0], 4 if name == "diverse" else 1)
        assert len(config.runs) == 1


def test_every_method_has_a_row():
    configs = [
        config_of(row.as_keys, STRIPED, 0) for name in ("methods", "diverse") for row in read_set(name).rows.values()
    ]
    assert set(names_for()) <= {name for config in configs for name in config.runs}


def test_a_row_keeps_what_it_does_not_change():
    rows = read_set("schedules").rows
    shipped, low = (config_of(rows[f"exact/{name}"].as_keys, STRIPED, 0) for name in ("shipped", "low"))
    assert low.distill == replace(shipped.distill, t_max=0.6, t_min=0.02)
    assert (low.distill.steps, low.distill.schedule) == (300, "annealed")
    assert replace(low, distill=shipped.distill) == shipped
    assert replace(shipped.prompts, camera="auto") == config_of(rows["network/low"].as_keys, STRIPED, 0).prompts
    fine = config_of(rows["network/fine"].as_keys, STRIPED, 0).asset
    assert fine.representation.thing.field.levels == 6
    both = config_of(read_set("methods").rows["network/vsd_csd"].as_keys, STRIPED, 0)
    assert both.distill.svgd.bandwidth == "model"
    assert both.distill.guidance_scale == 2


def test_rows_are_chosen_by_patterns_and_changed_by_keys():
    rows = read_set("methods").rows
    assert list(chosen(rows, ["csd"])) == ["network/csd", "exact/csd", "exact_camera/csd"]
    assert set(chosen(rows, ["truth/*", "network/v*"])) == {"truth/sds", "network/vsd", "network/vsd_csd"}
    with pytest.raises(InputError, match=r"--rows: 'dds' fits no row; there are network/sds"):
        chosen(rows, ["dds"])
    row = changed(rows["truth/sds"], ["distill.t_max=0.6", "views_per_step=2"])
    config = config_of(row.as_keys, STRIPED, 3)
    assert (config.distill.t_max, config.views_per_step, config.seed) == (0.6, 2, 3)
    assert config.prior.model == "world_truth:exact"
    words, kept = (config_of(rows[f"{prior}/sds"].as_keys, STRIPED, 0) for prior in ("exact", "exact_camera"))
    assert list(kept.prompts.backdrops) == ["grey", "mint"]
    assert (words.prompts.camera, kept.prompts.camera) == (False, True)
    assert words.prior.model == kept.prior.model == "world:exact"
    with pytest.raises(InputError, match=r"distill\.t_top"):
        config_of(changed(row, ["distill.t_top=1"]).as_keys, STRIPED, 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["table", "--keys", "seed=1"], "no lines yet; python -m benchmarks.assets run makes them"),
        (["table", "--rows", "sds"], "--rows, --prompts and --seeds are of run"),
        (["run", "--rows", "dds"], "'dds' fits no row"),
        (["run", "--set", "all"], "invalid choice"),
        (
            ["run", "--prompts", "a duck", "a dragon"],
            "--prompts: prompt 'a dragon': not in the world's words",
        ),
    ],
)
def test_bad_words_are_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "do_shares", None)  # it is told before any work
    try:
        code = main([*words, "--work", str(tmp_path)])
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr().err
    assert code == 2
    assert said in told
    assert told.count("\n") == 1


@pytest.fixture(scope="module")
def truth():
    read_rows = read_set("methods").rows["truth/sds"].as_keys
    config_of(read_rows, STRIPED, 0)  # registers the priors
    return load_prior(PriorConfig(model="world_truth:exact", device="cpu"), require="text")


def query(prompts, assets=1, t=300, seed=0):
    """Two cameras, each seen by all assets."""
    places = on_sphere(torch.tensor([0.3, 2.0]), torch.tensor([0.4, 0.7])) * 4
    pose = look_at(places, torch.tensor([[0.03, 0.0, 0.0], [0.0, -0.02, 0.01]])).flatten(1).repeat(assets, 1)
    z_t = torch.randn(2 * assets, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    return Query(z_t, t, tuple(prompts * assets), pose=pose)


def clean(prior, one, eps):
    """What a prediction says that the picture is."""
    alpha_bar = prior.alphas_cumprod[one.t]
    return (one.z_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


def test_the_prior_of_true_pictures_says_the_true_picture_at_each_camera(truth):
    words = [f"{STRIPED}, mint background, {view} view" for view in ("front", "back")]
    text, null = query(words), query(["", ""])
    before = truth.unet_evaluations
    eps = truth.predict({"null": null, "text": text})
    assert truth.unet_evaluations - before == 4
    objects = WorldObjects(STRIPED)
    (thing,) = different(objects, 1)
    focal = torch.full((2,), 64 / math.tan(math.radians(15.5)))
    cameras = Cameras(text.pose.view(2, 3, 4), focal, focal, focal * 0 + 64, focal * 0 + 64, 128, 128)
    rgb = objects.views(thing, cameras, torch.tensor([0.66, 0.88, 0.72])).rgb
    expected = truth.encode(rgb.permute(0, 3, 1, 2))
    for one, name in ((text, "text"), (null, "null")):
        torch.testing.assert_close(clean(truth, one, eps[name]), expected, rtol=1e-4, atol=1e-4)
    assert not thing.plate
    with pytest.raises(InputError, match="needs the prompt and the pose"):
        truth.predict({"null": null})


def test_each_of_several_assets_has_a_right_object_of_its_own(truth):
    said = query(["a chair, grey background, front view"] * 2, assets=3)
    first, second, third = truth.true_latents(said).view(3, 2, 4, 16, 16)
    assert min((a - b).abs().max() for a, b in ((first, second), (second, third), (first, third))) > 0.1
    colours = {thing.colour for thing in different(WorldObjects("a chair"), 4)}
    assert len(colours) == 4
    assert len(set(different(WorldObjects("a red chair"), 4))) == 1  # nothing is left open


def test_true_pictures_edit_nothing(truth):
    with pytest.raises(InputError, match="assets from words only"):
        load_prior(PriorConfig(model="world_truth:exact", device="cpu"), require="edit")


def test_assets_are_made_once_and_one_that_raises_is_a_line(tmp_path, monkeypatch):
    made = []

    def make(config, folder):
        made.append((config.prompt, config.seed, folder.name))
        if config.seed == 1:
            raise RuntimeError("no\nmemory")
        return {"object_psnr": 1 / 3, "nearest": ["a chair"]}

    monkeypatch.setattr(work, "make", make)
    rows = chosen(read_set("methods").rows, ["network/sds", "network/csd"])
    (share,) = ask(rows, ["a blue duck"], [0, 1], tmp_path)
    assert share() == share() == ""
    # the first seed of all rows before the second; what raised is tried again when the command is given again
    assert [seed for _, seed, _ in made] == [0, 0, 1, 1, 1, 1]
    assert len({name for *_, name in made}) == 4
    lines = list(share.done().values())
    assert [line.get("object_psnr") for line in lines] == [0.333333, 0.333333, None, None]
    assert lines[2]["error"] == "RuntimeError: no memory"
    rows = {"network/sds": changed(rows["network/sds"], ["distill.t_max=0.6"])}  # other keys are another line
    (share,) = ask(rows, ["a blue duck"], [0], tmp_path)
    share()
    assert len(made) == 7
    assert len(share.done()) == 5


def in_this_process(shares, *_):
    """Stands in for do_shares."""
    wanted = [json.dumps(one.identity, sort_keys=True) for share in shares for one in share.asked]
    return [line for share in shares if share() == "" for key, line in share.done().items() if key in wanted]


def killed(*_):
    """Stands in for do_shares where every process is killed."""
    return []


def run_here(tmp_path, monkeypatch, do_shares, *words):
    """Run the command with its record in a folder; its exit code, and the record's lines."""
    record = tmp_path / "results" / "assets-methods.jsonl"
    record.parent.mkdir(exist_ok=True)

    monkeypatch.setattr(work, "make", make_even)
    monkeypatch.setattr(command, "RESULTS", record.parent)
    monkeypatch.setattr(command, "do_shares", do_shares)
    said = ["run", "--rows", "network/sds", "--prompts", "a blue duck", "--work", str(tmp_path / "work"), *words]
    code = main(said)
    return code, [json.loads(text) for text in record.read_text().splitlines()] if record.exists() else None


def make_even(config, _folder):
    """Stands in for work.make: odd seeds fail."""
    if config.seed % 2:
        raise RuntimeError("no memory")
    return {"object_psnr": 10.0 + config.seed, "nearest": ["a duck"]}


def test_what_could_not_be_made_is_told_and_no_part_of_the_record(tmp_path, monkeypatch, capsys):
    assert run_here(tmp_path, monkeypatch, in_this_process, "--seeds", "1") == (1, None)
    told = capsys.readouterr().err
    assert told == "error: `network/sds` raised on 'a blue duck', seed 1: RuntimeError: no memory\n"
    code, lines = run_here(tmp_path, monkeypatch, in_this_process, "--seeds", "0", "1", "1")
    assert (code, [line["seed"] for line in lines]) == (1, [0])
    out, told = capsys.readouterr()
    assert "| SDS, shipped network | 1 | 10.00 |" in out
    assert told.count("\n") == 1
    code, lines = run_here(tmp_path, monkeypatch, in_this_process, "--seeds", "0")
    assert (code, len(lines)) == (0, 1)
    captured = capsys.readouterr()
    assert "raised" not in captured.out + captured.err  # of another run
    code, trial = run_here(tmp_path, monkeypatch, in_this_process, "--seeds", "1", "2", "--keys", "distill.t_max=0.6")
    assert (code, trial) == (1, lines)
    kept = (tmp_path / "work" / "methods.jsonl").read_text().splitlines()
    assert [json.loads(text)["seed"] for text in kept] == [2]


def test_a_line_of_the_record_outlasts_a_run_that_is_killed(tmp_path, monkeypatch, capsys):
    before = run_here(tmp_path, monkeypatch, in_this_process, "--seeds", "0")[1]
    assert len(before) == 1
    assert run_here(tmp_path, monkeypatch, killed, "--seeds", "0", "2") == (1, before)
    assert "2 of 2 assets were not made, see above; the same command goes on" in capsys.readouterr().err


SLEEPS = """
import signal, sys, time
from pathlib import Path
from benchmarks.lines import do_shares, exit_code

class Sleeper:
    name, asked = "sleeper", ()

    def __call__(self):
        (folder / "begun").touch()
        time.sleep(600)

signal.signal(signal.SIGINT, signal.default_int_handler)  # which is off where a script began the tests with "&"
folder = Path(sys.argv[1])
sys.exit(exit_code(lambda: do_shares([Sleeper()], folder / "logs", 1, "test")))
"""


def test_ctrl_c_is_one_line_and_logs_have_a_folder_with_a_name(tmp_path):
    pytest.importorskip("submitit")
    said = [sys.executable, "-c", SLEEPS, str(tmp_path)]
    root = Path(work.__file__).parents[2]
    process = subprocess.Popen(said, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=root)
    end = time.monotonic() + 100
    while not (tmp_path / "begun").exists() and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    # what the controllers write comes after the command's end: until they close stderr, it is read
    assert process.communicate(timeout=60)[1] == "Aborted. The same command goes on with what is left.\n"
    assert process.returncode == 130
    names = {path.name for path in (tmp_path / "logs").iterdir()}
    assert "controllers.err" in names
    assert not [name for name in names if "%" in name]
    assert [name for name in names if name.endswith("_0_log.out")]


def test_tables_compare_rows_under_the_same_prior():
    def line(row, prompt, seed, psnr, **more):
        return {"row": row, "prompt": prompt, "seed": seed, "object_psnr": psnr, "judge": "CLIP (world)"} | more

    places = [(prompt, seed) for prompt in ("a duck", "a mug") for seed in (0, 1)]
    lines = [line("network/sds", *at, 13.0 + at[1], clip_colour=0.5) for at in places]
    lines += [line("network/csd", *at, 15.0 + at[1], mask_iou=0.5) for at in places]
    lines += [line("truth/sds", *at, 22.0) for at in places]
    lines += [line("network/vsd", "a duck", 0, None) | {"error": "RuntimeError: no memory"}]
    of = replace(read_set("methods"), about="known lines")
    text = tables(lines, of)
    assert text.startswith("known lines; 2 prompts")
    assert "| mean | n | PSNR on the object, dB | mask IoU | CLIP (world) colour |" in text
    assert "| SDS, shipped network | 4 | 13.50 | – | 0.500 |" in text
    assert "| SDS, true pictures | 4 | 22.00 | – | – |" in text
    assert "| SDS, shipped network | 13.50 (13.50 … 13.50) | – |" in text
    assert "| minus sds, same prior | PSNR on the object, dB | mask IoU |" in text
    assert "| CSD, shipped network | **+2.00 (+2.00 … +2.00)** | – |" in text
    assert text.count("true pictures") == 2  # it is not compared with another prior's
    assert "`network/vsd` raised on 'a duck', seed 0: RuntimeError: no memory" in text
