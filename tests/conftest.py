"""What all tests may use."""

from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real captures beside the repository; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def keep_threads():
    """Tests may set the number of threads, which changes the last digits of what later tests compute."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
