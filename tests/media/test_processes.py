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

from csd3d.errors import InputError
from csd3d.media import cache, decoding, encoding, frame_writer, open_video
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
        assert len(list(temporary.glob("csd3d-video-*"))) == 2
        both[0].kill()
        both[0].wait()
        with open_video(film):
            assert len(list(temporary.glob("csd3d-video-*"))) == 2  # of the one that is alive, and of this process
        assert len(os.listdir(temporary)) == 1
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert len(cache.remove_abandoned(temporary)) == 1


def test_other_folders_are_left_alone(temporary):
    (temporary / "csd3d-video-without-a-lock").mkdir()
    (temporary / "csd3d-video-file").touch()
    (temporary / "other").mkdir()
    assert cache.remove_abandoned(temporary) == []
    made = cache.FrameCache()
    assert made.path.is_dir()
    assert oct(made.path.stat().st_mode)[-3:] == "700"
    made.close()
    made.close()
    assert len(os.listdir(temporary)) == 3


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
