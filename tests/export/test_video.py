import imageio.v3 as iio
import numpy as np
import pytest
import torch

from csd3d.errors import InputError
from csd3d.export.video import enlarge, side_by_side, to_uint8, write_video


def blocks(shift, height=32, width=32):
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2] = (200, 60 + 10 * shift, 40)
    image[:, width // 2 :] = (40, 90, 180)
    return image


def test_frames_come_back_in_their_colours(tmp_path):
    frames = [blocks(i) for i in range(6)]
    write_video(tmp_path / "deep/orbit.mp4", iter(frames), fps=12, scale=3)
    decoded = iio.imread(tmp_path / "deep/orbit.mp4", plugin="FFMPEG")
    assert decoded.shape == (6, 96, 96, 3)
    for index, frame in enumerate(frames):
        assert np.abs(decoded[index, 48, 20].astype(int) - frame[16, 7]).max() <= 6
        assert np.abs(decoded[index, 48, 76].astype(int) - frame[16, 25]).max() <= 6
    assert iio.immeta(tmp_path / "deep/orbit.mp4", plugin="FFMPEG")["fps"] == 12
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["orbit.mp4"]


def test_browsers_can_play_it(tmp_path):
    """H.264 in yuv420p with the index before the data, its colours named."""
    write_video(tmp_path / "a.mp4", [blocks(0)] * 2)
    meta = iio.immeta(tmp_path / "a.mp4", plugin="FFMPEG")
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    assert b"colrnclx" + 3 * b"\x00\x01" in data  # BT.709 primaries, transfer, matrix: untagged reds turn magenta


def test_odd_sides_are_cropped_to_even(tmp_path):
    write_video(tmp_path / "a.mp4", [blocks(0, 33, 35)] * 2)
    assert iio.immeta(tmp_path / "a.mp4", plugin="FFMPEG")["size"] == (34, 32)


def test_side_by_side_keeps_order_and_stops_with_the_shorter():
    before, after = [torch.zeros(4, 5, 3)] * 3, [torch.ones(4, 5, 3) * 0.5] * 2
    frames = list(side_by_side(before, after, divider=3))
    assert len(frames) == 2
    assert frames[0].shape == (4, 13, 3)
    assert frames[0][0, :, 0].tolist() == [0] * 5 + [255] * 3 + [128] * 5


def test_no_frames_and_ragged_frames_leave_nothing_behind(tmp_path):
    with pytest.raises(InputError, match="at least one frame"):
        write_video(tmp_path / "a.mp4", [])
    with pytest.raises(ValueError, match="differ in size"):
        write_video(tmp_path / "a.mp4", [blocks(0), blocks(0, 16, 16)])
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_any_kind_become_uint8():
    expected = np.array([[[0, 128, 255]]], np.uint8)
    for picture in (torch.tensor([[[-1.0, 0.5, 2.0]]]), np.array([[[np.nan, 0.5, 1.0]]]), expected):
        assert np.array_equal(to_uint8(picture), expected)
    with pytest.raises(ValueError, match="H, W, 3"):
        to_uint8(np.zeros((3, 4, 4)))


def test_enlarging_keeps_flat_colours():
    assert (enlarge(np.full((5, 7, 3), 77, np.uint8), 3) == 77).all()
    assert enlarge(blocks(0), 3).shape == (96, 96, 3)
