"""What is given back to an edited picture where the edit left it alone."""

import torch

from csd3d.canvas.detail import KEPT_BELOW, restore_detail


def pictures(seed, count=2, size=24):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def test_an_edit_that_does_nothing_returns_its_source_exactly():
    source, roundtrip = pictures(0), pictures(1)
    torch.testing.assert_close(restore_detail(roundtrip, roundtrip, source), source, rtol=0, atol=1e-6)


def test_detail_returns_in_proportion_to_how_little_changed():
    source, roundtrip = 0.4 + 0.2 * pictures(0), 0.4 + 0.2 * pictures(1)
    for share in (0.0, 0.25, 0.75):
        edited = roundtrip + share * KEPT_BELOW
        expected = edited + (1 - share) * (source - roundtrip)
        torch.testing.assert_close(restore_detail(edited, roundtrip, source), expected)
    edited = roundtrip + 2 * KEPT_BELOW
    torch.testing.assert_close(restore_detail(edited, roundtrip, source), edited)


def test_an_edit_of_one_half_leaves_the_other_as_it_was():
    source, roundtrip = pictures(0), pictures(1)
    edited = roundtrip.clone()
    edited[:, :, :12] = 0
    kept = restore_detail(edited, roundtrip, source)
    torch.testing.assert_close(kept[:, :, 16:], source[:, :, 16:], rtol=0, atol=1e-6)
    torch.testing.assert_close(kept[:, :, :8], edited[:, :, :8])
