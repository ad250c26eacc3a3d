"""ffmpeg as another process: Ctrl+C does not reach it, its death is noticed, and what it leaves behind is removed."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import imageio_ffmpeg
import numpy as np
import pytest

from csd3d import temporary as folders
from csd3d.errors import InputError
from csd3d.media import decoding, encoding, frame_writer, open_video
from csd3d.media import ffmpeg as commands

SIZE = (256, 256, 3)


def noise(count):
    generator = np.random.default_rng(0)
    return (generator.integers(0, 255, SIZE, np.uint8) for _ in range(count))


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """60 frames."""
    path = tmp_path_factory.mktemp("film") / "a.mp4"
    made = ["-f", "lavfi", "-i", "testsrc2=size=320x240:rate=24:duration=2.5", "-pix_fmt", "yuv420p", path]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, made)], check=True)
    return path


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty TMPDIR."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def signalled(monkeypatch, module, number, after):
    """Every ffmpeg that the module starts gets a signal `after` seconds later; returns the processes."""
    started, real = [], commands.start

    def start(arguments, **pipes):
        process = real(arguments, **pipes)
        started.append(process)
        threading.Timer(after, process.send_signal, [number]).start()
        return process

    monkeypatch.setattr(module, "start", start)
    return started


@pytest.mark.parametrize(("number", "why"), [(signal.SIGKILL, r"signal 9 \(SIGKILL\)"), (signal.SIGINT, "interrupted")])
def test_a_killed_decoder_is_an_error_not_a_shorter_video(film, temporary, monkeypatch, number, why):
    monkeypatch.setattr(decoding, "read_pictures", slowly(decoding.read_pictures))
    signalled(monkeypatch, decoding, number, 0.3)
    with pytest.raises(InputError, match=rf"a.mp4: decoding stopped after \d+ frames.*{why}.*start again"):
        open_video(film)
    assert os.listdir(temporary) == []


def slowly(pictures):
    def generate(stream):
        for picture in pictures(stream):
            time.sleep(0.02)
            yield picture

    return generate


def test_a_killed_encoder_is_an_error(tmp_path, monkeypatch):
    started = signalled(monkeypatch, encoding, signal.SIGKILL, 0.3)

    def write():
        with frame_writer(tmp_path / "a.mp4", 24) as add:
            for frame in noise(200):
                add(frame)
                time.sleep(0.01)

    with pytest.raises(InputError, match=r"a.mp4: writing stopped after about \d+ frames .*signal 9 \(SIGKILL\)"):
        write()
    assert started[0].returncode == -signal.SIGKILL
    assert not (tmp_path / "a.mp4").exists()


def test_a_killed_muxer_is_an_error_not_a_video_without_sound(tmp_path, film, monkeypatch):
    done = subprocess.CompletedProcess([], -signal.SIGKILL, "", "")
    monkeypatch.setattr(encoding, "run", lambda arguments: done)

    def write():
        with frame_writer(tmp_path / "a.mp4", 24, sound_from=film) as add:
            add(np.zeros(SIZE, np.uint8))

    with pytest.raises(InputError, match=r"cannot be finished.*SIGKILL"):
        write()


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups there")
def test_ctrl_c_in_a_terminal_leaves_ffmpeg_alone(film, tmp_path):
    """A terminal sends SIGINT to the whole process group; a run that has taken note of it goes on to read and write."""
    program = f"""
from csd3d.interrupt import StopRequest
from csd3d.media import decoding, open_video, frame_writer
import time
with StopRequest() as stop:
    real = decoding.read_pictures
    decoding.read_pictures = lambda stream: (time.sleep(0.005) or picture for picture in real(stream))
    print("reading", flush=True)
    with open_video({str(film)!r}) as video, frame_writer({str(tmp_path / "b.mp4")!r}, 24) as add:
        print("writing", flush=True)
        for i in range(video.count):
            add(video.frames([i])[0])
            time.sleep(0.005)
        print(video.count, video.warnings, stop.requested, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.4)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert output.splitlines() == ["writing", "60 [] True"], errors
    with open_video(tmp_path / "b.mp4") as video:
        assert video.count == 60


def test_all_commands_run_in_a_session_of_their_own():
    script = "import os; print(os.getsid(0) == os.getpid())"
    assert commands.run([sys.executable, "-c", script]).stdout == "True\n"
    process = commands.start([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.communicate()[0] == b"True\n"


# ---------------------------------------------------------------------------------------------------------------- room


def test_the_decoded_video_is_limited(film, temporary, monkeypatch):
    frame = 320 * 240 * 3
    with pytest.raises(InputError, match=r"take more than 0.005 GiB; cut it .*, or raise max_decoded_gib"):
        open_video(film, max_decoded_gib=0.005)
    monkeypatch.setattr(decoding, "free_bytes", lambda folder: 20 * frame)
    with pytest.raises(InputError, match=r"90 % of the room in .*set TMPDIR to a folder with more room"):
        open_video(film)
    assert os.listdir(temporary) == []
    monkeypatch.setattr(decoding, "free_bytes", lambda folder: 70 * frame)
    with open_video(film, max_decoded_gib=61 * frame / 2**30) as video:
        assert video.count == 60


def test_temporary_folders_of_killed_processes_are_removed(film, temporary):
    """One is killed while it holds a video, one is alive."""
    program = f"""
import tempfile, time
tempfile.tempdir = {str(temporary)!r}
from csd3d.media import open_video
video = open_video({str(film)!r})
print("open", flush=True)
time.sleep(60)
"""
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert [process.stdout.readline() for process in both] == ["open\n"] * 2
        assert len(kept(temporary)) == 2
        both[0].kill()
        both[0].wait()
        with open_video(film):
            assert len(kept(temporary)) == 2  # of the one that is alive, and of this process
        assert len(kept(temporary)) == 1
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert len(folders.remove_abandoned(temporary)) == 1
    assert os.listdir(temporary) == []


def kept(folder):
    return [path for path in folder.glob("csd3d-video-*") if path.is_dir()]


def test_other_folders_are_left_alone(temporary):
    (temporary / "csd3d-video-without-a-lock").mkdir()
    (temporary / "csd3d-video-file").touch()
    (temporary / "other").mkdir()
    assert folders.remove_abandoned(temporary) == []
    made = folders.TemporaryFolder("video")
    assert made.path.is_dir()
    assert oct(made.path.stat().st_mode)[-3:] == "700"
    assert folders.remove_abandoned(temporary) == []
    made.close()
    made.close()
    assert len(os.listdir(temporary)) == 3


def test_a_process_killed_before_it_made_the_folder_or_after_it_was_renamed_leaves_nothing(tmp_path):
    """A lock file is all that is there then; and folders of one kind are found whatever their name."""
    (tmp_path / f".one.partial-abc{folders.LOCK}").touch()
    (tmp_path / f".two.partial-abc{folders.LOCK}").touch()
    (tmp_path / ".two.partial-abc/images").mkdir(parents=True)
    (tmp_path / ".mine.partial-abc").mkdir()
    with folders.TemporaryFolder("partial", beside=tmp_path / "out") as made:
        (made / "file").touch()
        assert made.name.startswith(".out.partial-")
        made.rename(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".mine.partial-abc", "out"]
    assert (tmp_path / "out/file").exists()


def test_a_lock_taken_for_left_over_before_it_was_held_is_made_again(temporary, monkeypatch):
    """Another process removes it between the making of the file and the lock."""
    real, calls = folders._try_to_lock, []

    def late(file):
        calls.append(file)
        if len(calls) == 1:
            for path in temporary.iterdir():
                path.unlink()
        return real(file)

    monkeypatch.setattr(folders, "_try_to_lock", late)
    made = folders.TemporaryFolder("video")
    assert len(calls) == 2
    assert len(os.listdir(temporary)) == 2
    made.close()
    assert os.listdir(temporary) == []


def test_without_a_temporary_folder(film, temporary):
    temporary.rmdir()
    with pytest.raises(InputError, match=r"a.mp4: its frames need a temporary folder .*; set TMPDIR"):
        open_video(film)


def test_a_cover_picture_is_no_video(tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    sound = ["-f", "lavfi", "-i", "sine=duration=1", "-i", tmp_path / "a.png", "-map", "0", "-map", "1"]
    made = [*sound, "-c:v", "png", "-disposition:v:0", "attached_pic", "-c:a", "aac", tmp_path / "a.mp4"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *map(str, made)], check=True)
    with pytest.raises(InputError, match="it holds no video, only sound or a cover picture"):
        open_video(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (b"", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(60), "it is a picture, PNG, not a film"),
        (b"II*\0" + bytes(60), "it is a picture, TIFF, not a film"),
        (b"\0\0\0\x01\x67\x64" + bytes(60), "it is H.264 without a container; put it in one: ffmpeg"),
        (b"\0\0\0\x18ftypisom" + bytes(12), "it breaks off before its index|it is damaged"),
        (b"some text", "it is no video|it is damaged, or no video"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400), "HEIC pictures are not read; convert it"),
    ],
    ids=["empty", "png", "tiff", "h264", "cut", "text", "heic"],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.bin"])
def test_what_is_no_film_is_named(tmp_path, start, why, name):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(InputError, match=rf"{name}: .*({why})"):
        open_video(tmp_path / name)


def test_too_many_pixels_are_told_in_our_words(film):
    with pytest.raises(InputError, match=r"320x240 pixels a frame; at most 1000 are read: .*, or raise max_pixels$"):
        open_video(film, max_pixels=1000)
