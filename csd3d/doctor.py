"""`csd3d doctor`: what is installed here and works, each tried for a moment, and the command for what is missing."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from csd3d import __version__, registry
from csd3d.arguments import Parser, check_new_file, path_of, show
from csd3d.errors import InputError, one_line
from csd3d.files import write_text
from csd3d.memory import memory_bytes, size_text

PYTHON = (3, 11)
INSTALL = "pip install -c constraints.txt -e "
CARDS = ("/dev/nvidia0", "/proc/driver/nvidia/gpus")  # one of them is there where a driver of NVIDIA's is
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "kornia", "trimesh", "omegaconf")
EXTRAS = {  # name -> (module that is tried, what it is for)
    "process": ("pycolmap", "camera poses of a film or of photos"),
    "metrics": ("torch_fidelity", "published FID, CLIP scores and LPIPS"),
    "lora": ("peft", "LoRA weights: VSD, prior.lora"),
    "quantise": ("torchao", "quantised weights"),
    "sweep": ("submitit", "many runs from one file"),
    "openvino": ("openvino", "a faster noise predictor on CPUs"),
    "onnxruntime": ("onnxruntime", "a faster noise predictor on CPUs"),
    "gsplat": ("gsplat", "Gaussian splats on CUDA"),
    "tcnn": ("tinycudann", "the hash grid on CUDA"),
    "test": ("pytest", "the tests"),
}
ON_CUDA = ("gsplat", "tcnn")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the table."""

    group: str  # basics, device, kernels, models, families or extras
    name: str
    state: str  # ok, missing or broken
    detail: str
    command: str = ""  # that would mend it
    needed: bool = False  # whether nothing works without it


def attempt(group: str, name: str, try_it: Callable[[], str], command: str = "", needed: bool = False) -> Finding:
    """What came of trying something: `try_it` returns a detail or raises; only ModuleNotFoundError means missing."""
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise), contextlib.redirect_stdout(noise), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Finding(group, name, "ok", try_it(), needed=needed)
    except ModuleNotFoundError as error:
        return Finding(group, name, "missing", one_line(error), command, needed)
    except Exception as error:  # whatever a broken package raises
        return Finding(group, name, "broken", f"{type(error).__name__}: {one_line(error, 120)}", command, needed)


def examine() -> list[Finding]:
    """Try everything; takes some seconds."""
    found = [attempt("basics", "python", _python, "install Python 3.11 or later", True)]
    found += [
        attempt("basics", name, lambda name=name: _package(name), f"{INSTALL}.", True) for name in ("csd3d", *PACKAGES)
    ]
    found.append(attempt("basics", "ffmpeg", _ffmpeg, "pip install imageio-ffmpeg"))
    if any(each.name == "torch" and each.state != "ok" for each in found):
        return found  # nothing else can be tried
    found.append(attempt("device", "cpu", _cpu, f"{INSTALL}.", True))
    found.append(cuda())
    found.append(attempt("kernels", "C++", _native, f"install a C++ compiler (gcc), then: {INSTALL}."))
    found.append(attempt("kernels", "torch reference", _reference, f"{INSTALL}.", True))
    for name in ("ip2p", "t2i"):
        found.append(attempt("models", name, lambda name=name: _model(name), f"{INSTALL}.", True))
    try:
        entries = registry.entries("family")
    except InputError as error:
        return [*found, Finding("families", "all", "broken", one_line(error), f"{INSTALL}.", True)]
    for entry in entries:
        found.append(attempt("families", entry.name, lambda entry=entry: _family(entry), f"{INSTALL}. --upgrade"))
    for name, (module, about) in EXTRAS.items():
        command = f'{INSTALL}".[{name}]"' + (" (needs CUDA)" if name in ON_CUDA else "")
        found.append(attempt("extras", name, lambda m=module, about=about: f"{_imported(m)}; {about}", command))
    return found


def _python() -> str:
    if sys.version_info < PYTHON:
        raise RuntimeError(f"{platform.python_version()} is too old")
    return f"{platform.python_version()}, {platform.platform(terse=True)}"


def _package(name: str) -> str:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = __version__ if name == "csd3d" else ""
        if not version:
            raise ModuleNotFoundError(f"{name} is not installed") from None
    importlib.import_module(name)
    return version


def _imported(module: str) -> str:
    found = importlib.import_module(module)
    return str(getattr(found, "__version__", "there"))


def _ffmpeg() -> str:
    import imageio_ffmpeg

    return f"{imageio_ffmpeg.get_ffmpeg_version()}, {imageio_ffmpeg.get_ffmpeg_exe()}"


def _cpu() -> str:
    import psutil
    import torch

    assert torch.ones(3).sum() == 3
    free = size_text(min(psutil.virtual_memory().available, memory_bytes()))
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; {free} of {size_text(memory_bytes())} free"


def cuda() -> Finding:
    """Whether a card can be used; where there is one that cannot, why not."""
    import torch

    if torch.cuda.is_available():
        return attempt("device", "cuda", _cards, "update the driver of the card")
    if not (shutil.which("nvidia-smi") or any(map(os.path.exists, CARDS))):
        return Finding("device", "cuda", "missing", "no NVIDIA card was found; everything runs on the CPU")
    driver = _driver()
    if torch.version.cuda is None:
        detail = f"there is a card ({driver}), but torch {torch.__version__} is a build for the CPU"
        return Finding("device", "cuda", "broken", detail, "pip install --force-reinstall torch==2.13.0")
    detail = f"there is a card ({driver}), but torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}"
    return Finding(
        "device", "cuda", "broken", f"{detail}: too old, or no access to the card", "update the driver of the card"
    )


def _cards() -> str:
    import torch

    told = []
    for i in range(torch.cuda.device_count()):
        assert torch.ones(3, device=f"cuda:{i}").sum().item() == 3
        free, whole = torch.cuda.mem_get_info(i)
        told.append(f"cuda:{i} {torch.cuda.get_device_name(i)}, {size_text(free)} of {size_text(whole)} free")
    return f"CUDA {torch.version.cuda}; " + "; ".join(told)


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        name, _, version = done.stdout.strip().partition("\n")[0].rpartition(", ")
        return f"{name}, driver {version}"
    except (OSError, subprocess.SubprocessError):
        return "its driver does not answer"


def _native() -> str:
    from custom_kernels import native

    with _silent():
        library = native.library()
    if library is None:
        raise ModuleNotFoundError("not built, or of another version: the slow torch reference is used")
    return f"{Path(library._name).stem.rpartition('_')[2]}; hash grid equal to the reference to {_encode('native'):.0e}"


def _reference() -> str:
    return f"hash grid, difference {_encode('reference'):.0e}"


def _encode(backend: str) -> float:
    """The largest difference of a backend's hash grid from the reference's, on a few points."""
    import torch

    from custom_kernels.hashgrid import grid_layout, hash_encode, init_table

    offsets, resolutions = grid_layout(2, 4, 8, 8)
    generator = torch.Generator().manual_seed(0)
    points, entries = torch.rand(5, 3, generator=generator), init_table(offsets[-1], 2, generator)
    found = [hash_encode(points, entries, offsets, resolutions, backend=name) for name in (backend, "reference")]
    return (found[0] - found[1]).abs().max().item()


def _model(name: str) -> str:
    import torch

    from csd3d.priors.loading import PriorConfig, load_prior
    from csd3d.run import PACKAGE_ROOT

    with _silent():
        prior = load_prior(PriorConfig(model=str(PACKAGE_ROOT / "csd3d" / "assets" / name), device="cpu"))
    z = torch.zeros(1, *prior.latent_shape(64, 64))
    image = prior.source.null(z) if prior.source is not None else None
    started = time.monotonic()
    eps = prior.predict_noise(z, 10, prior.condition([""], image))
    if not eps.isfinite().all():
        raise RuntimeError("predicts values that are not finite")
    return f"shipped; predicts a row of 64 x 64 pixels in {time.monotonic() - started:.2f} s"


def _family(entry: registry.Entry) -> str:
    for place in dict.fromkeys(getattr(entry.thing, "parts", {}).values()):
        module, _, name = place.rpartition(".")
        getattr(importlib.import_module(module), name)
    return entry.title


@contextlib.contextmanager
def _silent():
    """No logging while open."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def table(found: Sequence[Finding]) -> str:
    """The findings as plain text, with the commands below."""
    width = max(len(each.name) for each in found)
    lines, group = [], ""
    for each in found:
        if each.group != group:
            lines.append(each.group)
            group = each.group
        lines.append(f"  {each.name:{width}}  {each.state:7}  {each.detail}")
    commands = [f"  {each.name:{width}}  {each.command}" for each in found if each.state != "ok" and each.command]
    return "\n".join([*lines, *(["", "to mend or add:", *commands] if commands else [])])


def works(found: Sequence[Finding]) -> bool:
    """Whether everything that is needed works."""
    return all(each.state == "ok" for each in found if each.needed)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if the basics work, else 1."""
    parser = Parser(prog="csd3d doctor", description="Show what is installed and works here, and how to get the rest.")
    parser.add_argument("--json", metavar="FILE", type=path_of, help="write the findings here too")
    args = parser.parse_all(argv)
    check_new_file(args.json, "--json")
    found = examine()
    show(table(found))
    show("\nthe basics work" if works(found) else "\nthe basics do not work")
    if args.json:
        content = {"works": works(found), "findings": [dataclasses.asdict(each) for each in found]}
        try:
            write_text(args.json, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"--json: {args.json}: cannot be written ({error.strerror})") from None
    return 0 if works(found) else 1
