"""Loading the compiled C++ kernels, for the widest instruction set of this processor."""

import ctypes
import functools
import logging
import platform
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger("custom_kernels")
INSTALL = "install a C++ compiler (gcc) and run: pip install -c constraints.txt -e ."
VERSION = 4  # that of custom_kernels/cpu/version.cpp; raise both when an exported function is added or changed
_REQUIRED_FLAGS = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma"},
    "baseline": set(),
}
_threads: int | None = None  # see `set_num_threads`


def _cpu_flags() -> set[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), ()))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (with one warning) if they were not built; the reference is used then."""
    flags = _cpu_flags()
    for isa, required in _REQUIRED_FLAGS.items():
        path = Path(__file__).parent / f"_native_{isa}.so"
        if required <= flags and path.exists():
            found = ctypes.CDLL(str(path))
            if hasattr(found, "kernels_version") and found.kernels_version() == VERSION:
                return found
            logger.warning("the compiled kernels are of another version: using the slow torch reference; %s", INSTALL)
            return None
    logger.warning("no compiled kernels: using the slow torch reference; %s", INSTALL)
    return None


def require_library() -> ctypes.CDLL:
    """The compiled kernels; raises RuntimeError naming the install command if they are missing."""
    lib = library()
    if lib is None:
        raise RuntimeError(f"backend 'native' was asked for but its kernels are not built: {INSTALL}")
    return lib


def require(*tensors: Tensor) -> None:
    """Raise RuntimeError if the kernels, asked for by name, are missing or these tensors are not for them."""
    require_library()
    for x in tensors:
        if x.device.type != "cpu" or x.dtype != torch.float32:
            raise RuntimeError(f"backend 'native' takes float32 tensors on the CPU, got {x.dtype}, {x.device}")


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Address of a contiguous CPU tensor's data (null for None)."""
    if tensor is None:
        return ctypes.c_void_p(None)
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"native kernels take contiguous CPU tensors, got {tensor.device}, contiguous={tensor.is_contiguous()}"
        )
    return ctypes.c_void_p(tensor.data_ptr())


def num_threads() -> int:
    """Threads a kernel may use: those that were set here, else torch's own setting."""
    return _threads or torch.get_num_threads()


def set_num_threads(count: int | None) -> None:
    """Set the kernels' threads apart from torch's; None: as many as torch has."""
    global _threads
    _threads = count


def is_set() -> bool:
    """Whether the kernels' threads are set apart from torch's."""
    return _threads is not None
