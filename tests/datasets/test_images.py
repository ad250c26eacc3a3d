"""A picture that is no frame of a capture: which part of it is read, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from csd3d.datasets import images
from csd3d.datasets.images import read_square
from csd3d.errors import InputError
from csd3d.media.pictures import EXIF_ORIENTATION

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 14, 4), dtype=np.uint8)


def test_the_middle_square_is_averaged_down(tmp_path):
    Image.fromarray(PIXELS[..., :3]).save(tmp_path / "wide.png")
    means = PIXELS[..., :3].reshape(4, 2, 7, 2, 3).mean((1, 3)) / 255
    np.testing.assert_allclose(read_square(tmp_path / "wide.png", 4), means[:, 1:5], rtol=0, atol=1e-6)
    high = PIXELS[..., :3].swapaxes(0, 1)
    Image.fromarray(np.ascontiguousarray(high)).save(tmp_path / "high.png")
    np.testing.assert_allclose(read_square(tmp_path / "high.png", 8), high[3:11] / 255, rtol=0, atol=1e-6)


def test_it_is_turned_as_displayed_and_transparency_is_white(tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # shown turned clockwise
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    alpha = PIXELS[..., 3:] / 255
    shown = np.rot90(PIXELS[..., :3] / 255 * alpha + 1 - alpha, -1)
    np.testing.assert_allclose(read_square(tmp_path / "turned.png", 8), shown[3:11], rtol=0, atol=1e-6)


def test_what_is_no_picture_of_that_size_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "picture.png"
    with pytest.raises(InputError, match=r"picture\.png: no such picture"):
        read_square(file, 8)
    with pytest.raises(InputError, match="no such picture"):
        read_square(tmp_path, 8)
    file.write_bytes(b"GIF89a")
    with pytest.raises(InputError, match="cannot be decoded"):
        read_square(file, 8)
    Image.fromarray(PIXELS).save(file)
    with pytest.raises(InputError, match="14x8 pixels; give a picture of at least 9 a side"):
        read_square(file, 9)
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(InputError, match="14x8 pixels; the limit is 100"):
        read_square(file, 8)
