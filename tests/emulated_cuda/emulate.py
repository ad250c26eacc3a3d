"""CUDA emulated on a machine without one: tensors that say cuda:0, hold CPU data, and refuse what CUDA refuses.

    python tests/emulated_cuda/emulate.py SCRIPT ARGS...      runs SCRIPT as if torch saw one CUDA device

Refused: operands on two devices, CUDA indices into a CPU tensor, a CPU generator for a CUDA tensor, numpy() of a CUDA
tensor, its data_ptr() in custom_kernels. Autocast runs as it would on CUDA (float16). Counted, and printed at the end,
by kind and by line: what makes the host wait (.item(), nonzero, bool masks, copies). EMULATED_CUDA_LENIENT=1 logs each
mismatch once, with its file and line, and goes on. Needs a C++ compiler; builds guard.cpp once, in a temporary folder.
Compiled CUDA kernels can't run. Speed and memory say nothing; results are the CPU's.
"""

import collections
import contextlib
import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = Path(importlib.util.find_spec("torch").origin).parent


def build_guard() -> Path:
    """The guard, built for this torch; made anew when its source or torch changes."""
    source = HERE / "guard.cpp"
    key = zlib.crc32(f"{TORCH} {(TORCH / 'version.py').read_text()} {source.read_text()}".encode())
    out = Path(tempfile.gettempdir()) / f"emulated_cuda_{os.getuid()}_{key:08x}.so"
    if not out.exists():
        part = out.with_suffix(f".{os.getpid()}")  # two runs may build it at once
        includes = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
        flags = ["-std=c++20", "-O1", "-fPIC", "-shared"]
        subprocess.run([os.environ.get("CXX", "g++"), *flags, *includes, str(source), "-o", str(part)], check=True)
        part.replace(out)
    return out


def load_guard() -> None:
    """Loads the guard before torch itself is imported: torch looks for CUDA's hooks once, at its start."""
    for path in (TORCH / "lib/libc10.so", TORCH / "lib/libtorch_cpu.so", build_guard()):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


load_guard()
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
SYNCS: collections.Counter = collections.Counter()  # what made the host wait, by kind
PLACES: collections.Counter = collections.Counter()  # the same by the project's line
MISMATCHES: collections.Counter = collections.Counter()
LENIENT = os.environ.get("EMULATED_CUDA_LENIENT") == "1"
WATCHED = ("csd3d", "custom_kernels")  # a mismatch is blamed on the innermost frame in one of these

CROSS = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor}  # may mix devices
INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
}  # fmt: skip
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.unique_dim.default, aten.bincount.default, aten.equal.default,
}  # fmt: skip


def waits(kind: str) -> None:
    """Counts what makes the host wait, by its kind and by the innermost line of the project."""
    SYNCS[kind] += 1
    frame = sys._getframe(1)  # traceback.extract_stack reads source files: too slow here
    while frame is not None and not any(f"/{name}/" in frame.f_code.co_filename for name in WATCHED):
        frame = frame.f_back
    if frame is not None:
        PLACES[f"{'/'.join(frame.f_code.co_filename.rsplit('/', 3)[1:])}:{frame.f_lineno}"] += 1


class CudaTensor(torch.Tensor):
    """A wrapper whose device is cuda:0; `inner` is the CPU tensor that holds the data."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "CudaTensor":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout, device=CUDA, requires_grad=False)
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    def _no_numpy(self, *args, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    numpy = __array__ = _no_numpy

    def tolist(self) -> list:
        waits("tolist")
        return self.inner.tolist()

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) in memo:
            return memo[id(self)]
        new = CudaTensor(self.inner.detach().clone())
        if isinstance(self, torch.nn.Parameter) or getattr(self, "_is_param", False):
            new = torch.nn.Parameter(new, self.requires_grad)
        elif self.is_leaf and self.requires_grad:
            new.requires_grad_()
        memo[id(self)] = new
        return new

    def data_ptr(self) -> int:
        """The address, by which tensors are told apart; not for kernels of the CPU, which would read there."""
        if "/custom_kernels/" in sys._getframe(1).f_code.co_filename:
            raise RuntimeError("data_ptr of an emulated CUDA tensor")
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class _Mode(TorchDispatchMode):
    """Sees what has no tensor among its arguments too, such as zeros(device="cuda")."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _on_cuda(x: object) -> bool:
    return isinstance(x, CudaTensor)


def _unwrap(x: object) -> object:
    if _on_cuda(x):
        return x.inner
    return CPU if isinstance(x, torch.device) and x.type == "cuda" else x


def _complain(func, message: str) -> None:
    """Raises as CUDA would, naming the line of the project; lenient: counts it."""
    frames = [f for f in traceback.extract_stack() if any(f"/{name}/" in f.filename for name in WATCHED)]
    at = f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}" if frames else "outside the project"
    text = f"{func}: {message}   at {at}"
    if not LENIENT:
        raise RuntimeError(text)
    MISMATCHES[text] += 1


def _check(func, args: tuple, flat: list) -> None:
    """Refuses what CUDA refuses of the operands, and counts what makes the host wait."""
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    cpu = [x for x in tensors if not _on_cuda(x)]
    if func is aten.copy_.default and _on_cuda(args[0]) != _on_cuda(args[1]):
        waits("copy between devices")
    if len(cpu) == len(tensors) or func in CROSS:
        return
    if func in WAITING:
        waits(str(func))
    if func in INDEXING:
        _check_index(func, args)
    elif any(x.dim() > 0 for x in cpu):
        shapes = [(x.device.type, tuple(x.shape)) for x in tensors]
        _complain(func, f"Expected all tensors to be on the same device, found cuda:0 and cpu: {shapes}")


def _check_index(func, args: tuple) -> None:
    """CUDA takes indices from the host, the host takes none from CUDA; values must be where the base is."""
    base, indices = args[0], [i for i in args[1] if i is not None]
    if any(_on_cuda(i) and i.dtype == torch.bool for i in indices):
        waits("bool index")
    if not _on_cuda(base) and any(_on_cuda(i) for i in indices):
        _complain(func, "indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if len(args) > 2 and _on_cuda(base) != _on_cuda(args[2]) and args[2].dim() > 0:
        _complain(func, f"base on {base.device}, values {tuple(args[2].shape)} on {args[2].device}")


def _asked_device(args: tuple, kwargs: dict) -> torch.device | None:
    """The device that a call names, if any."""
    for x in (kwargs.get("device"), *args):
        if isinstance(x, torch.device | str) and str(x).split(":")[0] in ("cpu", "cuda"):
            return torch.device(x)
    return None


def _run(func, args: tuple, kwargs: dict):
    """One operation: checked, done on the CPU, its results wrapped where CUDA would hold them."""
    flat, wanted = tree_leaves((args, kwargs)), _asked_device(args, kwargs)
    if not any(_on_cuda(x) for x in flat) and (wanted is None or wanted.type != "cuda"):
        return func(*args, **kwargs)
    if any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in flat):
        _complain(func, "Expected a 'cuda' device type for generator but found 'cpu'")
    _check(func, args, flat)
    if func is aten._fused_sdp_choice.default:
        return 0
    if func is aten._pin_memory.default:
        return args[0]
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        waits("repeat_interleave")
    a, k = tree_map(_unwrap, args), tree_map(_unwrap, kwargs)
    if k.get("pin_memory"):
        k["pin_memory"] = False
    if func is aten._to_copy.default:
        return _copied(args[0], a, k, _on_cuda(args[0]) if wanted is None else wanted.type == "cuda")
    if func is aten._softmax.default and a[2]:  # half in, float out: the CPU has no such kernel, CUDA has
        a = (a[0].float(), a[1], False)
    out = func(*a, **k)
    if func in (aten._local_scalar_dense.default, aten.equal.default):
        return out
    if func is aten.copy_.default:
        return args[0]
    if func is aten.index.Tensor and not _on_cuda(args[0]):
        return out
    return _wrapped(func, args, kwargs, flat, out)


def _copied(source: torch.Tensor, a: tuple, k: dict, to_cuda: bool) -> torch.Tensor:
    """x.to(...), never sharing memory with x."""
    in_the_background = k.pop("non_blocking", False) and to_cuda
    if _on_cuda(source) != to_cuda and not in_the_background:
        waits("copy to device" if to_cuda else "copy to host")
    out = aten._to_copy.default(*a, **(k | {"device": CPU}))
    out = out.clone() if out is a[0] else out
    return CudaTensor(out) if to_cuda else out


def _wrapped(func, args: tuple, kwargs: dict, flat: list, out):
    """Results as CUDA tensors; what an operation returns of its own arguments stays the same object."""
    known = {id(x.inner): x for x in flat if _on_cuda(x)}
    given = {id(x) for x in flat if isinstance(x, torch.Tensor) and not _on_cuda(x)}

    def wrap(x):
        if not isinstance(x, torch.Tensor) or id(x) in given:
            return x
        return known[id(x)] if id(x) in known else CudaTensor(x)

    out = tree_map(wrap, out)
    try:
        return return_and_correct_aliasing(func, args, kwargs, out)
    except Exception:  # it knows not every schema; without its help views do not share version counters, no more
        return out


def _pretend() -> None:
    """What torch.cuda answers while the emulation runs."""
    properties = type("Properties", (), {"total_memory": 24 << 30, "name": "emulated", "major": 9, "minor": 0})()
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "get_device_name": "emulated",
        "get_device_capability": (9, 0), "get_device_properties": properties, "synchronize": None, "empty_cache": None,
        "is_bf16_supported": True, "manual_seed_all": None, "is_initialized": True, "_lazy_init": None,
        "max_memory_allocated": 0, "memory_allocated": 0, "reset_peak_memory_stats": None,
        "set_per_process_memory_fraction": None, "set_sync_debug_mode": None, "get_sync_debug_mode": 0,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **options: _answer)
    fork = torch.random.fork_rng
    torch.random.fork_rng = lambda devices=None, *args, **options: fork([], *args, **options)
    # forward mode asks for shapes by tensors that torch makes beside the wrapper; reverse mode gives the same Jacobian
    torch.func.jacfwd = torch.func.jacrev
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # .to(device) can't swap the data of a wrapper


@contextlib.contextmanager
def emulated_cuda() -> Iterator[None]:
    """Within it, torch sees one CUDA device."""
    _pretend()
    with torch.autograd.set_multithreading_enabled(False), _Mode():  # modes don't reach autograd's own threads
        yield


def main() -> None:
    """Runs the script that the command line names."""
    sys.path.insert(0, os.getcwd())
    sys.modules["emulate"] = sys.modules[__name__]  # so that SCRIPT finds the counts
    sys.argv = sys.argv[1:]
    try:
        with emulated_cuda():
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print("host waits:", dict(SYNCS.most_common()), file=sys.stderr)
        print("most of them at:", dict(PLACES.most_common(20)), file=sys.stderr)
        for text, count in MISMATCHES.items():
            print(f"mismatch x {count}: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
