import subprocess

import pytest
import torch

from csd3d import devices
from csd3d.devices import choose_device, driver_version, is_device, unusable_card
from csd3d.errors import InputError


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a card: machine(driver, CUDA that torch is built for, whether device files are there)."""

    def make(driver: str | None, cuda: str | None, reached: bool = True) -> None:
        module, file = tmp_path / "version", tmp_path / "nvidiactl"
        if driver is not None:
            module.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Thu Jan 1 2026\nGCC 13.3.0\n")
        if reached:
            file.touch()
        monkeypatch.setattr(devices, "KERNEL_MODULE", module)
        monkeypatch.setattr(devices, "DEVICE_FILES", (file,))
        monkeypatch.setattr(devices.shutil, "which", lambda name: None)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: no luck")))

    return make


@pytest.fixture
def cards(monkeypatch):
    """Two cards that torch can use; the list of those made current."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"Card {i}")
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(
    ("driver", "cuda", "reached", "said"),
    [
        ("580.95.05", None, True, ["driver 580.95", "built without CUDA", "pytorch.org/get-started gives for CUDA 13"]),
        ("535.183.01", None, True, ["built without CUDA", "gives for CUDA 12"]),
        ("535.183.01", "13.0", True, ["too old", "CUDA 13.0", "to 580.65 or newer", "or install torch", "for CUDA 12"]),
        ("390.157", "12.6", True, ["too old", "to 525.60 or newer"]),
        ("580.95.05", "13.0", False, ["container", "--gpus all"]),
        ("580.95.05", "13.0", True, ["CUDA does not start (CUDA error: no luck)", "nvidia-smi"]),
    ],
)
def test_a_card_that_torch_cannot_use_is_told_with_what_to_install(machine, driver, cuda, reached, said):
    machine(driver, cuda, reached)
    told = unusable_card()
    assert all(words in told for words in said), told
    assert "\n" not in told
    with pytest.raises(InputError, match=r"^--device: cuda cannot be used: there is a graphics card"):
        choose_device("cuda", "--device")
    assert choose_device("auto") == torch.device("cpu")


def test_without_a_card_there_is_nothing_to_tell(machine):
    machine(None, None)
    assert unusable_card() is None
    with pytest.raises(InputError, match=r"^--device: cuda:1 cannot be used: torch sees no graphics card.*is cpu$"):
        choose_device("cuda:1", "--device")


def test_the_driver_is_also_asked_of_nvidia_smi(machine, monkeypatch):
    machine(None, None)
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(
        devices.subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 0, "550.54.15\n")
    )
    assert driver_version() == (550, 54)


def test_a_device_is_chosen_by_its_number_and_becomes_current(cards):
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("auto") == torch.device("cuda")
    assert cards == [1, 0]


def test_a_device_that_does_not_exist_is_told_with_those_that_do(cards):
    with pytest.raises(InputError) as caught:
        choose_device("cuda:2", "--device")
    assert str(caught.value) == "--device: cuda:2 does not exist; there are cuda:0 (Card 0), cuda:1 (Card 1) and cpu"
    assert not cards


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:-1", "cuda:1234", "CUDA", ""])
def test_other_names_are_no_devices(name):
    assert not is_device(name)
    with pytest.raises(InputError, match="is none of auto, cpu, cuda, cuda:N"):
        choose_device(name)
