"""A capture's world.json that describes no scene is told in a line, before any work is done."""

import json

import pytest

from csd3d.errors import InputError
from csd3d.world.dataset import WORLD_FILE, read_scene


@pytest.mark.parametrize(
    "bad",
    [{"scale": 0}, {"scale": [1]}, {"azimuth_deg": []}, {"sun_elevation_deg": 10**39}, {"sun_azimuth_deg": "1"},
     {"snow": None}, {"plate": "duck"}, {"scale": float("inf")}, {"colour": []}],
)  # fmt: skip
def test_a_world_that_is_none_is_a_line(bad, tmp_path):
    (tmp_path / WORLD_FILE).write_text(json.dumps({"kind": "duck", "colour": "yellow"} | bad))
    with pytest.raises(InputError, match=WORLD_FILE):
        read_scene(tmp_path)


def test_a_world_is_no_endless_file(tmp_path):
    (tmp_path / WORLD_FILE).symlink_to("/dev/zero")
    with pytest.raises(InputError, match="no small file"):
        read_scene(tmp_path)
