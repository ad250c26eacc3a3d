"""Hollows that no view sees are filled; what is open stays open."""

import numpy as np
import pytest

from csd3d.export.holes import fill_hollows

X, Y, Z = np.meshgrid(*[np.linspace(-1, 1, 81)] * 3, indexing="ij")
R = np.sqrt(X**2 + Y**2 + Z**2)
SHELL = (R < 0.8) & (R > 0.55)


def filled(solid):
    sigma = np.where(solid, 100.0, 0.0).astype(np.float32)
    fill_hollows(sigma, 10.0)
    return sigma >= 10.0


@pytest.mark.parametrize("bore", [0.0, 0.04])
def test_a_hollow_ball_is_filled_also_through_a_narrow_bore(bore):
    hole = (np.hypot(X, Y) < bore) & (Z > 0)
    found = filled(SHELL & ~hole)
    assert found[R < 0.5].all()
    assert not found[R > 0.83].any()


@pytest.mark.parametrize("solid", [SHELL & (Z < 0.2), (np.hypot(np.hypot(X, Y) - 0.6, Z) < 0.25), R < 0.7, R < 0])
def test_a_bowl_a_ring_a_ball_and_nothing_stay_as_they_are(solid):
    assert (filled(solid) == solid).all()


def test_two_legs_are_not_joined():
    legs = (np.abs(np.abs(X) - 0.15) < 0.1) & (np.abs(Y) < 0.1) & (Z < 0)
    table = legs | ((np.abs(X) < 0.6) & (np.abs(Y) < 0.6) & (np.abs(Z - 0.05) < 0.06))
    assert (filled(table) == table).all()


def test_a_house_that_is_open_below_is_filled_down_to_its_floor():
    walls = (np.maximum(np.abs(X), np.abs(Y)) < 0.6) & (Z > -0.7) & (Z < 0.5)
    room = (np.maximum(np.abs(X), np.abs(Y)) < 0.4) & (Z < 0.3)
    found = filled(walls & ~room)
    assert found[room & (Z > -0.6)].all()
    assert not found[Z < -0.72].any()
    assert (found[~room] == walls[~room]).all()
