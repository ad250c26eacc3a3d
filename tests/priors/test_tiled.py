"""Pictures in tiles against pictures whole, on random autoencoders whose every layer matters."""

import pytest
import torch
from tiny_models import build_vae, save_tiny_pipeline

from csd3d.priors import GaussianMixturePrior, PriorConfig, load_prior
from csd3d.priors.tiled import TiledVae, decoder_reach, encoder_reach, split_side
from csd3d.run import PACKAGE_ROOT


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """Without attention in the middle, as the shipped autoencoder: that alone could not be tiled exactly."""
    found = load_prior(PriorConfig(model=str(save_tiny_pipeline(tmp_path_factory.mktemp("tiled")))))
    torch.manual_seed(3)
    vae = build_vae(mid_block_add_attention=False)
    for parameter in vae.parameters():  # biases and norms too: what is 0 or 1 cannot be wrong
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    found.codec.vae = vae.requires_grad_(False)
    return found


def picture(height, width, seed=0):
    """Blobs and edges of many sizes, brighter to the right: tiles differ in their mean and variance."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.linspace(0, 0.5, width).expand(1, 3, height, width).clone()
    for size in (3, 9, 27):
        noise = torch.rand(1, 3, -(-height // size), -(-width // size), generator=generator)
        found += 0.16 * noise.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :height, :width]
    return found


def tiled(prior, samples, **options):
    """Tiles of 44 latents a side, whatever the picture's size: both receptive fields reach less than a quarter."""
    return TiledVae(prior, pixels=1, tile=(44 * 8) ** 2, samples=samples, **options)


@pytest.mark.parametrize(("height", "width"), [(413, 500), (100, 1501), (1333, 77)])
def test_tiles_give_what_the_whole_gives(prior, height, width):
    """All tiles measured: equal to the whole up to rounding, at sizes that are no multiple of 8 too."""
    image = picture(height, width)
    z = TiledVae(prior).encode(image)
    assert z.shape == (1, *prior.latent_shape(height, width))
    torch.testing.assert_close(tiled(prior, 99).encode(image), z, rtol=0, atol=5e-5 * z.abs().max().item())
    decoded = TiledVae(prior).decode(z, (height, width))
    assert decoded.shape == image.shape
    assert 0.02 < decoded.std() < 0.4
    torch.testing.assert_close(tiled(prior, 99).decode(z, (height, width)), decoded, rtol=0, atol=5e-5)


def test_tiles_that_normalise_themselves_would_not(prior):
    """What is guarded against: the same tiles, each with statistics of its own."""
    image = picture(413, 500)
    z = TiledVae(prior).encode(image)
    own = tiled(prior, 99)
    own._tiled = lambda x, network, measure, run, reach, unit: stitch_alone(own, x, run, reach, unit)
    error = (own.encode(image) - z).abs()
    assert error.max() > 100 * (tiled(prior, 99).encode(image) - z).abs().max()


def stitch_alone(codec, x, run, reach, unit):
    rows, columns = codec._split(x.shape[1] // unit, x.shape[2] // unit, reach)
    strips = []
    for row in rows:
        parts = []
        for column in columns:
            tile = x[:, row.start * unit : (row.start + row.size) * unit]
            tile = tile[:, :, column.start * unit : (column.start + column.size) * unit]
            parts.append(run(tile[None])[0][:, row.kept, column.kept])
        strips.append(torch.cat(parts, 2))
    return torch.cat(strips, 1)


def test_estimated_statistics_stay_near_and_leave_no_seams():
    """The shipped autoencoder, two tiles of three measured, which differ: near the whole, no step where tiles meet."""
    shipped = load_prior(PriorConfig(model=str(PACKAGE_ROOT / "csd3d/assets/ip2p")))
    image, whole, codec = picture(300, 800), TiledVae(shipped), tiled(shipped, 2)
    z = whole.encode(image)
    assert (codec.encode(image) - z).square().mean().sqrt() < 0.05 * z.std()
    decoded, found = whole.decode(z, (300, 800)), codec.decode(z, (300, 800))
    assert (found - decoded).square().mean().sqrt() < 0.05 * decoded.std()
    step = (found - decoded).diff(dim=3).square().mean((0, 1, 2)).sqrt()
    columns = codec._split(38, 100, decoder_reach(shipped.vae))[1]
    assert len(columns) == 3
    assert step[[tile.end * 8 - 1 for tile in columns[:-1]]].max() < 1.5 * step.quantile(0.9)


def test_a_picture_that_wraps_around_may_be_rolled(prior):
    """Round the corner there is no border: rolling in pixels rolls latents and decoded pixels."""
    image, codec = picture(96, 480), tiled(prior, 99, wrap=True)
    z = codec.encode(image)
    rolled = codec.encode(image.roll(8 * 23, 3))
    torch.testing.assert_close(rolled, z.roll(23, 3), rtol=0, atol=1e-4 * z.abs().max().item())
    decoded = codec.decode(z, (96, 480))
    torch.testing.assert_close(codec.decode(rolled, (96, 480)), decoded.roll(8 * 23, 3), rtol=0, atol=1e-4)
    cut = TiledVae(prior).encode(image)
    assert (cut - z)[..., 30].abs().max() < 0.2 * (cut - z)[..., 0].abs().max()  # far from the border nearly the same
    with pytest.raises(ValueError, match="multiple of 8 wide"):
        codec.encode(picture(96, 476))


def test_small_pictures_are_untouched_and_batches_bounded(prior, monkeypatch):
    """What fits goes through the prior as it is, bit for bit, so many pictures at once as `pixels` allows."""
    images = torch.cat([picture(40, 50, seed) for seed in range(5)])
    sizes, encode = [], prior.encode
    monkeypatch.setattr(prior, "encode", lambda x: sizes.append(len(x)) or encode(x))
    z = TiledVae(prior, pixels=2 * 40 * 50).encode(images)
    assert sizes == [2, 2, 1]
    assert torch.equal(z[:2], encode(images[:2]))


def test_norms_are_given_back(prior):
    image = picture(413, 500)
    before = prior.encode(image)
    tiled(prior, 2).encode(image)
    assert torch.equal(prior.encode(image), before)
    assert not any("forward" in module.__dict__ for module in prior.vae.modules())


@pytest.mark.parametrize("wrap", [False, True])
def test_sides_are_kept_once_with_room_about(wrap):
    for length in range(1, 200, 7):
        for size in (8, 21, 40):
            found = split_side(length, size, 5, wrap)
            assert [tile.begin for tile in found] == [0, *(tile.end for tile in found[:-1])]
            assert found[-1].end == length
            assert len({tile.size for tile in found}) == 1
            margin = min(5, size // 4)
            for tile in found:
                inside = 0 <= tile.kept.start <= tile.kept.stop <= tile.size
                assert inside
                assert wrap or 0 <= tile.start <= length - tile.size
                assert tile.kept.start >= margin or (not wrap and tile.start == tile.begin == 0)
                assert tile.size - tile.kept.stop >= margin or (not wrap and tile.end == length)


def test_reach_is_what_one_pixel_reaches():
    """Without norms, and with weights that blur: how far the change of one pixel, or of one latent, gets."""
    torch.manual_seed(0)
    vae = build_vae(mid_block_add_attention=False, latent_channels=2).double().requires_grad_(False)
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data.fill_(1 / module.weight[0].numel())
    far = 0
    for offset in range(8):
        image = torch.zeros(1, 3, 16, 8 * 50, dtype=torch.float64)
        before = vae.encoder(image)
        image[..., 8, 8 * 25 + offset] = 1
        touched = ((vae.encoder(image) - before) != 0).any(2).any(1)[0].nonzero()[:, 0]
        far = max(far, 25 - int(touched.min()), int(touched.max()) - 25)
    assert far <= encoder_reach(vae) <= far + 1
    z = torch.zeros(1, 2, 2, 60, dtype=torch.float64)
    before = vae.decoder(z)
    z[..., 1, 30] = 1
    touched = ((vae.decoder(z) - before) != 0).any(2).any(1)[0].nonzero()[:, 0]
    far = max(8 * 30 - int(touched.min()), int(touched.max()) - 8 * 31 + 1) / 8
    assert far <= decoder_reach(vae) < far + 1


def test_reach_of_the_shipped_and_of_stable_diffusions_autoencoder():
    class Vae:
        class config:
            block_out_channels, layers_per_block = (16, 32, 64, 96), 1

    assert (encoder_reach(Vae), decoder_reach(Vae)) == (11, 14)
    Vae.config.layers_per_block = 2
    assert (encoder_reach(Vae), decoder_reach(Vae)) == (15, 18)


def test_a_prior_of_pixels_is_refused():
    class Pixels(GaussianMixturePrior):
        codec = None

    with pytest.raises(ValueError, match="no autoencoder"):
        TiledVae(Pixels(torch.zeros(1, 3, 4, 4), torch.ones(1)))
