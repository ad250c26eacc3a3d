import pytest
from tiny_models import (
    save_tiny_flux,
    save_tiny_if,
    save_tiny_pipeline,
    save_tiny_qwen_edit,
    save_tiny_sd3,
    save_tiny_sdxl,
)


@pytest.fixture(scope="session")
def edit_folder(tmp_path_factory):
    """A tiny InstructPix2Pix, for reading only."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("prior") / "edit", "edit")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A tiny Stable Diffusion, for reading only."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("prior") / "text", "text")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    """A tiny SDXL, for reading only."""
    return save_tiny_sdxl(tmp_path_factory.mktemp("prior") / "sdxl")


@pytest.fixture(scope="session")
def if_folder(tmp_path_factory):
    """A tiny DeepFloyd IF, first stage, for reading only."""
    return save_tiny_if(tmp_path_factory.mktemp("prior") / "if")


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    """A tiny Stable Diffusion 3, for reading only."""
    return save_tiny_sd3(tmp_path_factory.mktemp("prior") / "sd3")


@pytest.fixture(scope="session")
def kontext_folder(tmp_path_factory):
    """A tiny FLUX.1 Kontext, for reading only."""
    return save_tiny_flux(tmp_path_factory.mktemp("prior") / "kontext")


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    """A tiny Qwen-Image-Edit, for reading only."""
    return save_tiny_qwen_edit(tmp_path_factory.mktemp("prior") / "qwen")
