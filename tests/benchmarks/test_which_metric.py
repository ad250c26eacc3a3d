"""A proxy that is the truth is trusted, a random one is not, and bad lines are named."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.rank_statistics import accuracy_interval, pairwise_accuracy, spearman
from benchmarks.which_metric import NOTES, document, read_lines, worth
from csd3d.errors import InputError


def made(count=400):
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        psnr = rng.normal(20, 3)
        row = {"scene": f"s{i % 8}", "instruction": f"i{i % 3}", "kind": ("colour", "shape")[i % 2], "psnr": psnr}
        rows.append(row | {"warped_error": -psnr, "clip_directional": rng.normal(), "unheard_of": 1.0, "met3r": None})
    return rows


def test_the_truth_is_right_and_noise_is_a_coin():
    true, noise = worth(made(), "warped_error"), worth(made(), "clip_directional")
    assert true["accuracy"] == 1
    assert true["accuracy_interval"] == (1, 1)
    assert true["spearman"] == pytest.approx(1)
    assert noise["accuracy"] == pytest.approx(0.5, abs=0.05)
    assert noise["spearman"] == pytest.approx(0, abs=0.12)
    assert noise["accuracy_interval"][0] < 0.5 < noise["accuracy_interval"][1]
    assert worth(made(), "met3r") is None


def test_known_values():
    assert spearman(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])) == pytest.approx(0.5)
    proxy, truth = np.array([1.0, 1, 0, 5]), np.array([1.0, 2, 3, 4])
    assert pairwise_accuracy(proxy, truth, ["a", "a", "a", "b"]) == pytest.approx(0.5 / 3)  # a tie is half
    assert np.isnan(spearman(np.ones(3), truth[:3]))
    assert np.isnan(accuracy_interval(proxy, truth, [0] * 4, [0] * 4)).all()  # one scene has no interval


def test_the_document_has_a_table_and_a_small_picture(tmp_path):
    doc = tmp_path / "which-metric.md"
    doc.write_text(f"old\n{NOTES}\nseen by eye\n")
    document({"edits": made(600)}, doc, "python -m benchmarks.which_metric")
    text = doc.read_text()
    assert "| warped error | 600 | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |" in text
    assert "unheard" not in text
    assert text.endswith(f"{NOTES}\nseen by eye\n")
    assert "old" not in text
    picture = tmp_path / "which-metric-edits.png"
    assert picture.stat().st_size < 150_000
    Image.open(picture).load()


@pytest.mark.parametrize(
    ("line", "said"), [("{", "not JSON"), ("[1]", "lacks an object"), ("{}", "lacks scene"), (None, "psnr is 'x'")]
)
def test_bad_lines_are_named(tmp_path, line, said):
    path = tmp_path / "lines.jsonl"
    good = {"scene": "s", "instruction": "i", "kind": "k", "psnr": 20.0}
    path.write_text(json.dumps(good) + "\n" + (line or json.dumps(good | {"psnr": "x"})) + "\n")
    with pytest.raises(InputError, match=f"lines.jsonl:2: {said}"):
        read_lines([path])


def test_lines_of_assets_are_read_and_failed_ones_left_out(tmp_path):
    path = tmp_path / "assets.jsonl"
    rows = [
        {"prompt": "a red chair with yellow stripes", "object_psnr": 14.5},
        {"prompt": "a blue duck", "object_psnr": 15},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "a cube", "error": "ValueError: no"}]))
    found = read_lines([path])
    assert [(row["scene"], row["kind"], row["psnr"]) for row in found] == [
        ("a red chair with yellow stripes", "pattern", 14.5),
        ("a blue duck", "no pattern", 15),
    ]
