"""Pictures and videos in and out, against closed forms, ffmpeg's own encoders, and files meant to do harm."""

import os
import resource
import struct
import subprocess
import sys
import tracemalloc
import zlib
from fractions import Fraction

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageOps

from csd3d.errors import InputError
from csd3d.files import natural_key
from csd3d.media import Picture, frame_writer, open_video, read_image, write_image
from csd3d.media.timing import frame_rate


def ffmpeg(*arguments, data=None):
    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], input=data, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def encoded_by_ffmpeg(path, levels, layout, *options):
    """[H, W, C] uint16 as a picture file, by an encoder that shares no code with what is tested."""
    height, width = levels.shape[:2]
    raw = ["-f", "rawvideo", "-pix_fmt", layout, "-video_size", f"{width}x{height}", "-i", "-"]
    ffmpeg(*raw, *options, "-frames:v", 1, "-update", 1, path, data=levels.astype(">u2").tobytes())
    return path


def deep_levels(channels, height=5, width=7):
    return np.random.default_rng(channels).integers(0, 2**16, (height, width, channels), dtype=np.uint16)


def write_frames(path, frames, fps, **options) -> None:
    with frame_writer(path, fps, **options) as add:
        for frame in frames:
            add(frame)


def pattern(count, height, width):
    """Frames that are smooth, so that they survive H.264, and all different."""
    y, x = np.mgrid[:height, :width]
    for i in range(count):
        yield np.stack([x * 200 // width, y * 200 // height, (2 * x + 12 * i) % 200], -1).astype(np.uint8)


def one_line(error):
    return "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize(("layout", "channels"), [("gray16be", 1), ("ya16be", 2), ("rgb48be", 3), ("rgba64be", 4)])
@pytest.mark.parametrize("options", [(), ("-flags", "+ildct")], ids=["", "interlaced"])
def test_sixteen_bits_arrive_exactly(tmp_path, layout, channels, options):
    levels = deep_levels(channels)
    picture = read_image(encoded_by_ffmpeg(tmp_path / "a.png", levels, layout, *options))
    assert picture.bits == 16
    colours = levels[:, :, :-1] if channels in (2, 4) else levels
    assert np.array_equal(np.round(picture.rgb * 65535), np.broadcast_to(colours, (5, 7, 3)))
    if channels in (2, 4):
        assert np.array_equal(np.round(picture.alpha * 65535), levels[:, :, -1])
    else:
        assert picture.alpha is None


def test_sixteen_bits_of_tiff_arrive_exactly(tmp_path):
    levels = deep_levels(3)
    picture = read_image(encoded_by_ffmpeg(tmp_path / "a.tiff", levels, "rgb48be", "-pix_fmt", "rgb48le"))
    assert np.array_equal(np.round(picture.rgb * 65535), levels)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("has_alpha", [False, True])
def test_png_comes_back_as_written(tmp_path, bits, has_alpha):
    top = 2**bits - 1
    levels = np.random.default_rng(0).integers(0, top + 1, (9, 4, 4)).astype(np.float32)
    alpha = levels[:, :, 3] / top if has_alpha else None
    write_image(tmp_path / "deep/a.png", levels[:, :, :3] / top, alpha, bits)
    picture = read_image(tmp_path / "deep/a.png")
    assert picture.bits == bits
    assert np.array_equal(np.round(picture.rgb * top), levels[:, :, :3])
    assert (picture.alpha is None) if not has_alpha else np.array_equal(np.round(picture.alpha * top), levels[:, :, 3])
    assert os.listdir(tmp_path / "deep") == ["a.png"]


def test_written_sixteen_bits_are_read_by_others(tmp_path):
    levels = deep_levels(3)
    write_image(tmp_path / "a.png", levels / 65535, bits=16)
    raw = ffmpeg("-i", tmp_path / "a.png", "-f", "rawvideo", "-pix_fmt", "rgb48be", "-")
    assert np.array_equal(np.frombuffer(raw, ">u2").reshape(levels.shape), levels)


def test_webp_is_exact_and_jpeg_close(tmp_path):
    rgb = np.stack(np.meshgrid(np.linspace(0, 1, 40), np.linspace(0, 1, 30)), -1)
    rgb = np.concatenate([rgb, 0.5 * np.ones((30, 40, 1))], -1)
    alpha = np.tile(np.linspace(0, 1, 40), (30, 1))
    write_image(tmp_path / "a.webp", rgb, alpha)
    picture = read_image(tmp_path / "a.webp")
    assert np.array_equal(np.round(picture.rgb * 255), np.round(rgb.astype(np.float32) * 255))
    assert np.array_equal(np.round(picture.alpha * 255), np.round(alpha.astype(np.float32) * 255))
    write_image(tmp_path / "a.jpg", rgb)
    assert np.abs(read_image(tmp_path / "a.jpg").rgb - rgb).max() < 0.02


def test_grey_alpha_and_palettes_become_rgb(tmp_path):
    grey = np.array([[0, 51], [102, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "l.png")
    assert np.allclose(read_image(tmp_path / "l.png").rgb, np.repeat(grey[:, :, None], 3, 2) / 255)
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(255 - grey)]).save(tmp_path / "la.png")
    picture = read_image(tmp_path / "la.png")
    assert np.allclose(picture.rgb[:, :, 1], grey / 255)
    assert np.allclose(picture.alpha, 1 - grey / 255)
    paletted = Image.new("P", (2, 1))
    paletted.putpalette([10, 20, 30, 40, 50, 60])
    paletted.putdata([0, 1])
    paletted.save(tmp_path / "p.png", transparency=1)
    picture = read_image(tmp_path / "p.png")
    assert np.allclose(picture.rgb * 255, [[[10, 20, 30], [40, 50, 60]]])
    assert picture.alpha.tolist() == [[1, 0]]
    Image.fromarray(grey).convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(read_image(tmp_path / "bits.png").rgb)) == {0, 1}
    assert isinstance(picture, Picture)


def test_colour_key_of_sixteen_bits(tmp_path):
    """tRNS names one colour exactly, in 16 bits: a neighbour that differs in the low byte stays."""
    levels = np.array([[[1000, 2000, 3000], [1001, 2000, 3000]]], np.uint16)
    write_image(tmp_path / "a.png", levels / 65535, bits=16)
    data = (tmp_path / "a.png").read_bytes()
    key = b"tRNS" + struct.pack(">HHH", 1000, 2000, 3000)
    at = data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(
        data[:at] + struct.pack(">I", 6) + key + struct.pack(">I", zlib.crc32(key)) + data[at:]
    )
    picture = read_image(tmp_path / "a.png")
    assert np.array_equal(np.round(picture.rgb * 65535), levels)
    assert picture.alpha.tolist() == [[0, 1]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation(tmp_path, orientation, suffix):
    """An upright 2 x 3 picture, stored turned, comes back upright: as Pillow has it, and corner by corner."""
    levels = (np.arange(6, dtype=np.uint8).reshape(2, 3) * 40).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}", exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
    rgb = np.round(read_image(tmp_path / f"a.{suffix}").rgb[:, :, 0] * 255)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert np.array_equal(rgb, np.asarray(ImageOps.exif_transpose(image)))
    corners = {  # what is stored top left, top right, bottom left lands where the standard says
        1: "tl tr bl", 2: "tr tl br", 3: "br bl tr", 4: "bl br tl",
        5: "tl bl tr", 6: "tr br tl", 7: "br tr bl", 8: "bl tl br",
    }[orientation].split()  # fmt: skip
    found = {"tl": rgb[0, 0], "tr": rgb[0, -1], "bl": rgb[-1, 0], "br": rgb[-1, -1]}
    assert [found[corner] for corner in corners] == pytest.approx([0, 80, 120], abs=3)


def test_exif_orientation_of_sixteen_bits(tmp_path):
    levels = deep_levels(3)
    write_image(tmp_path / "a.png", levels / 65535, bits=16)
    exif = Image.Exif()
    exif[0x0112] = 6
    data, block = (tmp_path / "a.png").read_bytes(), b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
    at = data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:at] + chunk + data[at:])
    assert np.array_equal(np.round(read_image(tmp_path / "a.png").rgb * 65535), np.rot90(levels, -1))


def png_header(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_bombs_are_refused_before_anything_is_allocated(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(12_000, 12_000))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"bomb.png: 12000x12000 pixels; at most 100000000") as error:
        read_image(tmp_path / "bomb.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert one_line(error)
    (tmp_path / "bomb.png").write_bytes(png_header(2**31 - 1, 2**31 - 1))
    with pytest.raises(InputError, match="pixels"):
        read_image(tmp_path / "bomb.png")
    write_image(tmp_path / "a.png", np.zeros((10, 10, 3)))
    read_image(tmp_path / "a.png", max_pixels=100)
    with pytest.raises(InputError, match="10x10 pixels; at most 99"):
        read_image(tmp_path / "a.png", max_pixels=99)
    os.truncate(tmp_path / "a.png", 40 * 2**20)  # no picture of a million pixels takes that
    with pytest.raises(InputError, match="41943040 bytes"):
        read_image(tmp_path / "a.png", max_pixels=10**6)


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    write_image(tmp_path / "whole.png", np.random.default_rng(0).random((64, 64, 3)))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-3000])
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-60])
    (tmp_path / "text.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    os.mkfifo(tmp_path / "pipe.png")
    reasons = {
        "cut.png": "cannot be decoded", "cut.jpg": "cannot be decoded", "text.png": "cannot be decoded",
        "empty.png": "cannot be decoded", "nan.tiff": "not finite", "pipe.png": "not a regular file",
        "missing.png": "no such file", ".": "a folder; expected a picture",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=reason) as error:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert one_line(error)


def test_pictures_that_cannot_be_written(tmp_path):
    rgb = np.zeros((4, 4, 3))
    with pytest.raises(InputError, match=r"\.png"):
        write_image(tmp_path / "a.gif", rgb)
    with pytest.raises(InputError, match="no transparency"):
        write_image(tmp_path / "a.jpg", rgb, np.ones((4, 4)))
    with pytest.raises(InputError, match="16 bits"):
        write_image(tmp_path / "a.webp", rgb, bits=16)
    with pytest.raises(ValueError, match="H, W, 3"):
        write_image(tmp_path / "a.png", rgb, np.ones((4, 5)))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_image(tmp_path / "file/a.png", rgb)
    assert os.listdir(tmp_path) == ["file"]


def test_out_of_range_and_nan_are_clipped(tmp_path):
    write_image(tmp_path / "a.png", np.array([[[-1.0, 2.0, np.nan]]]), bits=16)
    assert read_image(tmp_path / "a.png").rgb.tolist() == [[[0, 1, 0]]]


# -------------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize(
    ("count", "height", "width", "fps"),
    [(30, 48, 64, Fraction(30000, 1001)), (7, 33, 35, 12.5), (1, 32, 35, 24), (11, 34, 32, 25 / 3)],
)
def test_videos_keep_size_count_rate_and_colours(tmp_path, count, height, width, fps):
    write_frames(tmp_path / "deep/a.mp4", pattern(count, height, width), fps)
    with open_video(tmp_path / "deep/a.mp4") as video:
        assert (video.count, video.height, video.width) == (count, height, width)
        assert video.fps == float(fps)
        assert video.warnings == []
        frames = video.frames(range(count))
    want = np.stack(list(pattern(count, height, width)))
    apart = np.abs(frames[:, None].astype(int) - want).mean((2, 3, 4))  # [decoded, written]
    assert apart.diagonal().max() < 3
    assert apart.argmin(1).tolist() == list(range(count))
    assert os.listdir(tmp_path / "deep") == ["a.mp4"]


def test_frames_come_in_the_order_asked_for(tmp_path):
    write_frames(tmp_path / "a.mp4", pattern(9, 32, 32), 24)
    with open_video(tmp_path / "a.mp4") as video:
        everything = video.frames(range(9))
        assert np.array_equal(video.frames(np.array([7, 0, 7])), everything[[7, 0, 7]])
        assert video.frames([]).shape == (0, 32, 32, 3)
        for index in (9, -1):
            with pytest.raises(IndexError, match="it has 9"):
                video.frames([0, index])
        cache = video.cache.path
        assert os.path.isdir(cache)
    assert not os.path.exists(cache)


def test_players_can_play_it(tmp_path):
    """Even sides: yuv420p; index before the data; colours named, or each player guesses another matrix."""
    for side, layout in ((32, "yuv420p"), (33, "yuv444p")):
        write_frames(tmp_path / "a.mp4", pattern(3, side, 32), 24)
        data = (tmp_path / "a.mp4").read_bytes()
        assert 0 < data.index(b"moov") < data.index(b"mdat")
        assert b"moof" not in data
        assert b"colrnclx" + 3 * b"\x00\x01" in data
        shown = ffmpeg("-i", tmp_path / "a.mp4", "-f", "yuv4mpegpipe", "-strict", -1, "-frames:v", 1, "-").split(b"\n")[
            0
        ]
        assert (b"C444" if layout == "yuv444p" else b"C420") in shown


def sound_packets(path):
    rows = ffmpeg("-i", path, "-map", "0:a", "-c", "copy", "-f", "framemd5", "-").decode().splitlines()
    return [row.split()[-1] for row in rows if not row.startswith("#")]


def tone(path, seconds, *codecs):
    picture = f"testsrc2=size=64x48:rate=24:duration={seconds}"
    sources = ["-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", f"sine=440:duration={seconds}"]
    ffmpeg(*sources, *codecs, "-pix_fmt", "yuv420p", path)
    return path


def test_sound_is_copied_packet_for_packet(tmp_path):
    source = tone(tmp_path / "source.mp4", 2, "-c:a", "aac")
    with open_video(source) as video:
        everything = video.frames(range(video.count))
        write_frames(tmp_path / "all.mp4", everything, video.fps, sound_from=source)
        write_frames(tmp_path / "half.mp4", everything[:24], video.fps, sound_from=source)
    assert sound_packets(tmp_path / "all.mp4") == sound_packets(source)
    half = sound_packets(tmp_path / "half.mp4")
    assert half == sound_packets(source)[: len(half)]
    assert len(half) == pytest.approx(1 * 44100 / 1024, abs=2.5)  # a second of it
    with open_video(tmp_path / "half.mp4") as video:
        assert (video.count, video.fps) == (24, 24)


def test_sound_that_mp4_cannot_hold_is_encoded_anew(tmp_path):
    source = tone(tmp_path / "source.asf", 1, "-c:v", "mpeg4", "-c:a", "wmav2")
    write_frames(tmp_path / "a.mp4", pattern(24, 48, 64), 24, sound_from=source)
    raw = ffmpeg("-i", tmp_path / "a.mp4", "-f", "s16le", "-ac", 1, "-ar", 44100, "-")
    wave = np.frombuffer(raw, "<i2").astype(float)[4410:-4410]
    strength = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    assert strength.argmax() * 44100 / len(wave) == pytest.approx(440, abs=2)


def test_sources_without_sound_give_videos_without(tmp_path, caplog):
    write_frames(tmp_path / "silent.mp4", pattern(3, 32, 32), 24)
    Image.new("RGB", (8, 8)).save(tmp_path / "still.gif")
    for source in ("silent.mp4", "still.gif", "."):
        write_frames(tmp_path / "a.mp4", pattern(3, 32, 32), 24, sound_from=tmp_path / source)
        assert b"soun" not in (tmp_path / "a.mp4").read_bytes()
    assert not caplog.records
    (tmp_path / "text").write_text("no sound")
    write_frames(tmp_path / "a.mp4", pattern(3, 32, 32), 24, sound_from=tmp_path / "text")
    assert "sound could not be kept" in caplog.text


def save_gif(path, durations):
    pictures = [Image.new("RGB", (20, 10), (8 * i, 0, 200)) for i in range(len(durations))]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return path


def test_gif_durations_become_a_rate(tmp_path):
    with open_video(save_gif(tmp_path / "a.gif", [40] * 6)) as video:
        assert (video.count, video.height, video.width, video.fps) == (6, 10, 20, 25)
        assert video.frames([5])[0, 5, 5].tolist() == [40, 0, 200]
        assert not video.warnings
    with open_video(save_gif(tmp_path / "b.gif", [100, 100, 500, 100])) as video:
        assert (video.count, video.fps) == (4, 5)
        assert "between 100 and 500 ms" in video.warnings[0]
    with open_video(save_gif(tmp_path / "b.gif", [100, 100, 500, 100]), fps=12) as video:
        assert (video.fps, video.warnings) == (12, [])


def test_rates_of_coarse_clocks_are_recognised():
    """Matroska counts milliseconds, so that 1000 / 29.97 is 33 or 34 of them."""
    for rate in (Fraction(24000, 1001), Fraction(24), Fraction(30000, 1001), Fraction(30), Fraction(60000, 1001)):
        assert frame_rate(200, round(200 / rate * 1000), Fraction(1, 1000)) == rate
    assert frame_rate(10, 10 * 1001, Fraction(1, 30000)) == Fraction(30000, 1001)
    assert frame_rate(4, 80, Fraction(1, 100)) == 5
    assert frame_rate(7, 100, Fraction(1, 100)) == 7
    assert frame_rate(25, 200, Fraction(1, 100)) == Fraction(25, 2)
    assert frame_rate(1, 0, Fraction(1, 100)) is None


def test_folders_of_frames_in_natural_order(tmp_path):
    for i in range(12):
        write_image(tmp_path / f"f{i}.png", np.full((6, 8, 3), i / 255))
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_text("not a frame")
    with open_video(tmp_path) as video:
        assert (video.count, video.height, video.width, video.fps) == (12, 6, 8, 24)
        assert video.frames([11, 2, 10])[:, 0, 0, 0].tolist() == [11, 2, 10]
    with open_video(tmp_path, fps=8) as video:
        assert video.fps == 8
    assert sorted(["a10b2", "a10b1", "a2", "b", "1"], key=natural_key) == ["1", "a2", "a10b1", "a10b2", "b"]


def test_frames_of_a_folder_are_upright_8_bit_and_opaque(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6), (10, 20, 30)).save(tmp_path / "0.png", exif=exif)
    write_image(tmp_path / "1.png", np.full((8, 6, 3), 0.5), np.zeros((8, 6)), bits=16)
    with open_video(tmp_path) as video:
        assert (video.height, video.width) == (8, 6)
        assert video.frames([0, 1])[:, 0, 0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_folders_that_hold_no_video(tmp_path):
    with pytest.raises(InputError, match="no frames in this folder"):
        open_video(tmp_path)
    write_image(tmp_path / "0.png", np.zeros((6, 8, 3)))
    with open_video(tmp_path) as video:
        assert video.count == 1
    write_image(tmp_path / "1.png", np.zeros((6, 9, 3)))
    with pytest.raises(InputError, match=r"1.png: 9x6, but 0.png 8x6"):
        open_video(tmp_path)
    (tmp_path / "1.png").write_bytes(png_header(50_000, 50_000))
    with pytest.raises(InputError, match=r"1.png: .*pixels"):
        open_video(tmp_path)
    with pytest.raises(InputError, match="more than 1 frames"):
        open_video(tmp_path, max_frames=1)


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "h264"), ("mkv", "h264"), ("avi", "mpeg4"), ("avi", "mjpeg"), ("gif", "gif")]
)
def test_a_video_that_ends_early_keeps_what_was_read(tmp_path, suffix, codec):
    path = tmp_path / f"a.{suffix}"
    picture = "testsrc2=size=64x48:rate=25:duration=2"
    ffmpeg("-f", "lavfi", "-i", picture, "-c:v", codec, "-g", 5, "-movflags", "+faststart", path)
    with open_video(path) as video:
        whole = video.frames(range(video.count))
        assert (video.count, video.fps, video.warnings) == (50, 25, [])
    os.truncate(path, int(path.stat().st_size * 0.6))
    with open_video(path) as video:
        assert 10 < video.count < 50
        assert video.fps == 25
        assert len(video.warnings) == 1
        assert f"its first {video.count} frames" in video.warnings[0]
        kept = video.frames(range(video.count))
    originals = {frame.tobytes() for frame in whole}
    assert all(frame.tobytes() in originals for frame in kept)  # none is half a frame
    assert np.array_equal(kept[:-5], whole[: len(kept) - 5])


def test_what_is_no_video_is_refused_by_name(tmp_path):
    write_frames(tmp_path / "whole.mp4", pattern(3, 32, 32), 24)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "headless.mp4").write_bytes(data[: data.index(b"moov") - 4])
    tone(tmp_path / "whole.mkv", 1)
    ffmpeg("-i", tmp_path / "whole.mkv", "-vn", tmp_path / "sound.mp4")
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").touch()
    write_image(tmp_path / "picture.png", np.zeros((4, 4, 3)))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile whole.mp4\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nwhole.mp4\n#EXT-X-ENDLIST\n")
    names = ("headless.mp4", "sound.mp4", "text.mp4", "empty.mp4", "picture.png", "list.mp4", "list.m3u8", "missing")
    names += ("x" * 300,)  # longer than any file name
    for name in names:
        with pytest.raises(InputError, match=r"no frame can be decoded|no such file") as error:
            open_video(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert one_line(error)
    with pytest.raises(InputError, match=r"32x32 pixels a frame.*raise max_pixels"):
        open_video(tmp_path / "whole.mp4", max_pixels=1000)
    with pytest.raises(InputError, match="more than 2 frames"):
        open_video(tmp_path / "whole.mp4", max_frames=2)
    with pytest.raises(InputError, match="fps: 0"):
        open_video(tmp_path / "whole.mp4", fps=0)


def test_hostile_names_are_only_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-i.mp4", "concat:a|b.mp4", "a%03d.mp4", "$(touch x) ;.mp4"):
        write_frames(name, pattern(2, 16, 16), 24)
        with open_video(name) as video:
            assert video.count == 2
    assert len(os.listdir(tmp_path)) == 4


def test_telephones_videos_are_turned_upright_and_pixels_keep_their_shape(tmp_path):
    picture = "testsrc2=size=64x48:rate=24:duration=0.5,setsar=4/3"
    ffmpeg("-f", "lavfi", "-i", picture, "-pix_fmt", "yuv420p", tmp_path / "a.mp4")
    with open_video(tmp_path / "a.mp4") as video:
        assert (video.height, video.width, video.sample_aspect) == (48, 64, Fraction(4, 3))
        lying = video.frames([0])[0]
        write_frames(tmp_path / "b.mp4", video.frames([0, 1]), 24, sample_aspect=video.sample_aspect)
    with open_video(tmp_path / "b.mp4") as video:
        assert video.sample_aspect == Fraction(4, 3)
    ffmpeg("-display_rotation:v:0", 90, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "turned.mp4")
    with open_video(tmp_path / "turned.mp4") as video:
        assert (video.height, video.width, video.sample_aspect) == (64, 48, Fraction(3, 4))
        assert np.abs(video.frames([0])[0].astype(int) - np.rot90(lying)).mean() < 3


def test_memory_does_not_grow_with_length(tmp_path):
    def peak(count):
        def work():
            write_frames(tmp_path / "a.mp4", pattern(count, 96, 96), 24)
            with open_video(tmp_path / "a.mp4") as video:
                for i in range(0, count, 4):
                    video.frames(range(i, i + 4))

        tracemalloc.start()
        work()
        value = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return value

    short, long = peak(24), peak(240)
    assert long < 1.2 * short
    assert long < 40 * 96 * 96 * 3  # far fewer frames than there are


def test_no_frames_and_ragged_frames_leave_nothing(tmp_path):
    with pytest.raises(InputError, match=r"a.mp4: a video needs at least one frame"):
        write_frames(tmp_path / "a.mp4", [], 24)
    ragged = [*pattern(2, 32, 32), *pattern(1, 32, 34)]
    with pytest.raises(ValueError, match="differ in size"):
        write_frames(tmp_path / "a.mp4", ragged, 24)
    with pytest.raises(ValueError, match="uint8"):
        write_frames(tmp_path / "a.mp4", [np.zeros((32, 32, 3))], 24)
    with pytest.raises(InputError, match=r"written as \.mp4"):
        write_frames(tmp_path / "a.avi", ragged, 24)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="folder cannot be made"):
        write_frames(tmp_path / "file/a.mp4", ragged[:2], 24)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes there")
def test_without_room_the_finished_part_stays_valid(tmp_path):
    """A file that may not grow past 120 kB stands for a full disk; the name asked for is left as it was."""
    noise = np.random.default_rng(0).integers(0, 255, (300, 64, 64, 3), np.uint8)
    (tmp_path / "a.mp4").write_text("an earlier result")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, hard))
    try:
        with pytest.raises(InputError, match=r"a.mp4: writing stopped.*the finished part is .*a.partial.mp4") as error:
            write_frames(tmp_path / "a.mp4", noise, 24)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert one_line(error)
    assert (tmp_path / "a.mp4").read_text() == "an earlier result"
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "a.partial.mp4"]
    with open_video(tmp_path / "a.partial.mp4") as video:
        assert video.warnings == []
        assert video.count % 24 == 0
        assert video.count >= 24
        assert video.fps == 24
    write_frames(tmp_path / "a.mp4", noise[:5], 24)  # a later success clears it away
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_source_that_breaks_off_leaves_the_finished_part(tmp_path):
    def frames():
        yield from pattern(50, 32, 32)
        raise InputError("frame 51: cannot be decoded")

    with pytest.raises(InputError, match=r"a.mp4: frame 51: cannot be decoded; the finished part is"):
        write_frames(tmp_path / "a.mp4", frames(), 24)
    with open_video(tmp_path / "a.partial.mp4") as video:
        assert (video.count, video.warnings) == (50, [])
