"""A fixture that runs a test by the kernels of each instruction set that this processor has."""

import ctypes

import pytest

from custom_kernels import native
from tests.custom_kernels.test_hashgrid import ISAS, built


@pytest.fixture(params=ISAS)
def instruction_set(request, monkeypatch):
    """Its name; its kernels are those that are used. Skips what is not compiled."""
    if not built(request.param).exists():
        pytest.skip(f"{built(request.param).name} is not built")
    library = ctypes.CDLL(str(built(request.param)))
    monkeypatch.setattr(native, "library", lambda: library)
    return request.param
