"""The object of a picture: by its transparency, or cut from a plain background; what has none is told in one line."""

import numpy as np
import pytest
from PIL import Image

from csd3d.datasets.cutout import plain_background_cut, read_cutout
from csd3d.errors import InputError


def disc(side=96, radius=24, centre=(40, 52)):
    y, x = np.mgrid[:side, :side]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2


def saved(path, pixels, mode="RGB"):
    Image.fromarray(pixels.astype(np.uint8), mode).save(path)
    return path


def painted(mask, colour=(200, 30, 30), background=(240, 240, 240)):
    return np.where(mask[:, :, None], colour, background)


def rgba(mask):
    return np.concatenate((painted(mask, background=(10, 200, 10)), mask[:, :, None] * 255), 2)


@pytest.mark.parametrize("kind", ["alpha", "plain"])
def test_the_object_comes_out_in_the_middle_at_its_share(kind, tmp_path):
    mask = disc()
    pixels, mode = (rgba(mask), "RGBA") if kind == "alpha" else (painted(mask), "RGB")
    found = read_cutout(saved(tmp_path / "a.png", pixels, mode), 64, 0.8, 0.1)
    assert found.colour.shape == (64, 64, 3)
    rows, columns = np.nonzero(found.mask > 0.5)
    for places in (rows, columns):
        assert abs(places.mean() - 31.5) < 1
        assert abs(np.ptp(places) + 1 - 0.8 * 64) <= 2
    assert found.mask.mean() == pytest.approx(np.pi / 4 * 0.64, abs=0.02)
    np.testing.assert_allclose(found.colour[32, 32], np.array([200, 30, 30]) / 255, atol=0.01)
    assert found.colour[0, 0].tolist() == [0, 0, 0]
    np.testing.assert_array_less(found.colour.max(2), found.mask + 1e-3)  # premultiplied: no background in it


def test_half_transparent_pixels_keep_their_share(tmp_path):
    pixels = rgba(disc())
    pixels[:, :, 3] //= 2
    pixels[30:50, 42:62, 3] = 255
    found = read_cutout(saved(tmp_path / "a.png", pixels, "RGBA"), 48, 0.9, 0.1)
    inside = (found.mask > 0.45) & (found.mask < 0.55)
    assert inside.sum() > 50
    ratio = found.colour[inside] / found.mask[inside][:, None]
    np.testing.assert_allclose(ratio, np.broadcast_to(np.array([200, 30, 30]) / 255, ratio.shape), atol=0.02)


def test_a_hole_stays_and_a_speck_does_not():
    ring = disc() & ~disc(radius=10)
    ring_with_speck = ring.copy()
    ring_with_speck[40, 70] = False
    lone = np.zeros_like(ring)
    lone[90, 10] = True  # a crumb beside the object
    mask = plain_background_cut(painted(ring_with_speck | lone) / 255, 0.1)
    np.testing.assert_array_equal(mask > 0.5, ring)


def test_an_object_at_the_border_is_not_moved_out_of_the_picture(tmp_path):
    found = read_cutout(saved(tmp_path / "a.png", rgba(disc(centre=(5, 90))), "RGBA"), 64, 0.8, 0.1)
    rows, columns = np.nonzero(found.mask > 0.5)
    assert abs((rows.min() + rows.max()) / 2 - 31.5) < 1.5
    assert abs((columns.min() + columns.max()) / 2 - 31.5) < 1.5


noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))


@pytest.mark.parametrize(
    ("pixels", "mode", "said"),
    [
        (np.full((64, 64, 3), 128), "RGB", "without a foreground: .* has the colour of its border"),
        (np.zeros((64, 64, 4)), "RGBA", "without a foreground: .* is transparent"),
        (painted(disc(64, 3, (30, 30))), "RGB", "without a foreground"),
        (noise, "RGB", "its background is not plain: .*raise front.tolerance"),
        (np.concatenate((noise, np.where(disc(64, 99, (30, 30)), 250, 0)[:, :, None]), 2), "RGBA", "all of it is"),
        (np.full((1, 1, 3), 7), "RGB", "without a foreground"),
    ],
)
def test_a_picture_without_an_object_is_one_line(pixels, mode, said, tmp_path):
    with pytest.raises(InputError, match=said) as caught:
        read_cutout(saved(tmp_path / "a.png", pixels, mode), 64, 0.8, 0.1)
    assert "\n" not in str(caught.value)
    assert "a.png" in str(caught.value)


def test_what_is_no_picture_is_one_line(tmp_path):
    (tmp_path / "b.png").write_bytes(b"no picture")
    for path, said in ((tmp_path / "b.png", "cannot be decoded"), (tmp_path, "a folder"), (tmp_path / "c", "no such")):
        with pytest.raises(InputError, match=said):
            read_cutout(path, 64, 0.8, 0.1)
