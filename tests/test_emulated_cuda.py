"""Every task on CUDA, without one: emulated strictly, so that mixing devices raises; figures as on the CPU.

The emulation (emulated_cuda/emulate.py) must be loaded before torch, so it runs in a process of its own, beside another
that does the same jobs on the CPU.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_cuda.jobs import JOBS

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "emulated_cuda"
HALF = "edit_image-float16"
LEFT_OUT = ("seconds", "took", "waits")

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="the emulation of CUDA is built by a C++ compiler: none here",
)


def begin(folder: Path, command: list[str], jobs: dict[str, tuple[str, list[str]]]) -> subprocess.Popen:
    """Starts the jobs; its output goes to FOLDER/output.txt."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, *command, str(folder)],
            stdout=output, stderr=subprocess.STDOUT, cwd=HERE.parent, env=os.environ | {"PYTHONPATH": paths},
        )  # fmt: skip


def finish(process: subprocess.Popen, folder: Path) -> dict:
    """The figures of all jobs once they have ended."""
    code = process.wait(timeout=600)
    assert code == 0, (folder / "output.txt").read_text()[-4000:]
    return json.loads((folder / "figures.json").read_text())


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> tuple[dict, dict]:
    """(on the CPU, on emulated CUDA): the figures of every job by its name."""
    folder = tmp_path_factory.mktemp("emulated")
    jobs, emulate = str(FOLDER / "jobs.py"), str(FOLDER / "emulate.py")
    whole = {name: (config, [*keys, "prior.dtype=float32"]) for name, (config, keys) in JOBS.items()}
    lower = [
        "prior.dtype=float16",
        "prior.offload=model",
        "prior.drop_text_encoder=true",
    ]
    half = {HALF: (JOBS["edit_image"][0], [*JOBS["edit_image"][1], *lower])}
    cuda = begin(folder / "cuda", [emulate, jobs, "cuda"], whole | half)
    cpu = begin(folder / "cpu", [jobs, "cpu"], whole)
    return finish(cpu, folder / "cpu"), finish(cuda, folder / "cuda")


def flat(tree: object, path: tuple = ()) -> dict[tuple, float]:
    """The numbers of a tree of figures by their path, without times and waits."""
    if isinstance(tree, dict):
        kept = {key: value for key, value in tree.items() if key not in LEFT_OUT}
        return {k: v for key, value in kept.items() for k, v in flat(value, (*path, key)).items()}
    return {} if tree is None or isinstance(tree, str) else {path: float(tree)}


@pytest.mark.parametrize("name", JOBS)
def test_job_ends_with_the_cpus_figures(figures, name):
    cpu, cuda = (found[name] for found in figures)
    assert "error" not in cpu, cpu["error"]
    assert "error" not in cuda, cuda["error"]
    wanted, got = flat(cpu), flat(cuda)
    assert len(wanted) > 1
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_half_precision_is_used_and_near(figures):
    whole, half = figures[1]["edit_image"], figures[1][HALF]
    assert "error" not in half, half["error"]
    wanted, got = flat(whole["results"]), flat(half["results"])
    assert got != wanted  # float16 rounds
    assert got == pytest.approx(wanted, rel=0.05, abs=0.05)


def test_emulation_refuses_what_cuda_refuses(tmp_path):
    script = tmp_path / "mixed.py"
    script.write_text(MIXED)
    done = subprocess.run([sys.executable, str(FOLDER / "emulate.py"), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["refused"] * 5 + ["taken"] * 3


MIXED = """
import torch

host, there = torch.ones(3), torch.ones(3, device="cuda")
index = torch.tensor([0, 2])


def attempt(call):
    try:
        call()
    except (RuntimeError, TypeError):
        return "refused"
    return "taken"


for call in (
    lambda: host + there,
    lambda: host[index.cuda()],
    lambda: torch.randn(3, generator=torch.Generator(), device="cuda"),
    lambda: there.numpy(),
    lambda: there.index_put_((index,), host[:2]),
    lambda: there[index] + there.cpu().cuda()[:2],
    lambda: there * torch.tensor(2.0),
    lambda: there.cpu().numpy(),
):
    print(attempt(call))
"""
