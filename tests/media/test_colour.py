"""Colours of photographs and films: profiles, HDR and transparency become sRGB over white; results are tagged."""

import io
import struct
import subprocess
import zlib

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageCms

from csd3d.datasets.images import read_image as read_frame
from csd3d.errors import InputError
from csd3d.media import open_video, probe, read_image, write_image
from csd3d.media.pictures import HAS_AVIF

SWATCHES = np.array(
    [[20, 200, 40], [220, 30, 30], [60, 60, 200], [128, 128, 128], [250, 250, 250], [8, 8, 8]], np.uint8
)
ADOBE = (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)


def ffmpeg(*arguments):
    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def profile(curve, colorants=ADOBE, space=b"RGB "):
    """A version 2 profile of three colorants in XYZ and one tag for all curves."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    name = b"Test\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz((0.9642, 1.0, 0.8249)),
    }
    tags |= dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, colorants), strict=True)) if space == b"RGB " else {}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC") if space == b"RGB " else (b"kTRC",), curve)
    table, data, at = b"", b"", 132 + 12 * len(tags)
    for key, value in tags.items():
        value += bytes(-len(value) % 4)
        table += key + struct.pack(">II", at + len(data), len(value))
        data += value
    body = struct.pack(">I", len(tags)) + table + data
    white = b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1.0, 0.8249))
    head = struct.pack(">I", 128 + len(body)) + b"none\x02\x40\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    return head + bytes(28) + white + bytes(48) + body


GAMMA = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.19921875 * 256)) + b"\0\0"
TABLE = b"curv\0\0\0\0" + struct.pack(">I256H", 256, *(round(65535 * (i / 255) ** 1.8) for i in range(256)))
SRGB_CURVE = b"para\0\0\0\0\0\x03\0\0" + b"".join(
    struct.pack(">i", round(v * 65536)) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
)


def in_profile(rgb, data):
    """sRGB picture [H, W, 3] uint8 as stored with a profile."""
    target = ImageCms.ImageCmsProfile(io.BytesIO(data))
    return ImageCms.profileToProfile(Image.fromarray(rgb), ImageCms.createProfile("sRGB"), target, outputMode="RGB")


def gentle(height=6, width=8):
    """Colours that lie inside all the gamuts here."""
    return np.random.default_rng(0).integers(60, 190, (height, width, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------------------ profiles


@pytest.mark.parametrize("curve", [GAMMA, TABLE, SRGB_CURVE], ids=["gamma", "table", "parameters"])
def test_profiles_become_srgb_in_8_and_16_bits(tmp_path, curve):
    data, wanted = profile(curve), gentle()
    stored = in_profile(wanted, data)
    stored.save(tmp_path / "a.png", icc_profile=data)
    found = read_image(tmp_path / "a.png")
    assert np.abs(found.rgb * 255 - wanted).max() <= 1.6
    assert found.notes == ('its colours are converted from "Test" to sRGB',)
    assert np.abs(np.asarray(stored, int) - wanted).max() > 5  # without the profile it would be another picture
    write_image(tmp_path / "deep.png", np.asarray(stored) / 255, bits=16)
    chunk = b"iCCP" + b"x\0\0" + zlib.compress(data)
    raw = (tmp_path / "deep.png").read_bytes()
    at = raw.index(b"sRGB") - 4
    crc = struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "deep.png").write_bytes(raw[:at] + struct.pack(">I", len(chunk) - 4) + chunk + crc + raw[at + 13 :])
    deep = read_image(tmp_path / "deep.png")
    assert deep.bits == 16
    assert np.abs(deep.rgb - found.rgb).max() * 255 < 1.01  # 8-bit rounding of the other


def test_alpha_grey_and_cmyk_keep_to_their_profiles(tmp_path):
    data, wanted = profile(GAMMA), gentle()
    stored = in_profile(wanted, data)
    stored.putalpha(Image.fromarray(wanted[:, :, 0]))
    stored.save(tmp_path / "alpha.png", icc_profile=data)
    found = read_image(tmp_path / "alpha.png")
    assert np.abs(found.rgb * 255 - wanted).max() <= 1.6
    assert np.array_equal(np.round(found.alpha * 255), wanted[:, :, 0])
    grey = np.arange(0, 256, 5, dtype=np.uint8)[None]
    Image.fromarray(grey).save(tmp_path / "grey.png", icc_profile=profile(TABLE, space=b"GRAY"))
    light = (grey / 255) ** 1.8
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(read_image(tmp_path / "grey.png").rgb[:, :, 0] - srgb).max() * 255 < 1.5
    assert np.abs(srgb * 255 - grey).max() > 10
    cmyk = Image.fromarray(wanted).convert("CMYK")
    cmyk.save(tmp_path / "cmyk.tif", icc_profile=data)  # one for RGB: left out
    found = read_image(tmp_path / "cmyk.tif")
    assert np.abs(found.rgb * 255 - wanted).max() <= 1
    assert "is for RGB, not for CMYK" in found.notes[0]


def test_srgb_itself_and_unusable_profiles_change_nothing(tmp_path):
    wanted, srgb = gentle(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    notes = {
        "srgb": (srgb, ()), "broken": (b"no profile", "cannot be used"), "cut": (profile(GAMMA)[:200], "left out"),
        "cmyk": (profile(GAMMA, space=b"GRAY"), "is for GRAY, not for RGB"),
    }  # fmt: skip
    for name, (data, note) in notes.items():
        Image.fromarray(wanted).save(tmp_path / f"{name}.png", icc_profile=data)
        found = read_image(tmp_path / f"{name}.png")
        assert np.array_equal(np.round(found.rgb * 255), wanted)
        assert (found.notes == note) if not note else (note in found.notes[0])


def test_captures_and_folders_of_frames_are_converted_too(tmp_path, caplog):
    data, wanted = profile(GAMMA), gentle()
    (tmp_path / "frames").mkdir()
    for i in range(2):
        in_profile(wanted, data).save(tmp_path / "frames" / f"{i}.png", icc_profile=data)
        frame, _ = read_frame(tmp_path / "frames" / f"{i}.png", (8, 6), "white", turned=True)
        assert np.abs(frame * 255 - wanted).max() <= 1.6
    assert caplog.text.count('from "Test" to sRGB') <= 1  # once for all that are alike
    with open_video(tmp_path / "frames") as video:
        assert np.abs(video.frames([1])[0].astype(int) - wanted).max() <= 1
        assert len(video.warnings) == 1
        assert 'from "Test" to sRGB' in video.warnings[0]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "deep.png"])
def test_what_is_written_is_tagged_as_srgb(tmp_path, name):
    write_image(tmp_path / name, gentle() / 255, bits=16 if name == "deep.png" else 8)
    data = (tmp_path / name).read_bytes()
    if name.endswith("png"):
        assert data.index(b"IHDR") < data.index(b"\0\0\0\1sRGB\0") < data.index(b"IDAT")
    else:
        with Image.open(tmp_path / name) as image:
            tag = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        assert "sRGB" in ImageCms.getProfileDescription(tag)
    assert read_image(tmp_path / name).notes == ()
    write_image(tmp_path / name, gentle() / 255, bits=16 if name == "deep.png" else 8)
    assert (tmp_path / name).read_bytes() == data  # no date in it


# ----------------------------------------------------------------------------------------------------- other pictures


@pytest.mark.skipif(not HAS_AVIF, reason="this Pillow reads no AVIF")
def test_avif_is_read(tmp_path):
    wanted = np.repeat(np.repeat(SWATCHES[None], 16, 0), 16, 1)
    Image.fromarray(wanted).save(tmp_path / "a.avif", quality=95)
    assert np.abs(read_image(tmp_path / "a.avif").rgb[8, 8::16] * 255 - SWATCHES).max() < 6
    with open_video(tmp_path) as video:
        assert video.count == 1


def test_heic_is_refused_by_name(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    for read in (read_image, lambda path: open_video(path.parent)):
        with pytest.raises(InputError, match=r"a.heic: HEIC pictures are not read; convert it to PNG or JPEG"):
            read(tmp_path / "a.heic")


def test_floats_beyond_one_are_scaled(tmp_path):
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    for top, note in ((1, ()), (1.02, ()), (255, ("0..255",)), (65535, ("0..65535",))):
        Image.fromarray(values * top).save(tmp_path / "a.tif")
        found = read_image(tmp_path / "a.tif")
        assert np.abs(found.rgb[:, :, 1] - (values * top).clip(0, 1) if top < 2 else 0).max() < 1e-6
        assert top < 2 or np.abs(found.rgb[:, :, 1] - values).max() < 1e-6
        assert len(found.notes) == len(note)
        assert all(text in found.notes[0] for text in note)
    Image.fromarray(values * 1e6).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a.tif: .*floats up to 1e\+06, but 0..1, 0..255 or 0..65535"):
        read_image(tmp_path / "a.tif")


def test_libtiff_says_nothing_of_its_own(tmp_path, capfd):
    Image.fromarray(gentle(64, 64)).save(tmp_path / "a.tif", compression="tiff_lzw")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[2000:6000] = bytes(4000)
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(InputError, match="cannot be decoded"):
        read_image(tmp_path / "a.tif")
    assert capfd.readouterr().err == ""


# --------------------------------------------------------------------------------------------------------------- films


def film(path, *arguments, side=16):
    """SWATCHES side by side, twelve times."""
    Image.fromarray(SWATCHES[None]).resize((6 * side, 32), 0).save(path.with_suffix(".png"))
    ffmpeg("-framerate", 12, "-loop", 1, "-i", path.with_suffix(".png"), "-frames:v", 3, *arguments, path)
    return path


def swatches(video, side=16):
    return video.frames([1])[0][16, side // 2 :: side].astype(int)


@pytest.mark.parametrize(("transfer", "name"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
@pytest.mark.parametrize("tagged", [True, False], ids=["", "only the transfer is told"])
def test_hdr_becomes_sdr(tmp_path, transfer, name, tagged):
    """SDR colours, put into HDR at the level of diffuse white, come back: exact below the knee, compressed above."""
    encode = f"zscale=pin=709:tin=709:min=gbr:rin=pc:p=2020:t={transfer}:m=2020_ncl:r=tv:npl=203,format=yuv444p10le"
    tags = ["-color_trc", transfer, "-color_primaries", "bt2020", "-colorspace", "bt2020nc"]
    encode += "" if tagged else ",setparams=color_primaries=unknown:colorspace=unknown"
    source = film(tmp_path / "a.mkv", "-vf", encode, "-c:v", "ffv1", *(tags if tagged else tags[:2]))
    with open_video(source) as video:
        assert f"HDR ({name}, BT.2020), converted to SDR (BT.709)" in video.warnings[0]
        apart = np.abs(swatches(video) - SWATCHES).max(1)
    assert apart[[0, 2, 3, 5]].max() <= 5
    assert 3 < apart[4] < 30  # near white


def test_wide_gamuts_of_sdr_are_converted(tmp_path):
    encode = "zscale=pin=709:tin=709:min=gbr:rin=pc:p=2020:t=709:m=2020_ncl:r=tv,format=yuv444p10le"
    tags = ["-color_primaries", "bt2020", "-colorspace", "bt2020nc", "-color_trc", "bt709"]
    with open_video(film(tmp_path / "a.mkv", "-vf", encode, "-c:v", "ffv1", *tags)) as video:
        assert "wide-gamut video (BT.2020), converted to SDR" in video.warnings[0]
        assert np.abs(swatches(video) - SWATCHES).max() <= 4


def test_hdr_with_odd_sides_and_halved_colours(tmp_path):
    encode = "crop=95:31:0:0:exact=1,zscale=pin=709:tin=709:min=gbr:rin=pc:p=2020:t=smpte2084:m=2020_ncl:r=tv:npl=203"
    tags = ["-color_primaries", "bt2020", "-colorspace", "bt2020nc", "-color_trc", "smpte2084"]
    source = film(tmp_path / "a.mkv", "-vf", f"{encode},format=yuv444p10le", "-c:v", "ffv1", *tags)
    ffmpeg("-i", source, "-pix_fmt", "yuv420p10le", "-c:v", "ffv1", *tags, tmp_path / "b.mkv")
    with open_video(tmp_path / "b.mkv") as video:
        assert (video.height, video.width) == (31, 95)
        assert np.abs(swatches(video)[[0, 2, 3, 5]] - SWATCHES[[0, 2, 3, 5]]).max() <= 6


def test_hdr_without_the_filters_is_refused(tmp_path, monkeypatch):
    encode = "zscale=pin=709:tin=709:min=gbr:rin=pc:p=2020:t=smpte2084:m=2020_ncl:r=tv,format=yuv444p10le"
    tags = ["-color_primaries", "bt2020", "-colorspace", "bt2020nc", "-color_trc", "smpte2084"]
    source = film(tmp_path / "a.mkv", "-vf", encode, "-c:v", "ffv1", *tags)
    real = probe.run
    monkeypatch.setattr(probe, "run", lambda words: real([*words[:1], "-version"] if "-filters" in words else words))
    with pytest.raises(
        InputError, match=r"a.mkv: HDR \(PQ, BT.2020\), and this ffmpeg has no filter zscale and tonemap"
    ):
        open_video(source)


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        ("webm", ["libvpx-vp9", "-pix_fmt", "yuva420p", "-lossless", 1]),
        ("mov", ["prores_ks", "-profile:v", 4444, "-pix_fmt", "yuva444p10le"]),
        ("mov", ["png", "-pix_fmt", "rgba"]),
        ("gif", None),
    ],
)
def test_transparent_parts_are_white_in_every_format(tmp_path, suffix, codec):
    """Half of the picture is transparent, with black below it, as encoders store it."""
    picture = np.zeros((32, 64, 4), np.uint8)
    picture[:, :32] = 200, 30, 30, 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    if codec is None:
        Image.fromarray(picture).save(tmp_path / "a.gif", save_all=True, append_images=[Image.fromarray(picture[::-1])])
    else:
        source = ["-framerate", 12, "-loop", 1, "-i", tmp_path / "a.png", "-frames:v", 3]
        ffmpeg(*source, "-c:v", *codec, tmp_path / f"a.{suffix}")
    (tmp_path / "frames").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "frames" / "a.png")
    for path in (tmp_path / f"a.{suffix}", tmp_path / "frames"):
        with open_video(path) as video:
            frame = video.frames([0])[0].astype(int)
            assert any("what is transparent becomes white" in line for line in video.warnings)
        assert np.abs(frame[:, 36:] - 255).max() <= 2
        assert np.abs(frame[:, :28] - [200, 30, 30]).max() <= 6
