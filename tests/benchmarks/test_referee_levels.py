"""The referee's whole scenes, strips and videos: rounds over a fit, what a right edit scores, and going on."""

import json

import pytest
import torch
from tiny_models import save_tiny_pipeline

from benchmarks.lines import as_text
from benchmarks.referee import canvas, work
from benchmarks.referee.__main__ import best_keys, rows_of, tuning_level
from benchmarks.referee.canvas import FILES as CONFIGS
from benchmarks.referee.canvas import canvas_editor_of, judge_units, units
from benchmarks.referee.inputs import compare
from benchmarks.referee.protocol import LEVELS
from benchmarks.referee.rows import editor_of
from benchmarks.referee.whole import spread
from benchmarks.referee.work import Asked, Share
from csd3d.canvas.clip import Clip

KEYS = as_text({"type": "ip2p"})


def flat_strip(*colours: float) -> torch.Tensor:
    """A strip [1, 16, 64, 3] of four objects' cells, each of one grey."""
    return (
        torch.tensor(colours, dtype=torch.float32)
        .repeat_interleave(16)[None, None, :, None]
        .expand(1, 16, 64, 3)
        .clone()
    )


def clip_of(before: torch.Tensor, *answers: torch.Tensor) -> Clip:
    pictures = before.permute(0, 3, 1, 2)
    clip = Clip("", len(before), *before.shape[1:3], lambda indices: pictures[list(indices)])
    clip.answers = torch.stack(answers).numpy()
    return clip


def test_objects_of_a_strip_must_choose_the_same_answer():
    clip = clip_of(flat_strip(0, 0, 0, 0), flat_strip(0.5, 0.5, 0.5, 0.5), flat_strip(1, 1, 1, 1))
    right = judge_units(clip, flat_strip(1, 1, 1, 1))
    assert (right["psnr"], right["answer"], right["agree"]) == (100, 1, 1)
    torn = judge_units(clip, flat_strip(1, 1, 1, 0.5))
    assert (torn["agree"], torn["psnr_each"], torn["answer"]) == (0.75, 100, 1)
    assert torn["psnr_worst"] == pytest.approx(6.02, abs=0.01)  # half of full white off


def test_units_are_cells_of_a_strip_and_frames_of_a_video():
    strip = flat_strip(0.1, 0.2, 0.3, 0.4)
    assert units(strip, 4)[:, 0, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert torch.equal(units(strip, 1), strip)


def test_what_the_edit_leaves_alone_is_judged_outside_it():
    before, answer = torch.zeros(1, 16, 16, 3), torch.zeros(1, 16, 16, 3)
    answer[:, :4] = 1
    after = answer.clone()
    after[:, 12:] = 0.1  # damage far from the edit
    found = compare(before, before, [answer], after)
    assert found["left_alone"] == pytest.approx(20 + 3.98, abs=0.01)  # on 4 of the 10 rows outside the grown edit
    assert compare(before, before, [answer], answer)["detail"] == pytest.approx(1)


@pytest.mark.parametrize(("rounds", "every"), [(1, 600), (2, 300), (3, 200)])
def test_rounds_are_spread_over_the_fit(rounds, every):
    editor = editor_of(as_text({"type": "csd_edit", "rounds": rounds}))
    assert spread(editor, 600).edit_every == every


def test_editors_by_edits_a_view_spread_themselves():
    editor = editor_of(as_text({"type": "in2n", "edits_per_view": 1}))
    assert spread(editor, 600) == editor


@pytest.mark.parametrize("level", ["strips", "videos"])
def test_all_rows_have_valid_keys_and_as_many_trials(level):
    level = LEVELS[level]
    rows = rows_of(level, None)
    for row in rows.values():
        for trial in row.trials or ({},):
            if not row.of:
                assert canvas_editor_of(as_text(row.keys(trial)), CONFIGS[level.clip])
        assert row.free or row.of or len(row.trials) == 6
    assert best_keys(rows, level)["csd_edit_alone"]["edit"]["svgd"] is None
    assert not set(tuning_level(level).scenes) & set(level.scenes)


class Nothing:
    """An editor that leaves everything as it is."""

    def count_steps(self, canvas):
        return 1

    def take_step(self, canvas, phase, step):
        return {"skipped": 0.0}


@pytest.mark.parametrize(("level", "scene"), [("strips", "strip-4"), ("videos", "orbit-4")])
def test_an_edit_that_does_nothing_scores_what_its_source_does(level, scene, tmp_path, monkeypatch):
    monkeypatch.setattr(canvas, "canvas_editor_of", lambda keys, file: Nothing())
    small = ("world.width=64", "world.height=32", "world.frames=3", f"prior.model={save_tiny_pipeline(tmp_path)}")
    bench = canvas.CanvasBench(LEVELS[level], scene, small)
    found = bench.edit(Asked("nothing", KEYS, "paint it a bright colour", "several answers", 0))
    assert found["psnr"] == pytest.approx(found["psnr_unedited"], abs=1e-3)
    assert found["left_alone"] > 60
    assert (found["answers"], found["evaluations"]) == (3, 0)
    wrong = bench.edit(Asked("nothing", KEYS, "sing", "", 0))
    assert "'sing' is no instruction" in wrong["error"]


class Counting:
    """In place of a bench: an edit is its number, and one of them raises."""

    edits = 0

    def __init__(self, level, scene):
        pass

    def edit(self, one):
        Counting.edits += 1
        return one.identity | {"kind": one.kind, "psnr": 1 / 3}


def test_edits_that_are_done_are_not_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "CanvasBench", Counting)
    asked = [Asked("ip2p", KEYS, "make it green", "one answer", seed) for seed in (0, 1, 2)]
    share = Share(LEVELS["strips"], "strip-4", asked[:2], tmp_path)
    share()
    with share.file.open("a") as file:
        file.write('{"row": "ip2p", "cut off')
    Share(LEVELS["strips"], "strip-4", asked, tmp_path)()
    assert Counting.edits == 3
    lines = [json.loads(text) for text in share.file.read_text().splitlines()[:2]]
    assert [(line["level"], line["scene"], line["seed"], line["psnr"]) for line in lines] == [
        ("strips", "strip-4", 0, 0.333333),
        ("strips", "strip-4", 1, 0.333333),
    ]
