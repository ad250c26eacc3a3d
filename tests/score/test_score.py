"""`csd3d score`: planted edits of a moving texture and of a ball with depth; one line for each kind of bad input."""

import json
import math
import os
import re
import struct

import cv2
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from balls import ball_depths

import launch
from csd3d.cameras import orbit
from csd3d.media import frame_writer
from csd3d.score.geometry import along_rays

SIZE = 48
FOCAL = 0.5 * SIZE / math.tan(math.radians(20))


def write(folder, pictures, names=None):
    folder.mkdir(parents=True)
    for i, picture in enumerate(pictures):
        iio.imwrite(folder / f"{names[i] if names else f'{i:02}'}.png", np.round(255 * picture).astype(np.uint8))
    return folder


def texture(count=4, width=SIZE):
    """Views through a window that moves by two pixels, values in [0.2, 0.6]."""
    noise = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    world = F.interpolate(noise, (SIZE, width + 2 * count), mode="bicubic")[0].clamp(0, 1).movedim(0, -1).numpy()
    return np.stack([0.2 + 0.4 * world[:, 2 * i : 2 * i + width] for i in range(count)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """before; light and dark, two right answers; mixed: one view dark, the others light."""
    home, before = tmp_path_factory.mktemp("score"), texture()
    edits = {"before": before, "light": before + 0.3, "dark": before - 0.2}
    edits["mixed"] = np.concatenate([edits["dark"][:1] + 0.02, edits["light"][1:] - 0.1])
    for name, pictures in edits.items():
        write(home / name, pictures)
    return home


def score(*words):
    """The exit code, given words of the command line; paths are made text."""
    return launch.main(["score", *map(str, words)])


def test_one_json_and_one_page(folders, tmp_path, capsys):
    home, file, page = folders, tmp_path / "score.json", tmp_path / "score.html"
    words = (home / "before", home / "mixed", "--truth", home / "light", home / "dark", "--json", file, "--page", page)
    assert score(*words, "--captions", "a red ball", "a blue ball") == 0
    found = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert (found["views"], found["answer"], found["answer_agreement"]) == (4, "light", 0.75)
    by_view = [-20 * math.log10(0.48), 20, 20, 20]  # to light; the first is dark
    assert found["psnr_truth"] == pytest.approx(sum(by_view) / 4, abs=0.1)
    assert found["psnr_by_answer"].keys() == {"light", "dark"}
    assert found["answer_by_view"] == {"00": "dark", "01": "light", "02": "light", "03": "light"}
    kept = [-20 * math.log10(change) for change in (0.18, 0.2, 0.2, 0.2)]
    assert found["preservation"]["psnr"] == pytest.approx(sum(kept) / 4, abs=0.1)
    errors = [0.38**2, 0, 0]  # of the pairs of neighbours
    assert found["warped_error_short"] == pytest.approx(math.sqrt(sum(errors) / 3), abs=0.03)
    assert found["agreement"] == pytest.approx(2 / 3, abs=0.05)
    assert found["warped_error_before"] < 0.02
    assert found["clip"] == "CLIP (world)"
    assert -1 <= found["clip_directional"] <= 1
    out, text = capsys.readouterr().out, page.read_text()
    for shown in ("CLIP (world) direction consistency", "MEt3R (VAE features)", "CLIP (world) is the shipped net"):
        assert shown in out
        assert shown in text
    assert "Right answer: dark" in text
    assert "NaN" not in file.read_text()


def test_views_that_did_not_change(folders, tmp_path):
    file = tmp_path / "same.json"
    assert score(folders / "before", folders / "before", "--truth", folders / "before", "--json", file) == 0
    found = json.loads(file.read_text())
    assert found["preservation"] == {"psnr": 100, "lpips_like": 0, "clip_similarity": pytest.approx(1)}
    assert found["warped_error"] == found["warped_error_before"]
    assert (found["psnr_truth"], found["answer_agreement"], found["agreement"]) == (100, 1, 1)
    assert found["clip_direction_consistency"] is None


def test_a_video_and_a_folder(folders, tmp_path):
    file = tmp_path / "video.json"
    with frame_writer(tmp_path / "after.mp4", 8.0) as add:
        for picture in texture():
            add(np.round(255 * picture).astype(np.uint8))
    words = (folders / "before", tmp_path / "after.mp4", "--clip", "none", "--json", file)
    assert score(*words, "--every", 2) == 0
    found = json.loads(file.read_text())
    assert (found["views"], found["clip"], found["clip_consistency"]) == (2, None, None)
    assert found["preservation"]["psnr"] > 30  # lossy


def test_one_view_says_what_is_left_out(folders, tmp_path, capsys):
    before, after = (write(tmp_path / name, texture(1)) for name in ("b", "a"))
    assert score(before, after, "--clip", "none", "--json", tmp_path / "one.json") == 0
    found = json.loads((tmp_path / "one.json").read_text())
    assert found["agreement"] is found["warp"] is found["met3r"] is None
    assert "one view: whether views agree needs at least two" in capsys.readouterr().out


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    """Views of a ball, a transforms.json of twice their size, and depth along the axis, as 16-bit .png and .npy."""
    home, cameras = tmp_path_factory.mktemp("ball"), orbit(6, 3.0, 20.0, 40.0, SIZE, SIZE)
    depths = ball_depths(cameras)
    views = []
    for i in range(6):
        origin, direction = cameras.image_rays(i)
        distance = depths[i].reshape(-1, 1)
        points = origin + direction * torch.where(distance.isfinite(), distance, 0.0)
        colour = 0.4 + 0.2 * torch.sin(2 * points + torch.tensor([0.0, 1.0, 2.0]))
        views.append(torch.where(distance.isfinite(), colour, 0.9).reshape(SIZE, SIZE, 3).numpy())
    write(home / "before", views)
    (home / "depth").mkdir()
    (home / "arrays").mkdir()
    frames = []
    for i, pose in enumerate(cameras.camera_to_world):
        _, direction = cameras.image_rays(i)
        axis = depths[i] * -(direction @ pose[:, 2]).reshape(SIZE, SIZE)
        axis = torch.where(axis.isfinite(), axis, 0.0).numpy()
        iio.imwrite(home / "depth" / f"{i:02}.png", np.round(axis * 1000).astype(np.uint16))
        np.save(home / "arrays" / f"{i:02}.npy", axis)
        matrix = [*pose.double().tolist(), [0, 0, 0, 1]]
        listed = {"file_path": f"big/{i:02}.png", "depth_file_path": f"depth/{i:02}.png"}
        frames.append({**listed, "transform_matrix": matrix})
    frames.reverse()  # the order of a JSON means nothing
    lens = {"fl_x": 2 * FOCAL, "fl_y": 2 * FOCAL, "cx": SIZE, "cy": SIZE, "w": 2 * SIZE, "h": 2 * SIZE}
    (home / "transforms.json").write_text(json.dumps({"camera_model": "PINHOLE", **lens, "frames": frames}))
    return home


def test_one_of_six_views_is_lighter(tmp_path):
    """Two of five pairs of neighbours differ by 0.2, and neither of the two pairs four frames apart."""
    before = np.round(255 * (texture(6) - 0.1)) / 255
    after = before.copy()
    after[3] += 0.2
    words = (write(tmp_path / "b", before), write(tmp_path / "a", after), "--clip", "none")
    assert score(*words, "--json", tmp_path / "one.json") == 0
    found = json.loads((tmp_path / "one.json").read_text())
    assert found["warped_error_short"] == pytest.approx(math.sqrt(0.2**2 * 2 / 5), abs=5e-3)
    assert found["warped_error_long"] < 0.02
    assert found["agreement"] == pytest.approx(5 / 7, abs=0.03)


def test_the_same_picture_as_every_view_is_perfect(tmp_path):
    views = write(tmp_path / "same", [texture(1)[0]] * 3)
    assert score(views, views, "--truth", views, "--json", tmp_path / "same.json") == 0
    found = json.loads((tmp_path / "same.json").read_text())
    assert (found["agreement"], found["overlap"], found["answer_agreement"], found["psnr_truth"]) == (1, 1, 1, 100)
    for key, value in {"warped_error": 0, "met3r": 0, "lpips_warped": 0, "clip_consistency": 1}.items():
        assert found[key] == pytest.approx(value, abs=1e-6)
    assert found["met3r"] >= 0
    assert found["clip_consistency"] <= 1


def test_truths_may_be_given_one_by_one(folders, tmp_path):
    words = (folders / "before", folders / "mixed", "--truth", folders / "light", "--truth", folders / "dark")
    assert score(*words, "--clip", "none", "--json", tmp_path / "two.json") == 0
    found = json.loads((tmp_path / "two.json").read_text())
    assert found["psnr_by_answer"].keys() == {"light", "dark"}
    assert found["psnr_truth"] == found["psnr_by_answer"]["light"]


def test_names_that_are_not_utf8_are_shown_by_their_bytes(folders, tmp_path):
    views = write(tmp_path / "views", texture(), ["00", os.fsdecode(b"1\xff"), "2", "3"])
    words = (views, folders / "mixed", "--truth", folders / "dark", folders / "light", "--clip", "none")
    assert score(*words, "--json", tmp_path / "o.json", "--page", tmp_path / "o.html") == 2  # 00 is in both
    views = write(tmp_path / "others", texture(), ["0", os.fsdecode(b"1\xff"), "2", "3"])
    assert score(views, *words[1:], "--json", tmp_path / "o.json", "--page", tmp_path / "o.html") == 0
    assert "1\\udcff" in json.loads((tmp_path / "o.json").read_text())["answer_by_view"]


def test_a_capture_may_list_pictures_anywhere_but_depth_beside_it(ball, tmp_path, capsys):
    listed = json.loads((ball / "transforms.json").read_text())
    for i, frame in enumerate(listed["frames"]):
        frame["file_path"] = f"/photos/{5 - i:02}.png"
        del frame["depth_file_path"]
    (tmp_path / "cameras.json").write_text(json.dumps(listed))
    words = (ball / "before", ball / "before", "--clip", "none", "--cameras", tmp_path / "cameras.json")
    assert score(*words, "--json", tmp_path / "o.json") == 0
    listed["frames"][5]["depth_file_path"] = str(ball / "depth" / "00.png")
    (tmp_path / "cameras.json").write_text(json.dumps(listed))
    assert score(*words) == 2
    told = r"leaves the capture's folder .*; expected a path inside it, or --depth DIR"
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize("depth", [(), ("--depth", "arrays")])
def test_depth_joins_the_views_of_a_ball(ball, tmp_path, depth):
    words = [ball / word if word == "arrays" else word for word in depth]
    file = tmp_path / "ball.json"
    words = [ball / "before", ball / "before", "--cameras", ball / "transforms.json", *words]
    assert score(*words, "--clip", "none", "--json", file) == 0
    found = json.loads(file.read_text())
    assert found["warp"] == "depth"
    assert found["overlap"] > 0.1
    assert found["warped_error_before"] < 0.006  # the depths meet: along the ray they would be 5 % off at the rim


def test_wrong_units_of_depth_are_told(ball, capsys):
    words = (ball / "before", ball / "before", "--cameras", ball / "transforms.json", "--clip", "none")
    assert score(*words, "--depth-unit", "0.01") == 0
    assert "too few to judge by: check --depth-unit and --depth-along" in capsys.readouterr().out


def test_depth_along_the_axis_of_a_plane():
    """A wall across the axis at 2 is at 2 / cos along the ray."""
    cameras = orbit(1, 3.0, 0.0, 90.0, 4, 4)
    found = along_rays(torch.full((1, 4, 4), 2.0), cameras)[0, 0, 0].item()
    assert found == pytest.approx(2 * math.sqrt(1 + 2 * 0.75**2), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- bad input


def bad_folders(home):
    """Folders that cannot be judged, by name."""
    write(home / "good", texture())
    write(home / "fewer", texture()[:3])
    write(home / "smaller", texture(4, 32))
    write(home / "others", texture(), ["00", "01", "02", "x"])
    write(home / "tiny", texture()[:, :8, :8])
    mixed = write(home / "sizes", texture())
    iio.imwrite(mixed / "02.png", np.zeros((20, 20, 3), np.uint8))
    (home / "empty").mkdir()
    (home / "text").mkdir()
    (home / "text" / "a.txt").write_text("no picture")
    damaged = write(home / "damaged", texture())
    (damaged / "01.png").write_text("no picture")
    (home / "film.mp4").write_text("no film")
    iio.imwrite(write(home / "twice", texture()) / "02.jpg", np.zeros((SIZE, SIZE, 3), np.uint8))
    os.mkfifo(home / "pipe")
    (home / "poses.json").write_text('{"frames": []}')


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("good fewer", r"fewer: 03 is in .*good but not in .*fewer; expected the same names"),
        ("good smaller", r"smaller: views of 32x48, but those of .*good are 48x48; one size"),
        ("good others", r"others: 03 is in .*good but not in .*others"),
        ("good sizes", r"02.png: 20x20, but 00.png 48x48; one size"),
        ("good empty", r"empty: no frames in this folder; expected pictures"),
        ("text good", r"text: no frames in this folder; expected pictures"),
        ("good damaged", r"01.png: cannot be decoded .*expected a whole PNG"),
        ("good nowhere", r"nowhere: no such file; expected a video or a folder"),
        ("good film.mp4", r"film.mp4: no frame can be decoded"),
        ("tiny tiny", r"tiny: views of 8x8; expected at least 16"),
        ("good good --truth fewer", r"fewer: 03 is in .*good"),
        ("good good --truth good good", r"--truth: .*good is given twice"),
        ("good good --cameras nowhere.json", r"--cameras: .*nowhere.json: no such file"),
        ("good good --cameras poses.json", r"--cameras: .*poses.json: frames: \[\]; expected a non-empty list"),
        ("good good --depth good", r"--depth says where surfaces are only together with --cameras"),
        ("good good --json good/00.png", r"--json: good/00.png is one of the pictures that are judged"),
        (
            "good good --page poses.json --cameras poses.json",
            r"--page: poses.json .* belongs to them",
        ),
        ("good good --clip ~nobody_at_all/x", r"CLIP: ~nobody_at_all/x: there is no such user"),
        ("good good --clip " + "x" * 300, r"CLIP: x+… cannot be a path: it is too long"),
        ("good good --captions a \udcff", r"--captions: expected two texts of UTF-8"),
        ("good good --clip=", r"--clip: expected a name, got nothing; none leaves CLIP out"),
        ("good twice", r"twice: 02.jpg and 02.png are two pictures of one name; keep one"),
        ("good good --json pipe", r"--json: pipe is a pipe or a device; give the name of a file"),
        ("good good --page /dev/null", r"--page: /dev/null is a pipe or a device"),
        ("good good --json x --page ./x", r"--json and --page: both are x; give each a file of its own"),
        ("good good --cameras empty", r"--cameras: empty: a folder; expected a transforms.json"),
        ("good good --cameras " + "x" * 300, r"argument --cameras: x+… cannot be a path: it is too long"),
        ("~nobody_at_all/good good", r"argument BEFORE: ~nobody_at_all/good: there is no such user"),
        ("good go\udcffod", r"argument AFTER: .* is not UTF-8; rename it"),
        ("good good --every 0", r"--every: 0; expected at least 1"),
        ("good good --json empty", r"--json: '.*empty' is a folder"),
        ("good good --page nowhere/x.html", r"--page: .*nowhere is no folder"),
        ("good good --clip none --captions a b", r"--captions are compared by a CLIP"),
        ("good good --clip no/such/clip", r"CLIP: 'no/such/clip' is no folder"),
        ("good good --clip open_clip:ViT", r"open_clip"),
        ("good", r"the following arguments are required: AFTER"),
        ("good good --depth-unit nan", r"--depth-unit: nan; expected a positive number"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, capsys, monkeypatch, words, told):
    bad_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    try:
        code = score(*words.split(), *([] if "--json" in words else ["--json", "out.json"]))
    except SystemExit as stop:  # argparse's
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert len(error.splitlines()) == 1
    assert re.search(told, error), error
    assert sorted(tmp_path.rglob("*")) == before


BAD_DEPTHS = {
    "object": (np.array([{}], object), "cannot be read as .npy"),
    "flat": (np.zeros(9, np.float32), r"an array \[9\]; expected \[H, W\]"),
    "wide": (np.ones((4, 9), np.float32), "9x4, the views are 48x48"),
    "cut off": ("{'descr': '<f4', 'shape': (", "cannot be read as .npy"),
    "huge": ("{'descr': '<f4', 'fortran_order': False, 'shape': (2305843009213693952, 4)}", "cannot be read as .npy"),
    "endless": (f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**40}, 1)}}", "cannot be read as .npy"),
    "words": (np.array([["a"]]), "holds no plain numbers"),
}


@pytest.mark.parametrize("kind", BAD_DEPTHS)
def test_hostile_depth_maps(ball, tmp_path, capsys, kind):
    array, told = BAD_DEPTHS[kind]
    for i in range(6):
        if isinstance(array, str):  # a header alone
            head = array.ljust(117) + "\n"
            (tmp_path / f"{i:02}.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + head.encode())
        else:
            np.save(tmp_path / f"{i:02}.npy", array, allow_pickle=True)
    words = (ball / "before", ball / "before", "--cameras", ball / "transforms.json", "--depth", tmp_path)
    assert score(*words, "--clip", "none") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(told, error), error


def test_depth_that_is_missing_or_shallow(ball, tmp_path, capsys):
    words = (ball / "before", ball / "before", "--cameras", ball / "transforms.json", "--clip", "none", "--depth")
    assert score(*words, tmp_path) == 2
    assert "has no 00.npy or 00.png, and 0 maps in all" in capsys.readouterr().err
    assert score(*words, ball / "before") == 2
    assert "has 8 bits a pixel; expected a depth map of 16" in capsys.readouterr().err
    normals = np.full((SIZE, SIZE, 3), (1000, 2000, 3000), np.uint16)
    for i in range(6):
        cv2.imwrite(str(tmp_path / f"{i:02}.png"), normals)
    assert score(*words, tmp_path) == 2
    assert "is a picture in colours; expected a depth map of one channel" in capsys.readouterr().err


def test_a_picture_beside_an_array_of_depth_is_left_alone(ball, tmp_path, capsys):
    write(tmp_path / "depth", [np.zeros((SIZE, SIZE, 3))] * 6)
    for i in range(6):
        np.save(tmp_path / "depth" / f"{i:02}.npy", np.full((SIZE, SIZE), 1e300))  # so far that it is no surface
    words = (ball / "before", ball / "before", "--cameras", ball / "transforms.json", "--clip", "none")
    assert score(*words, "--depth", tmp_path / "depth") == 0
    assert capsys.readouterr().err == ""
