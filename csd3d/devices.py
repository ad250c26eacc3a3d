"""Which device a run uses, and why a graphics card that is there cannot be used."""

import contextlib
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from csd3d.errors import InputError, one_line

if TYPE_CHECKING:
    import torch

FORMS = "auto, cpu, cuda, cuda:N"
KERNEL_MODULE = Path("/proc/driver/nvidia/version")  # there where NVIDIA's driver is loaded, also within a container
DEVICE_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # what a program opens to use a card; the latter in WSL
# The oldest driver that runs a torch built for a CUDA of that generation (NVIDIA's CUDA compatibility guide)
OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
INSTALL = "with the command that https://pytorch.org/get-started gives for"


def is_device(name: str) -> bool:
    """Whether a text is one of auto, cpu, cuda and cuda:N."""
    return re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name) is not None


def choose_device(name: str, key: str = "prior.device") -> "torch.device":
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`; `auto` is CUDA where there is one.

    A CUDA device becomes torch's current one, which kernels run on. Raises InputError, which begins with `key`, where
    the device does not exist: it names those that do, or says why a card that is there cannot be used.
    """
    import torch  # takes seconds, and the command line only asks `is_device`

    if not is_device(name):
        raise InputError(f"{key}: {name!r} is none of {FORMS}")
    with warnings.catch_warnings():  # of a driver that is too old: `unusable_card` says so, and what to do
        warnings.simplefilter("ignore")
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(("cuda" if there else "cpu") if name == "auto" else name)
    if device.type == "cpu":
        return device
    if not there:
        reason = unusable_card() or "torch sees no graphics card here"
        raise InputError(f"{key}: {name} cannot be used: {reason}. There is cpu")
    if (device.index or 0) >= there:
        known = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(there))
        raise InputError(f"{key}: {name} does not exist; there are {known} and cpu")
    torch.cuda.set_device(device.index or 0)
    return device


def unusable_card() -> str | None:
    """Why torch cannot use a graphics card of NVIDIA that is there, and what to install; None without such a card."""
    import torch

    driver = driver_version()
    if driver is None:
        return None
    name = ".".join(map(str, driver))
    card = f"there is a graphics card (NVIDIA driver {name})"
    if torch.version.cuda is None:
        newest = max((cuda for cuda, oldest in OLDEST_DRIVER.items() if driver >= oldest), default=None)
        which = f"CUDA {newest}" if newest else "CUDA, after updating the driver"
        return f"{card}, but torch {torch.__version__} is built without CUDA: install it again {INSTALL} {which}"
    if not any(path.exists() for path in DEVICE_FILES):
        return f"{card}, but this container has no access to it: start it with the card, as docker run --gpus all"
    oldest = OLDEST_DRIVER.get(int(torch.version.cuda.partition(".")[0]))
    if oldest is not None and driver < oldest:
        wanted = ".".join(map(str, oldest))
        older = [cuda for cuda, least in OLDEST_DRIVER.items() if driver >= least]
        other = f", or install torch {INSTALL} CUDA {max(older)}" if older else ""
        return (
            f"{card}, but it is too old for this torch, which is built for CUDA {torch.version.cuda}: "
            f"update the driver to {wanted} or newer{other}"
        )
    return f"{card}, but CUDA does not start ({_cuda_error()}); see what nvidia-smi says"


def driver_version() -> tuple[int, ...] | None:
    """The version of NVIDIA's driver, such as (535, 183); None without one."""
    with contextlib.suppress(OSError):
        if found := re.search(r"\b(\d{3,4})\.(\d+)(?:\.\d+)?\b", KERNEL_MODULE.read_text()):
            return int(found[1]), int(found[2])
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        if found := re.match(r"\s*(\d+)\.(\d+)", told):
            return int(found[1]), int(found[2])
    return None


def _cuda_error() -> str:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return one_line(error)
    return "torch sees no device; is CUDA_VISIBLE_DEVICES empty?"
