"""FID's loader: on a stand-in for its package, and on the package's own network with random weights."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from csd3d.errors import InputError
from csd3d.metrics import frechet_distance
from csd3d.metrics.inception import load_inception, open_fid

URL = "https://example.org/weights-inception-2015-12-05-6726825d.pth"


def install(monkeypatch, network):
    package = SimpleNamespace(URL_INCEPTION_V3=URL, FeatureExtractorInceptionV3=network)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(feature_extractor_inceptionv3=package))


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """A cache of torch's that holds weights, so that none are fetched."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    path = tmp_path / "hub" / "checkpoints" / URL.rpartition("/")[2]
    path.parent.mkdir(parents=True)

    def save(weights):
        torch.save(weights, path)
        return path

    return save


class Means(torch.nn.Linear):
    """A network with the package's calls; its features are weighted mean colours of 8-bit pictures."""

    def __init__(self, name, layers, file):
        assert (name, layers) == ("inception-v3-compat", ["2048"])
        super().__init__(3, 3, bias=False)
        self.load_state_dict(torch.load(file, weights_only=True))

    def forward(self, images):
        assert images.dtype == torch.uint8
        return (super().forward(images.float().mean((2, 3))),)


def test_fid_is_the_distance_of_the_features_of_8_bit_pictures(monkeypatch, cached, tmp_path):
    install(monkeypatch, Means)
    cached({"weight": 2 * torch.eye(3)})
    images = torch.rand(40, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    features = load_inception()(images)
    eight = (255 * images).round()
    torch.testing.assert_close(features, 2 * eight.mean((2, 3)))
    for k, picture in enumerate(eight[:3].permute(0, 2, 3, 1).to(torch.uint8).numpy()):
        Image.fromarray(picture).save(tmp_path / f"{k}.png")
    Image.fromarray(np.zeros((3, 9, 3), np.uint8)).save(tmp_path / "of another size.PNG")
    fid = open_fid(tmp_path)
    assert fid(images) == pytest.approx(frechet_distance(features, torch.cat([features[:3], torch.zeros(1, 3)])))
    assert fid(images[:1]) is None
    assert open_fid("") is None


def test_what_is_missing_is_one_line(monkeypatch, cached, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=r'pip install .*"\.\[metrics\]"'):
        open_fid(tmp_path)
    install(monkeypatch, Means)

    def offline(*arguments, **options):
        raise OSError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(torch.hub, "load_state_dict_from_url", offline)
        with pytest.raises(InputError, match=f"from {URL} in .*no route to host"):
            load_inception()
    path = cached({"other": torch.zeros(3)})
    with pytest.raises(InputError, match=rf"{path} \(Error.*Missing key"):
        load_inception()
    cached({"weight": torch.eye(3)})
    with pytest.raises(InputError, match="two or more pictures"):
        open_fid(tmp_path)


def test_a_pickle_that_runs_code_is_not_opened(monkeypatch, cached):
    install(monkeypatch, Means)
    cached({"weight": Trap()})
    with pytest.raises(InputError, match="no weights of Inception"):
        load_inception()


class Trap:
    """Unpickled by running code."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle ran",))


def test_the_package_s_own_network_takes_the_weights(monkeypatch, cached):
    """Random weights in the layout of the published ones; where torch-fidelity is installed."""
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(package, "URL_INCEPTION_V3", URL)
    network = package.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, weights: None)
        patch.setattr(package, "load_state_dict_from_url", lambda *a, **k: {})
        torch.manual_seed(0)
        random = network("inception-v3-compat", ["2048"])
    cached(random.state_dict())
    images = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0))
    found = load_inception()(images)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, random((255 * images).round().to(torch.uint8))[0])
