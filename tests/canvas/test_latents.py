"""Latents of a clip: the working size, and one pass over the frames for all methods."""

import pytest
import torch

from csd3d.canvas.clip import Clip
from csd3d.canvas.latents import Latents, edited_frames, working_size
from csd3d.errors import InputError


@pytest.mark.parametrize(
    ("size", "wrap", "expected"),
    [
        ((128, 128), False, (128, 128)),
        ((64, 32), False, (128, 64)),  # fits: enlarged in one piece
        ((1, 1), False, (128, 128)),
        ((1, 100), False, (8, 128)),
        ((100, 300), False, (128, 384)),  # narrower than a window: enlarged until it is not
        ((653, 1920), False, (653, 1920)),
        ((130, 501), True, (130, 504)),
    ],
)
def test_pictures_are_worked_on_at_a_size_that_the_prior_knows(size, wrap, expected):
    clip = Clip("x", 1, *size, read=None)
    assert working_size(clip, 16, 8, wrap) == expected


def test_what_is_too_narrow_is_refused():
    with pytest.raises(InputError, match="too narrow"):
        working_size(Clip("thread.png", 1, 1, 30_000, read=None), 16, 8, False)


class Codec:
    """Pictures are their own latents; counts what is decoded."""

    wrap = False

    def __init__(self):
        self.prior, self.decoded = self, []
        self.device = torch.device("cpu")

    def decode(self, z, size):
        self.decoded.append(z)
        return z


def test_sources_are_read_and_decoded_once_for_all_methods():
    frames, read, codec = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)), [], Codec()
    clip = Clip("x", 40, 16, 16, lambda indices: read.extend(indices) or frames[list(indices)], fps=12.0)
    latents, other = (Latents(clip, (16, 16), codec, frames.clone()) for _ in range(2))
    edits = {name: (latents, frames * scale) for name, scale in (("a", 0.9), ("b", 0.5), ("c", 0.0))}
    found = list(edited_frames(edits))
    assert read == [number for number, _, _ in found] == list(range(40))
    assert sum(len(z) for z in codec.decoded) == 40 * (1 + 3)
    for number, source, made in found:
        assert torch.equal(source, frames[number])
        assert list(made) == ["a", "b", "c"]
        torch.testing.assert_close(made["b"].decoded, 0.5 * frames[number])
        torch.testing.assert_close(made["b"].decoded_source, frames[number])
    codec.decoded.clear()
    list(edited_frames(edits | {"on others": (other, frames)}))
    assert sum(len(z) for z in codec.decoded) == 40 * (1 + 3 + 1 + 1)
    codec.decoded.clear()
    latents.keep_detail = False
    assert next(edited_frames(edits))[2]["a"].decoded_source is None  # nothing needs it
    assert len(codec.decoded) == 3


def test_an_edit_that_changes_nothing_is_the_source():
    """The autoencoder's loss is given back; the next test of `restore_detail` is with scenes."""
    frames, codec = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), Codec()
    codec.decode = lambda z, size: 0.5 * z
    for wrap in (False, True):
        codec.wrap = wrap
        latents = Latents(Clip("x", 2, 16, 16, lambda i: frames[list(i)]), (16, 16), codec, frames)
        for number, source, made in edited_frames({"a": (latents, frames)}):
            torch.testing.assert_close(made["a"].picture, source)
            assert torch.equal(source, frames[number])
