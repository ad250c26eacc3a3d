"""When frames are shown: a flash and a beep of the same moment stay together, whatever the clock of the file."""

import re
import subprocess
from fractions import Fraction

import imageio_ffmpeg
import numpy as np
import pytest

from csd3d.canvas.clip import open_clip
from csd3d.media import frame_writer, open_video
from csd3d.media.timing import read_timing
from csd3d.report.canvas import result_writer

FLASH = 2.0  # seconds


def ffmpeg(*arguments):
    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-hide_banner", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def lapse(path):
    """Seconds from the flash to the beep, as ffmpeg plays the file."""
    watch = ["-vf", "signalstats,metadata=mode=print:key=lavfi.signalstats.YAVG", "-fps_mode", "passthrough"]
    log = ffmpeg("-i", path, *watch, "-af", "silencedetect=noise=-30dB:d=0.05", "-f", "null", "-")
    # lines about the sound come in between
    seen = re.findall(r"pts_time:(\S+)(?:.*\n)+?.*YAVG=(\S+)", log)
    flash = next(float(time) for time, light in seen if float(light) > 120)
    beep = float(re.search(r"silence_end: (\S+)", log)[1])
    return beep - flash


def flash_and_beep(path, video=(), frames="", before=(), codecs=("-c:v", "libx264", "-bf", 2, "-c:a", "aac")):
    """A film of 4 s, black but for 0.25 s from FLASH on, silent but for a beep then."""
    source = (
        f"color=black:size=32x32:rate=24:duration=4,drawbox=enable='between(t,1.99,2.24)':color=white:t=fill{frames}"
    )
    sound = f"sine=880:sample_rate=48000:duration=4,volume=0:enable='not(between(t,{FLASH},2.25))'"
    ffmpeg(*before, "-f", "lavfi", "-i", source, *video, "-f", "lavfi", "-i", sound, *codecs,
           "-pix_fmt", "yuv420p", "-fps_mode", "passthrough", path)  # fmt: skip
    return path


def edited(path, folder):
    """The file as an edit that changes nothing would write it."""
    clip = open_clip(str(path))
    with result_writer(folder / "result.mp4", clip) as add:
        for i in range(clip.count):
            add(clip.read([i])[0])
    return folder / "result.mp4"


def shifted(path, source, late):
    """The pictures (late > 0) or the sound (late < 0) begin later: cut off, with what remains at its own time."""
    cut = f"select='gte(t,{late})'" if late > 0 else "null"
    silence = f"aselect='gte(t,{-late})'" if late < 0 else "anull"
    ffmpeg("-i", source, "-vf", cut, "-af", silence, "-fps_mode", "passthrough", "-c:a", "aac", path)
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("late", [0.5, -0.5])
def test_a_stream_that_begins_later_stays_in_step(tmp_path, suffix, late):
    whole = flash_and_beep(tmp_path / "whole.mkv")
    source = shifted(tmp_path / f"late.{suffix}", whole, late)
    assert abs(lapse(source)) < 0.05  # AAC begins with up to 45 ms of silence, which not every container counts
    with open_video(source) as video:
        assert float(video.start) == pytest.approx(max(late, 0), abs=0.09)
        assert video.times is None
    assert abs(lapse(edited(source, tmp_path)) - lapse(source)) < 0.005


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_of_unequal_length_keep_their_times(tmp_path, suffix):
    """24 frames a second at first, 8 later; and one of a camera that drifts."""
    uneven = ",select='if(lt(t,1),1,not(mod(n,3)))'"
    source = flash_and_beep(tmp_path / f"vfr.{suffix}", frames=uneven)
    with open_video(source) as video:
        assert re.search("between 4[12] and 125 ms", video.warnings[0])
        assert "keeps their times" in video.warnings[0]
        assert video.count == 24 + 24
        assert float(video.times[-1]) == pytest.approx(4, abs=0.1)
    result = edited(source, tmp_path)
    assert abs(lapse(result)) < 0.02
    with open_video(result) as video:
        assert video.count == 48
        assert np.allclose(
            np.diff([float(t) for t in video.times])[[0, 10, 30, 46]], [1 / 24] * 2 + [1 / 8] * 2, atol=2e-3
        )


def test_a_camera_whose_rate_changes_a_little_does_not_drift(tmp_path):
    source = flash_and_beep(tmp_path / "drift.mp4", frames=",setpts='if(lt(T,1),PTS,PTS+0.2*(PTS-1/TB))'")
    expected = lapse(source)  # −0.2 s, as the pictures were slowed down
    assert abs(lapse(edited(source, tmp_path)) - expected) < 0.02


def test_the_last_frame_keeps_its_length_and_frames_their_picture(tmp_path):
    times = [Fraction(t) for t in ("0", "1/10", "1/8", "1", "3/2")]
    frames = [np.full((16, 16, 3), 60 * i, np.uint8) for i in range(4)]
    with frame_writer(tmp_path / "a.mp4", 4, times=times) as add:
        for frame in frames:
            add(frame)
    with open_video(tmp_path / "a.mp4") as video:
        assert [float(t) for t in video.times] == pytest.approx([float(t) for t in times], abs=1e-4)
        assert video.frames(range(4))[:, 8, 8, 0].tolist() == pytest.approx([0, 60, 120, 180], abs=3)


def test_frames_without_a_time_are_refused(tmp_path):
    def write():
        with frame_writer(tmp_path / "b.mp4", 4, times=[Fraction(0), Fraction(1)]) as add:
            add(np.zeros((16, 16, 3), np.uint8))
            add(np.zeros((16, 16, 3), np.uint8))

    with pytest.raises(ValueError, match="more frames than the 1"):
        write()


def test_recordings_that_were_joined_lose_no_frame(tmp_path):
    part = flash_and_beep(tmp_path / "a.ts")
    (tmp_path / "joined.ts").write_bytes(2 * part.read_bytes())
    with open_video(tmp_path / "joined.ts") as video:
        assert (video.count, video.fps, video.warnings) == (192, 24, [])
        light = video.frames(range(192)).mean((1, 2, 3))
    assert np.array_equal(light[:96] > 120, light[96:] > 120)


def test_damage_in_a_transport_stream_is_noticed(tmp_path):
    data = bytearray(flash_and_beep(tmp_path / "a.ts").read_bytes())
    at = 188 * (len(data) // 188 // 2)
    data[at : at + 188 * 20] = np.random.default_rng(0).bytes(188 * 20)
    (tmp_path / "bad.ts").write_bytes(data)
    with open_video(tmp_path / "bad.ts") as video:
        assert "damaged" in video.warnings[0]


def test_another_rate_leaves_the_sound_out_and_says_so(tmp_path):
    source = flash_and_beep(tmp_path / "a.mp4")
    with open_video(source, fps=12) as video:
        assert (video.fps, video.sound_from) == (12, None)
        assert "fps=12 instead of its own 24; the result has no sound" in video.warnings[0]
    with open_video(source, fps=24) as video:
        assert video.warnings == []


def test_clocks_that_run_backwards_or_are_missing_give_even_frames():
    packets = "#tb 0: 1/10\n#media_type 0: video\n" + "".join(f"0, {i}, {i}, 1, 9, 0x0\n" for i in range(3))
    stamps = "".join(f"frame:{i} pts:{pts} pts_time:0\n" for i, pts in enumerate((0, 500_000, 300_000)))
    found = read_timing(packets, stamps, 3, damaged=False)
    assert (found.rate, found.times, found.has_sound) == (10, None, False)
    assert read_timing(packets, stamps.replace("500000", "NOPTS"), 3, damaged=False).times is None
    assert read_timing("", "", 1, damaged=False).rate == 24


def test_a_dropped_frame_of_an_avi_stays_dropped(tmp_path):
    """The clock of an AVI counts whole frames, so that a frame's time differs by one unit: far more than 20 ms."""
    dropped = ",select='not(eq(n,2))'"
    codecs = ("-c:v", "mpeg4", "-c:a", "pcm_s16le")
    source = flash_and_beep(tmp_path / "dropped.avi", frames=dropped, codecs=codecs)
    with open_video(source) as video:
        assert video.count == 95
        assert [float(t) for t in video.times[:4]] == pytest.approx([0, 1 / 24, 3 / 24, 4 / 24], abs=1e-4)
    assert abs(lapse(edited(source, tmp_path)) - lapse(source)) < 0.005
