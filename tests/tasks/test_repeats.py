"""Two runs of one command differ by nothing on one machine, whatever the number of threads: by hash of all results."""

import hashlib
import json

import pytest
import torch
from tiny_jobs import CASES, files_of, metrics_of, write_job
from tiny_models import save_tiny_pipeline

from csd3d import run as jobs
from csd3d.interrupt import StopRequest


@pytest.fixture(scope="module")
def priors(tiny_prior, tmp_path_factory):
    return {"edit": tiny_prior, "text": save_tiny_pipeline(tmp_path_factory.mktemp("text"), "text")}


def digests(folder):
    """The SHA-256 of every result by name, and of metrics.json without what a clock measured."""
    metrics = metrics_of(folder)
    metrics["seconds"] = None
    for found in metrics.get("results", {}).values():
        found.pop("seconds", None)
    timed = ("environment.json", "checkpoint.json")  # these say how many threads there were, and how long it took
    contents = {name: content for name, content in files_of(folder).items() if not name.endswith(timed)}
    # their names count the saves, which a clock decides
    contents |= {f"{path.parent.name}.safetensors": path.read_bytes() for path in folder.rglob("tensors-*.safetensors")}
    contents |= {"metrics.json": json.dumps(metrics, sort_keys=True).encode()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


@pytest.mark.parametrize("task", ["edit_scene", "edit_panorama", "text_to_3d"])
def test_runs_repeat_to_the_byte_with_1_2_and_4_threads(priors, tiny_capture, tmp_path, monkeypatch, task):
    config = write_job(tmp_path / "home", task, priors, tiny_capture)
    monkeypatch.chdir(config.parent)
    found = []
    for number, threads in enumerate((1, 2, 4)):
        torch.set_num_threads(threads)
        folder = tmp_path / str(number)
        jobs.start(config, ["compare=[]"], folder, None, "cpu", stop=StopRequest())
        found.append(digests(folder))
    kinds = {name.rpartition(".")[2] for name in found[0]}
    assert {"png", "json", "jsonl", "safetensors"} | ({"mp4", "obj"} if "mesh" in CASES[task] else set()) <= kinds
    for others in found[1:]:
        assert found[0] == others
