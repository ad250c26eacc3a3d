from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from csd3d.engine import out_of_memory
from csd3d.engine.out_of_memory import told_memory
from csd3d.errors import InputError
from csd3d.representations.fit import FitConfig
from csd3d.schema import incidental

CARD = torch.device("cuda")


@dataclass
class Prior:
    micro_batch: int = incidental(16)
    vae_slicing: bool = incidental(False)


@dataclass
class Config:
    prior: Prior = field(default_factory=Prior)
    fit: FitConfig = field(default_factory=FitConfig)
    reconstruct: FitConfig = field(default_factory=FitConfig)
    guidance_size: int | None = None


@pytest.fixture(autouse=True)
def card(monkeypatch):
    monkeypatch.setattr(out_of_memory, "card_bytes", lambda device: 24 << 30)


def used_up(place: str, error: BaseException, phase: str | None = "csd_edit") -> str:
    """What is told where code of a file called `place` runs out of memory; phase None: while opening."""
    job = None if phase is None else SimpleNamespace(phase=phase, folder=Path("outputs/run"))
    space = {}
    exec(compile("def fit_step(error): raise error", f"/x/csd3d/{place}", "exec"), space)
    with pytest.raises(InputError) as caught, told_memory(Config(), CARD, job):
        space["fit_step"](error)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_network_names_micro_batch_and_how_to_go_on():
    told = used_up("priors/prior.py", torch.OutOfMemoryError("CUDA out of memory"))
    assert told == (
        "phase csd_edit: the memory of cuda, 24 GiB, is used up; lower prior.micro_batch, which is 16 or set "
        "prior.vae_slicing=true. It goes on with --resume outputs/run prior.micro_batch=LESS"
    )


@pytest.mark.parametrize(("phase", "key"), [("reconstruct", "reconstruct.samples"), ("in2n", "fit.samples")])
def test_a_fit_names_its_samples(phase, key):
    told = used_up("representations/hashgrid.py", torch.OutOfMemoryError("CUDA out of memory"), phase)
    assert f"lower {key}, which is 65536" in told
    assert told.endswith("start it again; where there is more memory it goes on with --resume outputs/run")


def test_keys_that_are_left_to_the_model_are_not_named():
    told = used_up("priors/autoencoder.py", torch.OutOfMemoryError("CUDA out of memory"))
    assert "set prior.vae_slicing=true" in told
    assert "guidance_size" not in told


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_this_machines_memory_is_told_too(error):
    assert used_up("priors/prior.py", error, None).startswith(
        "while the job was opened: this machine's memory is used up; lower prior.micro_batch"
    )


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="other"), told_memory(Config(), CARD):
        raise RuntimeError("other")


def test_a_run_that_is_out_of_memory_ends_in_one_line_and_can_be_resumed(tmp_path, monkeypatch, capsys):
    """Through the command line: exit code 2, no traceback, and the same command with --resume ends the run."""
    import launch
    from csd3d.priors.prior import Prior

    job = ["--config", "configs/edit-image-dds.yaml", "method=[dds]", "distill.steps=2", "size=32"]
    predict, calls = Prior.predict, []

    def once_too_large(self, *args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return predict(self, *args, **options)

    monkeypatch.setattr(Prior, "predict", once_too_large)
    folder = tmp_path / "run"
    assert launch.main([*job, "save_seconds=0", "--device", "cpu", "--output", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said.split("error: ")[-1]
    assert f"--resume {folder}" in " ".join(said.split("error: ")[-1].split())
    assert launch.main(["--resume", str(folder), "prior.micro_batch=1", "--device", "cpu"]) == 0
