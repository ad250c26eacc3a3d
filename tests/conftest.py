"""What all tests may use."""

import os
from pathlib import Path

import pytest
import torch
from tiny_jobs import SCENE
from tiny_models import save_tiny_pipeline

from csd3d.world.dataset import write_capture
from csd3d.world.scene import Scene

# diffusers' pipelines import onnxruntime where it is installed, which reports its use over the network
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure():
    """`pytest -n N` shares the cores out, also among the processes that tests start."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


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
{SCENE}""")
    return path
