"""Files of `.spz`, unpacked by the reference's formulas, show the splats that were written."""

import gzip
import struct

import numpy as np
import pytest
import torch

from csd3d.cameras import orbit
from csd3d.datasets.splat_files import view_of
from csd3d.datasets.spz import write_spz
from custom_kernels.splats import Splats, render


def unpacked(data):
    """The splats of version 2 and the flags, as nianticlabs/spz reads them."""
    data = gzip.decompress(data)
    magic, version, count, degree, bits, flags, rest = struct.unpack("<IIIBBBB", data[:16])
    assert (magic, version, rest) == (0x5053474E, 2, 0)
    body, others = np.frombuffer(data[16:], np.uint8), (degree + 1) ** 2 - 1
    sizes = [9, 1, 3, 3, 3, 3 * others]
    assert len(body) == count * sum(sizes)
    parts = np.split(body, np.cumsum([count * size for size in sizes])[:-1])
    means, alphas, colours, scales, quats, harmonics = (part.reshape(count, -1).astype(float) for part in parts)
    means = means.reshape(count, 3, 3) @ [1, 2**8, 2**16]
    means = np.where(means >= 2**23, means - 2**24, means) / 2**bits
    xyz = quats / 127.5 - 1
    w = np.sqrt(np.maximum(0, 1 - (xyz**2).sum(1, keepdims=True)))
    alphas = np.log(alphas / np.maximum(255 - alphas, 1e-3))[:, 0]
    found = means, scales / 16 - 10, np.concatenate([w, xyz], 1), alphas, (colours / 255 - 0.5) / 0.15
    return Splats(*(torch.tensor(x).float() for x in (*found, (harmonics / 128 - 1).reshape(count, others, 3)))), flags


def some_splats(degree, count=50):
    generator = torch.Generator().manual_seed(0)

    def draw(*size, scale=1.0):
        return scale * torch.randn(size, generator=generator)

    shape = draw(count, 3, scale=0.4), draw(count, 3, scale=0.3) - 2, draw(count, 4), draw(count, scale=2)
    return Splats(*shape, draw(count, 3), draw(count, (degree + 1) ** 2 - 1, 3, scale=0.1))


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_what_is_read_back_looks_the_same(degree, tmp_path):
    splats = some_splats(degree)
    write_spz(tmp_path / "a.spz", splats, antialiased=True)
    found, flags = unpacked((tmp_path / "a.spz").read_bytes())
    assert flags == 1
    torch.testing.assert_close(found.means, splats.means, atol=2**-20, rtol=0)
    view = view_of(orbit(1, 3.0, 20.0, 45.0, 40, 40), 0)
    seen = [render(each, view, degree=degree).rgb for each in (splats, found)]
    assert -10 * (seen[0] - seen[1]).square().mean().log10() > 35


def test_the_same_splats_give_the_same_bytes_and_far_ones_keep_their_places(tmp_path):
    splats = some_splats(1)
    far = splats._replace(means=splats.means + 5000)
    for name, each in {"a": far, "b": far}.items():
        write_spz(tmp_path / f"{name}.spz", each, antialiased=False)
    data = (tmp_path / "a.spz").read_bytes()
    assert data == (tmp_path / "b.spz").read_bytes()
    found, flags = unpacked(data)
    assert flags == 0
    torch.testing.assert_close(found.means, far.means, atol=2**-10, rtol=0)
