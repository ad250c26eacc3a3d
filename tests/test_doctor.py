"""`csd3d doctor`: what is told about a card that cannot be used, packages that are missing, and the exit code."""

import json
import os
import types

import pytest
import torch

from csd3d import doctor
from csd3d.doctor import Finding, attempt, works
from csd3d.errors import InputError


def test_everything_needed_works_here(tmp_path, capsys):
    assert doctor.main(["--json", str(tmp_path / "d.json")]) == 0
    out, told = capsys.readouterr().out, json.loads((tmp_path / "d.json").read_text())
    assert told["works"] is True
    found = {(each["group"], each["name"]): each for each in told["findings"]}
    assert found["basics", "torch"]["detail"] == torch.__version__
    assert found["models", "ip2p"]["state"] == found["models", "t2i"]["state"] == "ok"
    assert found["families", "sdxl"]["state"] == "ok"
    assert "free" in found["device", "cpu"]["detail"]
    for each in told["findings"]:
        assert each["name"] in out
        assert each["state"] == "ok" or not each["command"] or each["command"] in out


@pytest.mark.parametrize("place", ["/", "."])
def test_a_place_that_is_no_file_is_told_before_anything_is_tried(monkeypatch, place):
    monkeypatch.setattr(doctor, "examine", None)
    with pytest.raises(InputError, match=r"--json: .* is a folder"):
        doctor.main(["--json", place])


def test_a_missing_package_is_told_from_a_broken_one():
    def missing():
        raise ModuleNotFoundError("No module named 'x'")

    def broken():
        raise OSError("libx.so:\n undefined symbol")

    assert attempt("extras", "x", missing, "get x") == Finding("extras", "x", "missing", "No module named 'x'", "get x")
    assert attempt("extras", "x", broken).detail == "OSError: libx.so: undefined symbol"
    assert works([attempt("extras", "x", broken), attempt("basics", "y", lambda: "1", needed=True)])
    assert not works([attempt("basics", "y", missing, needed=True)])


@pytest.mark.parametrize(
    ("build", "detail", "command"),
    [(None, "is a build for the CPU", "torch==2.13.0"), ("12.8", "needs a driver for CUDA 12.8", "update the driver")],
)
def test_a_card_that_torch_cannot_use_is_told(monkeypatch, build, detail, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", build)
    answer = types.SimpleNamespace(stdout="NVIDIA T4, 470.1\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: answer)
    found = doctor.cuda()
    assert found.state == "broken"
    assert "there is a card (NVIDIA T4, driver 470.1)" in found.detail
    assert detail in found.detail
    assert command in found.command


def test_no_card_is_no_fault(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr(os.path, "exists", lambda _: False)
    assert doctor.cuda().state == "missing"
    assert not doctor.cuda().needed
