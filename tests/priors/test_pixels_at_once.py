"""The autoencoder takes no more pixels at once than it may, and computes the same."""

import pytest
import torch
from tiny_models import build_vae

from csd3d.errors import InputError
from csd3d.evaluation.text import check_shown
from csd3d.priors import autoencoder
from csd3d.priors.autoencoder import PixelCodec, VaeCodec
from csd3d.tasks.text_to_3d import TextTo3DConfig


@pytest.fixture(scope="module")
def codec():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VaeCodec(build_vae())


@pytest.fixture
def calls(codec, monkeypatch):
    """The numbers of pictures in each call of the encoder and of the decoder, of which two fit at once."""
    seen = []
    monkeypatch.setattr(VaeCodec, "pixels_at_once", lambda self, gradient: 2 * 16 * 24)
    for part in (codec.vae.encoder, codec.vae.decoder):
        real = part.forward
        monkeypatch.setattr(part, "forward", lambda x, real=real: seen.append(len(x)) or real(x))
    return seen


def pictures(count=5):
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_chunks_are_by_pixels_and_change_nothing(codec, calls):
    x = pictures()
    with torch.no_grad():
        z = codec.encode(x, None, 16)
        found = codec.decode(z, (16, 24), 16)
        assert calls == [2, 2, 1, 2, 2, 1]
        calls.clear()
        codec.encode(x, None, 1)
        assert calls == [1] * 5  # never more than the caller allows
        alone = torch.cat([codec.encode(one[None], None, 16) for one in x])
    torch.testing.assert_close(z, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, torch.cat([codec.decode(one[None], None, 16) for one in z]), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_all_at_once_and_chunks_are_computed_again_for_them(codec, calls, monkeypatch):
    def gradients():
        x = pictures().requires_grad_()
        z = codec.encode(x, None, 16)
        (z.square().sum() + sum(maps.square().mean() for maps in codec.features(x))).backward()
        return x.grad

    chunked = gradients()
    assert calls == [2, 2, 1, 1, 2, 2]  # the second time in the backward pass, last chunk first
    monkeypatch.setattr(VaeCodec, "pixels_at_once", lambda self, gradient: 10**6)
    torch.testing.assert_close(chunked, gradients(), rtol=1e-4, atol=1e-6)


def test_limits_follow_the_width_of_the_first_level(codec):
    assert codec.pixels_at_once(gradient=False) == autoencoder.MOST_PIXELS  # 8 channels
    wide = VaeCodec(build_vae())
    wide.vae.register_to_config(block_out_channels=(128, 256, 512, 512))
    assert (wide.pixels_at_once(False), wide.pixels_at_once(True)) == (2**19, 2**18)


def test_pictures_that_are_too_large_to_encode_are_refused(monkeypatch):
    monkeypatch.setattr("csd3d.memory.memory_bytes", lambda: 2**32)
    wide, small, cpu = VaeCodec(build_vae()), PixelCodec(64), torch.device("cpu")
    wide.vae.register_to_config(block_out_channels=(128, 256, 512, 512))
    config = TextTo3DConfig(prompt="a")
    check_shown(config, 512, cpu, wide.graph_bytes(512, 512))
    check_shown(config, 1024, cpu, small.graph_bytes(1024, 1024))
    with pytest.raises(InputError, match=r"guidance_size 1024 .* takes about 7.* GiB, this machine has 4 GiB"):
        check_shown(config, 1024, cpu, wide.graph_bytes(1024, 1024))
