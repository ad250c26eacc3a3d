import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tiny_models: importlib mode puts no test folder on the path


@pytest.fixture(scope="session")
def edit_folder(tmp_path_factory):
    """A tiny InstructPix2Pix, for reading only."""
    from tiny_models import save_tiny_pipeline

    return save_tiny_pipeline(tmp_path_factory.mktemp("prior") / "edit", "edit")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A tiny Stable Diffusion, for reading only."""
    from tiny_models import save_tiny_pipeline

    return save_tiny_pipeline(tmp_path_factory.mktemp("prior") / "text", "text")
