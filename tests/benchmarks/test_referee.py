"""The referee: its rows are editors, its judge knows right from wrong, and what is done is not done again."""

import json
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import lines
from benchmarks.lines import as_text, merged
from benchmarks.referee import __main__ as referee
from benchmarks.referee import work
from benchmarks.referee.inputs import Input, Views, judge
from benchmarks.referee.protocol import INSTRUCTIONS, LEVELS, SCENES, TUNING_INSTRUCTIONS, TUNING_SCENES, VERSION, Level
from benchmarks.referee.rows import count_updates, editor_of, read_rows
from benchmarks.referee.table import tables
from benchmarks.referee.work import Asked, Bench, Share
from csd3d.datasets import SceneConfig, load_capture
from csd3d.errors import InputError
from csd3d.world.scene import Scene

TRIALS = 6
BRIGHT = "paint it a bright colour"
ROWS = read_rows()


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_an_editor_with_each_of_its_trials(name):
    row = ROWS[name]
    assert len(row.trials) in (0, TRIALS)
    assert row.trials or row.of or row.free or row.editor["type"] == "csd_edit"  # every other method is tuned
    assert len({as_text(trial) for trial in row.trials}) == len(row.trials)
    assert not row.of or row.of in ROWS
    for trial in row.trials or ({},):
        editor = editor_of(as_text(row.keys(trial)))
        assert callable(editor.update)
        assert 1 <= count_updates(editor, 12) <= 50


def test_an_ablation_takes_its_rows_best_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(referee, "RESULTS", tmp_path)
    row = ROWS["per_view"]
    rows = {**ROWS, "less": replace(row, name="less", of="per_view", editor={"start": 0.5}, trials=())}
    monkeypatch.setattr(referee, "read_rows", lambda *_: rows)
    assert referee.best_keys(rows, LEVELS[1])["per_view"] == row.editor  # nothing was tuned yet
    trials = [{"trial": trial} for trial in row.trials]
    (tmp_path / "referee-tuning-1.json").write_text(json.dumps({"rows": {"per_view": {"best": 3, "trials": trials}}}))
    found = referee.best_keys(rows, LEVELS[1])
    assert found["per_view"] == merged(row.editor, row.trials[3])
    assert found["less"] == merged(merged(row.editor, row.trials[3]), {"start": 0.5})
    assert referee.best_keys(rows, LEVELS[2])["per_view"] == row.editor  # levels have trials of their own
    assert referee.tuning_file(3) == referee.tuning_file(2)


def test_instructions_have_right_answers_in_the_scenes_of_their_levels():
    lacking = [
        (scene, one.text)
        for level in (*LEVELS.values(), referee.tuning_level(LEVELS[1]))
        for scene in level.scenes
        for one in level.instructions
        if not referee.applies(level, scene, one.text)
    ]
    assert lacking == [("house", "cover it with snow")]  # it is white
    assert not set(SCENES.values()) & set(TUNING_SCENES.values())
    assert not any(one.held_out for one in INSTRUCTIONS if one.text in TUNING_INSTRUCTIONS)


def test_what_does_not_apply_to_a_scene_is_left_out(tmp_path, monkeypatch):
    """Run here, in place of a process a scene."""
    monkeypatch.setattr(work, "Bench", lambda *_: Stub([]))
    done = type("Done", (), {"done": lambda self: True})()
    slot = type("Slot", (), {"submit": lambda self, share: [share(), done][1]})()
    monkeypatch.setattr(lines, "executors", lambda *_: lambda number: slot)
    monkeypatch.setattr(lines, "outcome", lambda job: ("", None))
    monkeypatch.setattr(lines.time, "sleep", lambda seconds: None)
    asked = [Asked("a", "{}", text, "one answer", 0) for text in ("cover it with snow", "make it green")]
    level = replace(LEVEL, scenes=("duck", "house"))
    found = referee.do(level, asked, tmp_path, jobs=1)
    assert [(line["scene"], line["instruction"]) for line in found] == [
        ("duck", "cover it with snow"), ("duck", "make it green"), ("house", "make it green"),
    ]  # fmt: skip
    assert referee.do(level, asked, tmp_path, jobs=2) == found


@pytest.fixture(scope="module")
def given(tiny_capture):
    capture = load_capture(SceneConfig(path=str(tiny_capture)))
    return Input("cube", Scene("cube", "yellow", azimuth_deg=20), capture)


def test_right_answers_are_right(given):
    for number, scene in enumerate(given.edit(BRIGHT).answers):
        figures = judge(given, BRIGHT, given.after(scene).rgb)
        assert figures["psnr"] == figures["psnr_worst"] == figures["psnr_each"] == 100
        assert figures["answer"] == number
        assert figures["answers"] == 3
        assert figures["agree"] == 1
        assert figures["detail"] == pytest.approx(1)
        assert figures["left_alone"] > 40  # the photos are rounded to 8 bits
        assert 5 < figures["psnr_unedited"] < 30


def test_the_source_is_no_edit(given):
    figures = judge(given, BRIGHT, given.photos)
    assert figures["psnr"] == pytest.approx(figures["psnr_unedited"], abs=1e-4)
    assert figures["left_alone"] == 100
    assert judge(given, "leave it as it is", given.photos)["psnr"] > 40
    assert judge(given, "leave it as it is", given.photos)["detail"] is None  # nothing should change
    with pytest.raises(ValueError, match="no instruction for cube"):
        judge(given, "paint it beautiful", given.photos)


def test_views_that_chose_two_answers_do_not_agree(given):
    first, second, _ = (given.after(scene).rgb for scene in given.edit(BRIGHT).answers)
    figures = judge(given, BRIGHT, torch.cat([first[:2], second[2:]]))
    assert figures["agree"] == pytest.approx(3 / 5)
    assert figures["answer"] == 1
    assert figures["psnr_each"] == 100
    assert figures["psnr_worst"] < 30 < figures["psnr"] < 100


def test_blur_and_noise_are_no_detail(given):
    text = "give it black dots"
    truth = given.after(given.edit(text).answers[0]).rgb
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    assert judge(given, text, truth.mean((1, 2), keepdim=True).expand_as(truth))["detail"] == pytest.approx(0, abs=1e-3)
    assert judge(given, text, truth + 0.05 * noise)["detail"] == pytest.approx(1, abs=0.1)
    assert abs(judge(given, text, 0.5 + 0.05 * noise)["detail"]) < 0.2


def test_views_show_what_an_editor_made_with_the_true_depth(given):
    views, rows = Views(given), torch.tensor([3, 0])
    views.images[given.capture.train[3]] = 0.25
    shown = views.render_views(given.cameras, rows)
    assert bool((shown.rgb[0] == 0.25).all())
    assert torch.equal(shown.rgb[1], given.photos[0])
    assert torch.equal(shown.opacity > 0, given.before.depth[rows].isfinite())
    assert bool(shown.depth.isfinite().all())
    assert not bool((given.photos[3] == 0.25).all())  # the capture itself is as it was


class Stub:
    """In place of a `Bench`, which opens models."""

    def __init__(self, done):
        self.done = done

    def edit(self, one):
        self.done.append(one.instruction)
        return one.identity | {"kind": one.kind, "psnr": 20.0 + len(self.done)}


LEVEL = Level(1, "tiny", "world:exact", False, ("duck",), INSTRUCTIONS[:3], (0,))


def asked_of(*rows):
    return [Asked(row, "{}", one.text, one.kind, 0) for row in rows for one in LEVEL.instructions]


def test_edits_are_done_once_and_a_line_that_was_cut_off_is_done_again(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(work, "Bench", lambda *_: Stub(done))
    share = Share(LEVEL, "duck", asked_of("a"), tmp_path)
    share()
    assert done == [one.text for one in LEVEL.instructions]
    first = share.done()
    assert len(first) == 3
    whole = share.file.read_text()
    share.file.write_text(whole[:-20])
    Share(LEVEL, "duck", asked_of("a", "b"), tmp_path)()
    assert len(done) == 3 + 1 + 3  # the line that was cut off, and the new row
    found = share.done()
    assert len(found) == 6
    assert [found[key] for key in list(first)[:2]] == [first[key] for key in list(first)[:2]]
    share()
    assert len(done) == 7


def test_an_editor_that_raises_is_a_line_and_the_rest_goes_on(tmp_path, monkeypatch, given):
    class Raises:
        def update(self, edit, step, report):
            raise RuntimeError("no\nmemory")

    class Leaves:
        def update(self, edit, step, report):
            pass

    bench = object.__new__(Bench)
    bench.given, bench.level, bench.whole, bench.prepared = given, LEVEL, None, None
    bench.prior = type("NoPrior", (), {"unet_evaluations": 0})()
    bench.source = lambda instruction: None
    monkeypatch.setattr(work, "editor_of", lambda keys: {"a": Raises, "b": Leaves}[json.loads(keys)["type"]]())
    monkeypatch.setattr(work, "Bench", lambda *_: bench)
    asked = [Asked(row, as_text({"type": row}), BRIGHT, "several answers", 1) for row in ("a", "b")]
    share = Share(LEVEL, "cube", asked, tmp_path)
    assert share() == ""
    failed, left = share.done().values()
    assert failed["error"] == "RuntimeError: no memory"
    assert "psnr" not in failed
    assert left["psnr"] == pytest.approx(left["psnr_unedited"], abs=1e-3)
    assert left["evaluations"] == 0


def line(row, scene, seed, psnr, kind="one answer", **more):
    more = {"answers": 1, "agree": 1.0, "left_alone": None} | more
    asked = {"row": row, "scene": scene, "instruction": "make it green", "seed": seed}
    return {"version": VERSION, **asked, "kind": kind, "psnr": psnr} | more


def test_tables_of_known_lines(tmp_path):
    lines = [line("csd_edit", s, seed, 25.0 + seed, left_alone=30.0) for s in ("duck", "mug") for seed in (0, 1)]
    lines += [line("in2n", s, seed, 24.0) for s in ("duck", "mug") for seed in (0, 1)]
    lines += [line("csd_edit", "duck", 2, 99.0, "several answers", answers=3)]  # in2n has no such line
    lines += [line("dds", "duck", 0, 0.0) | {"error": "RuntimeError: no memory"}]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    text = tables(path, ROWS)
    assert "| CSD-Edit | 5 | 40.20 | 1.00 | 30.0 |" in text
    assert "| Instruct-NeRF2NeRF | 4 | 24.00 | 1.00 | – |" in text
    assert "| PSNR, dB | several answers | one answer |" in text
    assert "| Instruct-NeRF2NeRF | – | 24.00 (24.00 … 24.00) |" in text
    assert "| Instruct-NeRF2NeRF | – | **+1.50 (+1.50 … +1.50)** | **+1.50 (+1.50 … +1.50)** |" in text
    assert "`dds` raised on duck, 'make it green': RuntimeError: no memory" in text
    assert "| DDS |" not in text


def test_claims_are_made_against_the_best_baseline_on_the_same_inputs(tmp_path):
    def several(row, scene, psnr, agree):
        return line(row, scene, 0, psnr, "several answers", answers=3, agree=agree, detail=0.5)

    lines = [several("csd_edit", scene, psnr, 1.0) for scene, psnr in (("duck", 26.0), ("mug", 28.0), ("car", 90.0))]
    lines += [several("in2n", scene, 25.0, 0.5) for scene in ("duck", "mug")]
    lines += [several("dge", "duck", 20.0, 0.5), several("csd_paper", "duck", 99.0, 1.0)]  # worse; of another cost
    lines += [several("csd_edit_alone_shared", scene, 25.5, 0.75) for scene in ("duck", "mug")]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    text = tables(path, ROWS)
    cells = "27.00; 25.00; **+2.00 (+1.00 … +3.00)** | 1.00; 0.50; **+0.50 (+0.50 … +0.50)** | – | 0.50; 0.50; +0.00"
    assert f"| Instruct-NeRF2NeRF (the best baseline) | {cells}" in text
    alone = ROWS["csd_edit_alone_shared"].title
    assert f"| {alone} | 27.00; 25.50; **+1.50 (+0.50 … +2.50)** | 1.00; 0.75; **+0.25 (+0.25 … +0.25)** |" in text


# ----------------------------------------------------------------------------------------------------------- bad input


def test_lines_that_are_damaged_are_made_again(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(work, "Bench", lambda *_: Stub(done))
    share = Share(LEVEL, "duck", asked_of("a"), tmp_path)
    share.file.parent.mkdir()
    share.file.touch()  # as when it was stopped before its first line
    share()
    first, second, third = share.file.read_bytes().splitlines()
    old = json.dumps(json.loads(first) | {"version": "referee-0"}).encode()
    raised = json.dumps(json.loads(second) | {"error": "RuntimeError: no memory"}).encode()
    share.file.write_bytes(b"\n".join([b"5", b"null", b"[]", old, raised, third, b"\xff\xfe{"]))
    share()
    assert done[3:] == [one.text for one in LEVEL.instructions[:2]]
    assert not any("error" in line for line in share.done().values())
    assert len(share.done()) == 3 + 1  # that of another version stays, and is not asked for


def test_pictures_that_are_not_finite_are_an_error(given):
    spoilt = given.photos.clone()
    spoilt[0, 0, 0] = torch.nan
    found = lines.measured({"row": "a"}, lambda: judge(given, BRIGHT, spoilt))
    assert found["error"].startswith("ValueError: figures that are not finite: psnr")
    assert "psnr" not in found


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ('{"version": "referee-1", "row"', "line 2: no whole line of JSON"),
        ("[5]", "line 2: has no version, row, scene"),
        (json.dumps(line("in2n", "duck", 1, 20.0, version="referee-0")), "line 2: of version 'referee-0', but this is"),
        (
            json.dumps(line("in2n", "duck", 0, 20.0)),
            "line 2: has the same row, scene, instruction, seed as",
        ),
        (json.dumps(line("in2n", "mug", 0, None)), "in2n on mug, 'make it green': has no psnr"),
    ],
)
def test_results_that_are_damaged_are_told_by_their_line(tmp_path, bad, told):
    path = tmp_path / "lines.jsonl"
    with pytest.raises(InputError, match="no lines yet"):
        tables(path, ROWS)
    path.write_text(json.dumps(line("in2n", "duck", 0, 20.0)) + "\n" + bad + "\n")
    with pytest.raises(InputError, match=re.escape(told)):
        tables(path, ROWS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "rows.yaml"),
        ("a: {title: A}", "a: expected a row with title and editor"),
        ("a: {title: A, editor: {steps: 3}}", "a.editor: has no type"),
        ("a: {title: A, editor: {type: dds}, levels: [1]}", "a.levels: unknown key"),
        ("a: {title: A, editor: {type: dds}, free: 1}", "a.free: 1; expected a bool"),
        ("a: {title: A, editor: {type: dds}, trials: [5]}", "a.trials: 5; expected keys of the editor"),
        ("a: {title: A, editor: {type: dds}, trials: [{steps: 3}, {steps: 3}]}", "a.trials: one stands there twice"),
        ("a: {title: A, editor: {}, of: b}", "a.of: 'b'; expected a row that is no ablation"),
        ("a: {title: A, editor: {}, of: a}", "a.of: 'a'; expected a row that is no ablation"),
    ],
)
def test_rows_that_are_wrong_are_told_by_row_and_key(tmp_path, text, told):
    (tmp_path / "rows.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(told)):
        read_rows(tmp_path / "rows.yaml")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("run", "--level: give one of 1, 2, 3, strips, videos"),
        ("run --level 1 --rows nosuch", "--rows: level 1 has no nosuch; there are per_view,"),
        ("run --level 1 --rows dge", "--rows: level 1 has no dge"),  # it works inside a UNet
        ("run --level 1 --scenes tuning-car", "--scenes: level 1 has no tuning-car; there are duck,"),
        ("run --level 2 --seeds 9", "--seeds: level 2 has no 9; there are 0, 1, 2"),
        ("run --level 1 --jobs 0", "--jobs: 0; expected a whole number, 1 or more"),
        ("table --level 3", "no lines yet"),
        ("table --level 3 --rows csd_edit", "--rows of tune and run"),
        ("page", "no level has lines"),
        ("tune --level 1", "rows: per_view, trial 1: "),
        ("tune --level 3", "level 3 takes the trials of level 2"),
    ],
)
def test_the_command_tells_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.setattr(referee, "RESULTS", tmp_path)
    monkeypatch.setattr(referee, "do_shares", None)
    if "tune" in words:
        wrong = {"per_view": replace(ROWS["per_view"], editor={"type": "one_shot", "stepz": 3})}
        monkeypatch.setattr(referee, "read_rows", lambda *_: wrong)
    before = referee.PAGE.read_bytes()
    try:
        code = referee.main(words.split())
    except SystemExit as stop:  # argparse's
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert len(error.splitlines()) == 1
    assert told in error
    assert not list(tmp_path.iterdir())
    assert referee.PAGE.read_bytes() == before


def tuned(tmp_path, monkeypatch, drop=lambda line: False, raised=()):
    """The exit code of `tune` of one row, whose trial n scores n dB; lines are dropped, and trials raise."""
    monkeypatch.setattr(referee, "RESULTS", tmp_path)
    keys = [ROWS["per_view"].keys(trial) for trial in ROWS["per_view"].trials]

    def do_shares(shares, *_):
        found = [one.identity | {"scene": share.scene, "kind": one.kind} for share in shares for one in share.asked]
        for each in found:
            number = keys.index(each["editor"])
            each |= {"error": "RuntimeError: no"} if number in raised else {"psnr": float(number)}
        return [each for each in found if not drop(each)]

    monkeypatch.setattr(referee, "do_shares", do_shares)
    return referee.main(["tune", "--level", "1", "--rows", "per_view", "--work", str(tmp_path / "work")])


def test_trials_are_kept_only_if_every_edit_was_done(tmp_path, monkeypatch, capsys):
    file = tmp_path / "referee-tuning-1.json"
    assert tuned(tmp_path, monkeypatch, drop=lambda line: line["scene"] == "tuning-car") == 2
    assert "18 of 36 edits were not done" in capsys.readouterr().err
    assert not file.exists()
    assert tuned(tmp_path, monkeypatch, raised=(5,)) == 0
    assert json.loads(file.read_text())["rows"]["per_view"]["best"] == 4
    assert tuned(tmp_path, monkeypatch, raised=range(6)) == 0
    assert "per_view: no trial can win" in capsys.readouterr().err
    assert json.loads(file.read_text())["rows"] == {}
    file.write_text('{"rows": {"per_view": {"best": 9, "trials": []}}}')
    assert tuned(tmp_path, monkeypatch) == 2
    assert "rows.per_view: names no best of its trials" in capsys.readouterr().err


def test_rows_that_are_not_tuned_are_named(tmp_path, monkeypatch, capsys):
    assert tuned(tmp_path, monkeypatch) == 0
    referee.tell_untuned(
        LEVELS[1], {name: ROWS[name] for name in ("per_view", "in2n", "csd_edit_constant", "csd_paper")}
    )
    told = capsys.readouterr().err.splitlines()
    assert [text.partition(":")[0] for text in told] == ["in2n", "csd_edit_constant"]
    assert "tune --level 1 --rows csd_edit" in told[1]
