"""GPU libraries are tried once; what fails is named in one line, and another backend computes."""

import logging

import pytest
import torch

from custom_kernels import hashgrid, libraries, rendering, splats, trials
from custom_kernels.trials import Library, close, obstacle, require, runs

POSITIONS, TABLE = torch.rand(5, 3), torch.zeros(8, 2)


def library(trial, name="json"):  # a package that is there
    return Library(name, f"pip install {name}", trial)


@pytest.fixture
def gpu(monkeypatch):
    """Tensors that say they are on a GPU, which torch sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(trials, "interpreting", lambda: False)
    monkeypatch.setattr(hashgrid, "_native_obstacle", lambda *_: "on a GPU")
    for cached in (obstacle, trials.warn_once):
        cached.cache_clear()
    yield
    for cached in (obstacle, trials.warn_once):
        cached.cache_clear()


def works(monkeypatch, *names):
    """Let the trials of the named libraries succeed, and all others fail; all packages are there."""
    monkeypatch.setattr(trials.importlib.util, "find_spec", lambda name: name)

    def outcome(name):
        def trial():
            if name not in names:
                raise OSError(f"{name}.so: undefined symbol\nand a long trace")

        return trial

    for key, module in (("TRITON", hashgrid), ("TCNN", hashgrid), ("TRITON", rendering), ("NERFACC", rendering)):
        own = getattr(libraries, key)
        monkeypatch.setattr(module, key, Library(own.name, own.install, outcome(own.name)))


def test_a_library_is_tried_once_and_reported_in_one_line(gpu, caplog):
    tried = []

    def trial():
        tried.append(1)
        raise RuntimeError("no kernel image is available\nfor this device")

    broken = library(trial)
    with caplog.at_level(logging.WARNING):
        assert [runs(broken), runs(broken)] == [False, False]
    assert len(tried) == 1
    line = "json is installed but failed its trial: no kernel image is available; another backend is used instead"
    assert [record.getMessage() for record in caplog.records] == [line]
    assert runs(library(lambda: None))


def test_what_is_missing_is_asked_for_by_its_command(gpu):
    missing = library(lambda: None, name="not_a_package")
    assert obstacle(missing) == "not_a_package is not installed: pip install not_a_package"
    with pytest.raises(RuntimeError, match="asked for and is not installed: pip install not_a_package"):
        require(missing, POSITIONS)
    with pytest.raises(RuntimeError, match="float32"):
        require(library(lambda: None), POSITIONS.double())


def test_named_libraries_need_a_gpu():
    with pytest.raises(RuntimeError, match="json computes on a GPU, got tensors on cpu"):
        require(library(lambda: None), POSITIONS)


@pytest.mark.parametrize(
    ("working", "encoding", "marching", "lines"),
    [
        (("triton", "tinycudann"), "triton", "triton", 0),
        (("tinycudann",), "tcnn", "reference", 1),
        ((), "reference", "reference", 2),
    ],
)
def test_auto_on_a_gpu(gpu, monkeypatch, caplog, working, encoding, marching, lines):
    works(monkeypatch, *working)
    assert hashgrid.choose_backend("auto", POSITIONS, TABLE) == encoding
    assert rendering.choose_backend("auto", POSITIONS) == marching
    assert rendering.choose_backend("auto", POSITIONS.double()) == "reference"
    assert len(caplog.records) == lines


def test_nerfacc_by_name_falls_back_where_it_does_not_compile(gpu, monkeypatch, caplog):
    works(monkeypatch, "triton")
    assert rendering.choose_backend("nerfacc", POSITIONS) == "triton"
    assert "nerfacc is installed but failed its trial: nerfacc.so: undefined symbol" in caplog.text
    with pytest.raises(RuntimeError, match="tinycudann is installed but failed"):
        hashgrid.choose_backend("tcnn", POSITIONS, TABLE)


def test_splats_on_a_gpu_say_why_gsplat_does_not_run(gpu, monkeypatch):
    failing = library(lambda: 1 / 0, name="json")
    monkeypatch.setattr(splats, "GSPLAT", failing)
    assert splats.gsplat_obstacle() == "json is installed but failed its trial: division by zero"


def test_a_child_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(libraries, "NERFACC_CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(libraries, "NERFACC_SECONDS", 0.2)
    with pytest.raises(TimeoutError, match="not compiled after 0 s"):
        libraries.try_nerfacc()
    monkeypatch.setattr(libraries, "NERFACC_CHILD", "raise SystemExit('x.cu(3): error: no lerp')")
    monkeypatch.setattr(libraries, "NERFACC_SECONDS", 20.0)
    with pytest.raises(RuntimeError, match=r"x\.cu\(3\): error: no lerp"):
        libraries.try_nerfacc()


def test_results_far_from_the_reference_fail_a_trial():
    close(POSITIONS, POSITIONS + 1e-6)
    for wrong in (POSITIONS + 0.01, POSITIONS * torch.nan):
        with pytest.raises(ArithmeticError, match="differ from the reference"):
            close(wrong, POSITIONS)
