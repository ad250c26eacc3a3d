"""Regions: masks and boxes, what of each latent pixel they have, and where the result is the source."""

import numpy as np
import pytest
import torch

from csd3d.canvas.regions import Region, latent_shares, read_mask, region_masks, soft_union
from csd3d.errors import InputError
from csd3d.media import write_image


def test_shares_are_areas_and_overlaps_are_divided():
    masks = region_masks([Region("a", box=[0, 0, 12, 16]), Region("b", box=[8, 0, 20, 16])], 16, 20)
    shares = latent_shares(masks, (16, 20), (2, 3), 8)
    torch.testing.assert_close(shares[0, 0], torch.tensor([1.0, 0.5 / 1.5, 0.0]))
    torch.testing.assert_close(shares[1, 0], torch.tensor([0.0, 1.0 / 1.5, 1.0]))  # what is padded is inside too
    halves = latent_shares(region_masks([Region("a"), Region("b")], 16, 20), (16, 20), (2, 3), 8)
    torch.testing.assert_close(halves[:, 0], torch.tensor([[1.0, 0.25, 0.0], [0.0, 0.75, 1.0]]))


def test_masks_that_are_the_same_are_mixed_evenly(caplog):
    masks = region_masks([Region("a", box=[0, 0, 8, 8]), Region("b", box=[-3, -3, 8, 8])], 16, 16)
    shares = latent_shares(masks, (16, 16), (2, 2), 8)
    assert shares[:, 0, 0].tolist() == [0.5, 0.5]
    assert shares.sum() == 1
    assert "regions 1 and 2 are the same" in caplog.text


def test_the_result_outside_is_the_source_and_fades_inside():
    inside = soft_union(region_masks([Region("a", box=[0, 0, 20, 30])], 30, 40))
    assert (inside[:, 20:] == 0).all()
    assert (inside[:, :17] == 1).all()  # no fading at the picture's own border
    assert inside[5, 16:20].diff().max() < 0
    assert inside[5, 19] > 0.5


def save_mask(path, height, width, box):
    mask = np.zeros((height, width, 3), np.float32)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    write_image(path, mask)
    return str(path)


def test_a_mask_of_another_size_is_brought_to_the_pictures(tmp_path):
    small = read_mask(save_mask(tmp_path / "m.png", 12, 20, (5, 0, 10, 12)), 48, 80)
    assert small.shape == (48, 80)
    torch.testing.assert_close(small.mean(), torch.tensor(0.25), rtol=0, atol=0.01)
    with pytest.raises(InputError, match=r"regions: mask .*: it is 20x12, for a picture of 80x80"):
        read_mask(str(tmp_path / "m.png"), 80, 80)
    with pytest.raises(InputError, match=r"regions: mask .*: it is empty"):
        read_mask(save_mask(tmp_path / "e.png", 8, 8, (0, 0, 0, 0)), 8, 8)


@pytest.mark.parametrize(
    ("box", "said"), [([5, 5, 5, 9], "is empty"), ([9, 0, 12, 4], "outside"), ([-4, -4, 0, 3], "outside")]
)
def test_boxes_that_miss_are_refused(box, said):
    with pytest.raises(InputError, match=said):
        region_masks([Region("a", box=box)], 8, 9)
