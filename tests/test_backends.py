"""A kernel backend that a config names and that cannot run is refused before any work is done."""

import pytest
import torch

from csd3d.backends import check_backends
from csd3d.errors import InputError
from csd3d.fields import FieldConfig
from csd3d.rendering import RenderConfig
from csd3d.representations.splats import GaussianSplats
from csd3d.schema import Chosen

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (FieldConfig(backend="tcnn"), r"asset\.field\.backend=tcnn: tinycudann was asked for .* pip install git"),
        (RenderConfig(backend="nerfacc"), r"asset\.field\.backend=nerfacc: nerfacc computes on a GPU, got .* cpu"),
        (GaussianSplats(backend="gsplat"), r"asset\.field\.backend=gsplat: gsplat was asked for .* pip install"),
    ],
)
def test_named_backends_are_checked(part, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == "nerfacc" else None)
    with pytest.raises(InputError, match=message):
        check_backends({"asset": Chosen("any", {"field": part})}, CPU)


def test_auto_and_what_runs_are_accepted():
    check_backends({"asset": [RenderConfig(backend="reference"), FieldConfig(), GaussianSplats(), 3, None]}, CPU)
