import pytest
from tiny_models import save_tiny_pipeline


@pytest.fixture(scope="session")
def edit_folder(tmp_path_factory):
    """A tiny InstructPix2Pix, for reading only."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("prior") / "edit", "edit")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A tiny Stable Diffusion, for reading only."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("prior") / "text", "text")
