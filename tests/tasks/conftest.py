"""Whole jobs in seconds: pictures of meshes stay at the size of their cameras."""

import pytest

from csd3d.report import models


@pytest.fixture(autouse=True)
def small_turntables(monkeypatch):
    """Turntables are enlarged for people; here nobody looks, and it was a third of the tests' time."""
    monkeypatch.setattr(models, "SMALL_SIDE", 0)
