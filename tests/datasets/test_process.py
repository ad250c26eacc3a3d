"""Films and photos to posed datasets: a rendered film with known poses, and inputs that are no use."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

import launch
from benchmarks.process import camera_rows, true_errors, write_film
from csd3d.datasets import SceneConfig, load_capture, process
from csd3d.datasets.listing import find_reader
from csd3d.datasets.process import apart
from csd3d.datasets.process.film import Film
from csd3d.datasets.process.frames import Look, pick
from csd3d.datasets.process.photos import exif_focal
from csd3d.datasets.process.poses import LEAST_SHIFT, agreed_focals, make_pairs, shift_seen
from csd3d.datasets.readers import photos
from csd3d.errors import InputError
from csd3d.media import decoding, open_video
from csd3d.temporary import TemporaryFolder

ROOT = Path(__file__).parents[2]
WIDTH, HEIGHT, COUNT = 320, 240, 16


def texture(width: int, height: int, seed: int) -> np.ndarray:
    """Random blots of several sizes in pixels: [height, width, 3] uint8."""
    rng = np.random.default_rng(seed)
    layers = [cv2.resize(rng.random((height // s, width // s, 3)), (width, height)) for s in (8, 16, 40)]
    values = sum(layers) / len(layers)
    return (255 * (values - values.min()) / np.ptp(values)).astype(np.uint8)


def blurred(picture: np.ndarray) -> np.ndarray:
    """Without detail, but with all of its contrast."""
    values = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 9)
    return (255 * (values - values.min()) / np.ptp(values)).astype(np.uint8)


def turning(count: int) -> np.ndarray:
    """What a camera on a tripod sees that turns by 3 degrees a frame."""
    world, k = texture(1400, 700, 0), np.array([[300.0, 0, WIDTH / 2], [0, 300, HEIGHT / 2], [0, 0, 1]])
    plane = np.array([[300.0, 0, 700], [0, 300, 350], [0, 0, 1]])
    frames = []
    for i in range(count):
        turn, _ = cv2.Rodrigues(np.array([0, math.radians(3 * (i - count / 2)), 0]))
        frames.append(cv2.warpPerspective(world, k @ turn @ np.linalg.inv(plane), (WIDTH, HEIGHT)))
    return np.stack(frames)


def box(rows: np.ndarray) -> np.ndarray:
    """A textured box on a textured floor through cameras `rows` [F, 16], painted from the back: the floor, then sides.

    A wall is an origin and two edges; its texture of 400x400 reaches the picture by the homography of its plane.
    """
    walls = [((-2, -2, -0.9), (4, 0, 0), (0, 4, 0))]
    for k in range(4):
        c, s = math.cos(k * math.pi / 2), math.sin(k * math.pi / 2)
        walls.append(((0.6 * (c + s), 0.6 * (s - c), -0.1), (0, 0, -0.8), (-1.2 * s, 1.2 * c, 0)))
    walls.append(((-0.6, -0.6, -0.1), (1.2, 0, 0), (0, 1.2, 0)))
    textures = [texture(400, 400, i) for i in range(len(walls))]
    frames = np.full((len(rows), HEIGHT, WIDTH, 3), 128, np.uint8)
    for frame, row in zip(frames, rows.astype(float), strict=True):
        pose, (fx, fy, cx, cy) = row[:12].reshape(3, 4), row[12:]
        k = np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]]) @ np.diag([1.0, -1, -1]) @ pose[:, :3].T
        for i, (origin, across, down) in enumerate(np.array(walls, float)):
            facing = np.cross(across, down) @ (pose[:, 3] - origin) > 0
            if facing:
                plane = k @ np.stack((across / 400, down / 400, origin - pose[:, 3]), axis=1)
                show = cv2.warpPerspective(textures[i], plane, (WIDTH, HEIGHT))
                covered = cv2.warpPerspective(np.ones((400, 400), np.uint8), plane, (WIDTH, HEIGHT)) > 0
                frame[covered] = show[covered]
    return frames


@pytest.fixture(scope="module")
def rows():
    return camera_rows(COUNT, WIDTH, HEIGHT, turn_deg=220)


@pytest.fixture(scope="module")
def world(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("world") / "film.mp4"
    write_film(path, box(rows))
    return path


@pytest.fixture(scope="module")
def dataset(world):
    folder = world.parent / "dataset"
    report = process.process(world, folder)
    return folder, report


# --- what is found ---


def test_the_poses_are_the_true_ones(dataset, rows):
    folder, report = dataset
    posed, turned, moved = true_errors(folder, rows)
    assert posed >= 0.9 * COUNT
    assert turned.max() < 0.3
    assert moved.max() < 0.005
    assert report["frames_posed"] == posed
    assert 0 < report["reprojection_error_px"] < 1
    assert report["components"][0] == posed


def test_the_dataset_is_a_capture_with_points_in_front_of_the_cameras(dataset):
    folder, report = dataset
    assert sorted(path.name for path in folder.iterdir()) == [
        *("images", "process.json", "report.txt", "sparse.ply", "transforms.json")
    ]
    assert not list(folder.parent.glob(".dataset*"))
    capture = load_capture(SceneConfig(str(folder)))
    assert capture.cameras.distortion is None
    assert len(capture.points.xyz) == report["points"] > 100
    for i in range(len(capture.cameras)):
        pixels, depth = capture.cameras.project(capture.cameras.fx.new_tensor(capture.points.xyz), i)
        assert (depth > 0).float().mean() > 0.99
        inside = (pixels > 0).all(1) & (pixels[:, 0] < capture.cameras.width) & (pixels[:, 1] < capture.cameras.height)
        assert inside.float().mean() > 0.7
    assert json.loads((folder / "process.json").read_text()) == report
    assert f"{report['frames_posed']} of {COUNT} posed" in (folder / "report.txt").read_text()


def test_the_result_does_not_depend_on_the_number_of_threads(dataset, world, tmp_path, monkeypatch):
    folder, _ = dataset
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    process.process(world, tmp_path / "again")
    for name in ("transforms.json", "sparse.ply"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


# --- which frames ---


def looks(sharpness) -> list[Look]:
    rng = np.random.default_rng(0)
    return [Look(value, rng.uniform(0, 255, (32, 32))) for value in sharpness]


def test_the_sharpest_frame_of_each_part_is_taken():
    found, chosen = pick(looks([1, 5, 2, 3, 2, 9, 4, 4.5, 1]), 3)
    assert found == [1, 5, 7]
    assert (chosen.blurred, chosen.repeated) == (0, 0)


def test_blurred_frames_and_repetitions_are_left_out():
    seen = looks([5.0] * 12)
    seen[3] = Look(0.5, seen[3].thumbnail)
    seen[8] = Look(5.0, seen[7].thumbnail + 0.1)
    found, chosen = pick(seen, 100)
    assert found == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    assert (chosen.blurred, chosen.repeated) == (1, 1)


def test_pairs():
    assert len(make_pairs(40, "auto", True)) == len(make_pairs(40, "exhaustive", True)) == 40 * 39 / 2
    near = make_pairs(300, "auto", True)
    assert len(near) == len(set(near)) < 300 * 20
    assert {(5, 6), (5, 15), (5, 21), (0, 288)} <= set(near)
    assert all(i < j < 300 for i, j in near)


def test_a_turning_camera_is_told_from_one_that_moves_before_a_wall():
    k = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    rng = np.random.default_rng(0)
    turns = np.stack([cv2.Rodrigues(rng.uniform(-0.3, 0.3, 3))[0] for _ in range(20)])
    assert shift_seen(k @ turns @ np.linalg.inv(k) * 7, (640, 480)) < 0.5 * LEAST_SHIFT
    moves = np.eye(3) + rng.uniform(-0.3, 0.3, (20, 3, 1)) * np.array([0, 0, 1.0])  # t n^T / d
    assert shift_seen(k @ turns @ moves @ np.linalg.inv(k) * 7, (640, 480)) > 0.1


# --- bad input ---


def refusal(source, output, **arguments) -> str:
    with pytest.raises(InputError) as caught:
        process.process(source, output, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert not output.exists()
    assert not list(output.parent.glob(".out*"))
    return message


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        (lambda: np.stack([texture(WIDTH, HEIGHT, i) for i in range(5)]), "5 usable frames"),
        (lambda: np.stack([texture(WIDTH, HEIGHT, 0)] * 40), "the same as the one before"),
        (lambda: np.stack([blurred(texture(WIDTH, HEIGHT, i)) for i in range(10)]), "too blurred"),
        (lambda: np.stack([texture(WIDTH, HEIGHT, i) for i in range(9)]), "nothing matched"),
        (lambda: turning(12), "parallax"),
    ],
    ids=["short", "still", "blurred", "unrelated", "tripod"],
)
def test_films_without_use_are_refused_in_one_line(tmp_path, pictures, said):
    write_film(tmp_path / "film.mp4", pictures())
    assert said in refusal(tmp_path / "film.mp4", tmp_path / "out")


def test_what_is_no_film_is_refused_in_one_line(tmp_path, world):
    assert "no such" in refusal(tmp_path / "missing.mp4", tmp_path / "out")
    (tmp_path / "text.mp4").write_text("no film")
    assert "no frame can be decoded (it is no video)" in refusal(tmp_path / "text.mp4", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "no photos in this folder" in refusal(tmp_path / "empty", tmp_path / "out")
    assert "--frames" in refusal(world, tmp_path / "out", frames=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("")
    with pytest.raises(InputError, match="not empty"):
        process.process(world, tmp_path / "full")
    assert (tmp_path / "full/mine.txt").exists()


def test_a_killed_ffmpeg_slivers_of_photos_and_names_that_are_too_long_are_refused(tmp_path, world, monkeypatch):
    (tmp_path / "thin").mkdir()
    Image.fromarray(np.zeros((1, 5000, 3), np.uint8)).save(tmp_path / "thin/a.png")
    assert "5000x1 pixels; expected at least 32" in refusal(tmp_path / "thin", tmp_path / "out")
    with pytest.raises(InputError, match="File name too long"):
        process.process(world, tmp_path / ("a" * 300))
    monkeypatch.setattr(decoding, "killed", lambda code: "it was killed by signal 9 (SIGKILL)")
    assert "killed by signal 9" in refusal(world, tmp_path / "out")


def test_without_pycolmap_the_message_says_how_to_install_it(tmp_path, world, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    assert 'pip install -c constraints.txt -e ".[process]"' in refusal(world, tmp_path / "out")


def test_the_command_line_ends_with_2_and_one_line(tmp_path, capsys):
    assert launch.main(["process", str(tmp_path / "none.mp4"), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_leaves_nothing(tmp_path, world):
    command = [sys.executable, "-c", "import sys, launch; sys.exit(launch.main())", "process", str(world)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    running = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's "&" has it ignored
    )
    for line in running.stdout:  # until COLMAP is at work
        if "chosen" in line:
            break
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "nothing was written" in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path, world, monkeypatch):
    program = f"""
import os, pathlib, tempfile
from csd3d.datasets import process
tempfile.tempdir = {str(tmp_path)!r}
process._into = lambda *_: os.kill(os.getpid(), 9)
process.process(pathlib.Path({str(world)!r}), pathlib.Path({str(tmp_path / "first")!r}))
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert sorted(name.rsplit("-", 1)[0] for name in left) == [".first.partial", "csd3d-process"]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "text.mp4").write_text("no film")
    assert "no video" in refusal(tmp_path / "text.mp4", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["text.mp4"]


def die(_folder, told):
    told("at work")
    os.write(2, b"  what():  [database_sqlite.cc:1389] SQLite error: database or disk is full\n")
    os.abort()


def double(value, told):
    told(f"doubling {value}")
    print("what a library prints is no answer")
    return 2 * value


def refuse(_value, _told):
    raise InputError("no")


def test_colmap_may_die_without_csd3d_dying_of_it(tmp_path):
    lines = []
    assert apart.call(double, 21, tell=lines.append, folder=tmp_path) == 42
    with pytest.raises(InputError, match=r"disk is full: free some space, or set TMPDIR"):
        apart.call(die, 0, tell=lines.append, folder=tmp_path)
    with pytest.raises(InputError, match=r"^no$"):
        apart.call(refuse, 0, tell=lines.append, folder=tmp_path)
    with pytest.raises(InputError, match="memory runs out"):
        apart.call(kill_itself, tell=lines.append, folder=tmp_path)
    assert lines == ["doubling 21", "at work"]


def kill_itself(_told):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def without_work(monkeypatch):
    """Films and photos that end in an empty dataset."""
    monkeypatch.setattr(process, "_into", lambda folder, *_: {"to": folder})


def test_what_cannot_be_replaced_in_the_end_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_into", lambda *_: pytest.fail("worked before the refusal"))
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    held = TemporaryFolder(process.KIND, beside=tmp_path / "made")
    with held, pytest.raises(InputError, match="another process is making"):
        process.process(tmp_path, tmp_path / "made")
    with pytest.raises(InputError, match="file is no folder"):
        process.process(tmp_path, tmp_path / "file" / "below")
    monkeypatch.chdir(here)
    with pytest.raises(InputError, match="current folder"):
        process.process(tmp_path, Path())
    monkeypatch.setattr(os.path, "ismount", lambda place: Path(place) == tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(InputError, match="mount point"):
        process.process(tmp_path, tmp_path / "volume")


def test_the_output_may_be_a_link_to_a_folder_that_is_empty_or_not_there(tmp_path, without_work):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
        process.process(tmp_path, tmp_path / f"to-{name}")
        assert (tmp_path / name).is_dir()
        assert (tmp_path / f"to-{name}").is_symlink()


def test_a_refusal_leaves_no_folders_above_the_output(tmp_path):
    with pytest.raises(InputError, match="no such film"):
        process.process(tmp_path / "none.mp4", tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_the_file_that_could_not_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "read", None, "written")

    monkeypatch.setattr(process, "_into", full)
    with pytest.raises(InputError, match=r"^written: No space left on device; free some space"):
        process.process(tmp_path, tmp_path / "out")


def test_a_reader_of_the_progress_that_stops_early_does_not_stop_the_work(tmp_path, world):
    command = [sys.executable, "-c", "import sys, launch; sys.exit(launch.main())", "process", str(world)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = tmp_path / "out"
    with subprocess.Popen([*command, "--output", str(output)], stdout=subprocess.PIPE, env=environment) as running:
        running.stdout.close()
        assert running.wait(timeout=300) == 0
    assert (output / "transforms.json").is_file()


# --- films and photos as they come ---


def small_film(path, filters, *arguments):
    made = ["-f", "lavfi", "-i", f"testsrc2=size=64x48:rate=12:duration=1,{filters}", *arguments, path]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, made)], check=True)
    return path


def test_hdr_transparency_and_turned_films_are_as_in_video_editing(tmp_path):
    hdr = "zscale=pin=709:tin=709:min=gbr:rin=pc:p=2020:t=smpte2084:m=2020_ncl:r=tv:npl=203,format=yuv444p10le"
    tags = ["-color_trc", "smpte2084", "-color_primaries", "bt2020", "-colorspace", "bt2020nc"]
    half = "format=rgba,geq=r=p(X\\,Y):g=p(X\\,Y):b=p(X\\,Y):a=if(lt(X\\,32)\\,255\\,0)"
    films = [
        small_film(tmp_path / "hdr.mkv", f"format=gbrp,{hdr}", "-c:v", "ffv1", *tags),
        small_film(tmp_path / "alpha.mov", half, "-c:v", "png"),
        small_film(tmp_path / "plain.mp4", "format=yuv444p"),
    ]
    turn = ["-display_rotation", "90", "-i", films[-1], "-c", "copy", tmp_path / "turned.mp4"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *map(str, turn)], check=True)
    for path in (*films, tmp_path / "turned.mp4"):
        told = []
        film = Film(path, told.append)
        assert len(list(film.in_small(640))) == 12
        with open_video(path) as video:
            assert told == video.warnings
            wanted = video.frames([3, 7])
        found = np.stack(list(film.chosen([3, 7])))
        assert found.shape == wanted.shape
        assert np.abs(found.astype(int) - wanted).mean() < 2


def test_pixels_become_square(tmp_path):
    film = Film(small_film(tmp_path / "a.mp4", "setsar=16/9,format=yuv420p"), print)
    assert next(film.in_small(640)).shape == (48, 114)
    assert next(film.chosen([2])).shape == (48, 114, 3)


def test_the_focal_length_of_exif():
    assert exif_focal({0xA405: 26}, 400, 300) == pytest.approx(26 / math.hypot(36, 24) * 500)
    assert exif_focal({0x920A: 50.0, 0xA20E: 4000 / 36, 0xA210: 4}, 4000, 3000) == pytest.approx(50 * 4000 / 36)
    for tags in ({}, {0xA405: 0}, {0xA405: "x"}, {0xA405: 65000}, {0x920A: 50.0}, {0x920A: 5.0, 0xA20E: 1.0}):
        assert exif_focal(tags, 4000, 3000) is None
    big, small = (400, 300), (300, 400)
    sizes = [big, big, small, small]
    assert agreed_focals(sizes, [300.0, 301.0, 300.0, 330.0]) == {big: 300.5}
    assert agreed_focals(sizes, [300.0, None, 310.0, 310.0]) == {small: 310.0}


def test_photos_begin_from_the_focal_length_of_their_exif(tmp_path, rows):
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    focal = float(rows[0][12])
    exif.get_ifd(0x8769)[0xA405] = round(focal * math.hypot(36, 24) / math.hypot(WIDTH, HEIGHT))
    for i, frame in enumerate(box(rows[:10])):
        Image.fromarray(frame).save(tmp_path / f"photos/{i}.jpg", quality=95, exif=exif)
    told = []
    report = process.process(tmp_path / "photos", tmp_path / "out", tell=told.append)
    assert any("from their EXIF" in line for line in told)
    assert report["frames_posed"] == 10
    found = json.loads((tmp_path / "out/transforms.json").read_text())["frames"][0]["fl_x"]
    assert found == pytest.approx(focal, rel=0.03)


def test_two_places_in_one_film_give_the_larger_one(tmp_path, rows):
    other = np.rot90(box(rows[:8]), 2, (1, 2))[:, :, :, ::-1]  # nothing of it is in the first
    there = cv2.GaussianBlur(texture(WIDTH, HEIGHT, 99), (0, 0), 1)
    frames = np.concatenate((box(rows[:12]), there[None], 255 - other))
    write_film(tmp_path / "film.mp4", frames)
    report = process.process(tmp_path / "film.mp4", tmp_path / "out")
    assert len(report["components"]) == 2
    assert report["frames_posed"] == report["components"][0] > report["components"][1]
    assert "parts that do not connect: the largest is kept" in (tmp_path / "out/report.txt").read_text()


def test_photos_that_cannot_be_read_are_counted(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.fromarray(texture(WIDTH, HEIGHT, i)).save(tmp_path / f"photos/{i}.jpg")
        if i % 2:
            (tmp_path / f"photos/{i}.jpg").write_bytes((tmp_path / f"photos/{i}.jpg").read_bytes()[:900])
    said = refusal(tmp_path / "photos", tmp_path / "out")
    assert "1.jpg: cannot be decoded" in said
    assert said.endswith("and 2 more of 6 photos are of no use")


def test_frames_of_one_colour_and_tiny_films_give_no_warnings(tmp_path, recwarn):
    write_film(tmp_path / "film.mp4", np.stack([np.full((HEIGHT, WIDTH, 3), 20 * i, np.uint8) for i in range(12)]))
    assert "too blurred" in refusal(tmp_path / "film.mp4", tmp_path / "out")
    tiny = small_film(tmp_path / "tiny.mp4", "scale=16:16,format=yuv420p")
    assert "expected at least 32 a side" in refusal(tiny, tmp_path / "out")
    assert [str(each.message) for each in recwarn if issubclass(each.category, RuntimeWarning)] == []


# --- a folder of photos as a capture ---


def test_photos_are_processed_once_and_again_when_they_change(tmp_path, monkeypatch, dataset):
    calls = []

    def stand_in(source, output, *_, named_by):
        calls.append(source)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.symlink_to(dataset[0])

    monkeypatch.setattr(photos, "process", stand_in)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(texture(40, 40, i)).save(folder / f"{i}.png")
    assert type(find_reader(folder)).__name__ == "Photos"
    for _ in range(2):
        assert len(find_reader(folder).read(folder).frames) == dataset[1]["frames_posed"]
    assert len(calls) == 1
    Image.fromarray(texture(40, 40, 9)).save(folder / "1.png")
    find_reader(folder).read(folder)
    assert len(calls) == 2
    (folder / "notes.txt").write_text("")
    with pytest.raises(InputError, match="holds nothing that a reader knows"):
        find_reader(folder)


def test_a_cache_that_cannot_be_is_told_by_its_variable(tmp_path, monkeypatch):
    Image.fromarray(texture(40, 40, 0)).save(tmp_path / "0.png")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "0.png"))
    with pytest.raises(InputError, match=r"^XDG_CACHE_HOME: .*0\.png is no folder"):
        photos.Photos().read(tmp_path)
