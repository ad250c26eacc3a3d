"""What all tests may use."""

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_pipeline

from csd3d.world.dataset import write_capture
from csd3d.world.scene import Scene

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


@pytest.fixture(scope="session")
def tiny_capture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capture")
    write_capture(folder, Scene("cube", "yellow", azimuth_deg=20), train=5, test=2, size=32)
    return folder


@pytest.fixture(scope="session")
def tiny_prior(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="session")
def tiny_config(tiny_capture, tiny_prior, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(f"""
task: edit_scene
name: tiny
prompt: paint it a bright colour
scene: {{path: {tiny_capture}}}
prior: {{model: {tiny_prior}}}
representation:
  field: {{levels: 4, log2_hashmap_size: 10, max_resolution: 32, hidden: 16}}
  render: {{steps: 64, resolution: 16, warmup: 16, update_every: 4}}
reconstruct: {{steps: 40, samples: 4096, rays: 256}}
fit: {{steps: 12, samples: 2048, rays: 64, patches: 1, patch_size: 16}}
editors:
  csd_edit: {{edit_every: 6, later_steps: 1, text_scale: 3, image_scale: 1, edit: {{steps: 2}}}}
  in2n: {{edit_rate: 4, ddim_steps: 2}}
compare: [in2n]
export: {{video_frames: 3, mesh: {{resolution: 16, texture_size: 64, face_budget: 400, threshold: 0.5}}}}
save_seconds: 0
""")
    return path
