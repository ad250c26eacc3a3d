"""The noise predictor exported from torch, and computed by another library that is faster on a CPU.

    prior:
      runtime: openvino      # or onnxruntime; pip install -c constraints.txt -e ".[openvino]"

A network is exported once, in float32, and kept under ~/.cache/csd3d/runtimes by a hash of its weights, config and
versions. torch stays the reference: whenever a process first meets a size of input, one row of the answer is compared
with torch's. An export that is wrong for that size, which tracing made a constant, is made again for exactly that size.

torch itself computes where gradients are on, and while a method changes the network: attention processors, active LoRA
weights, hooks. Results agree with torch's to rounding only, so a checkpoint's identity has the runtime and its version.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csd3d.errors import InputError, one_line
from csd3d.files import cache_folder, whole_folder
from csd3d.priors.alterations import is_altered, parts_of
from csd3d.priors.calling import FlatCall, Inputs, flattened

logger = logging.getLogger("csd3d")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative error that a wrong graph is far beyond
ROOM = 64 << 20  # bytes that must be free beside the weights where an export is kept
UNFUSED = "unfused"  # openvino: a file that says that this export is not to be fused
TRIAL = """import sys; sys.modules["openvino_telemetry"] = None
import openvino; core = openvino.Core(); model = core.read_model({!r}); model.reshape({!r})
core.compile_model(model, "CPU", {{"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}})"""
FORMAT = 1  # raised when exports of this module change
STATIC_BYTES, STATIC_SHAPES = 512 << 20, 8  # openvino: weights up to which each shape is compiled, and how many shapes


def counted(runtime: str) -> str | None:
    """What a checkpoint's identity says of `prior.runtime`: name and version; None for torch, which it leaves out."""
    return None if runtime == "torch" else f"{runtime} {_version(BACKENDS[runtime].packages[0])}"


def check_runtime(runtime: str, dtype: str, attention: str) -> None:
    """Raise InputError for an unknown runtime, or one that cannot do what the other keys of the prior ask."""
    if runtime not in RUNTIMES:
        raise InputError(f"prior.runtime: {runtime!r} is none of {', '.join(RUNTIMES)}")
    if runtime == "torch":
        return
    if dtype not in (known := BACKENDS[runtime].dtypes):
        raise InputError(f"prior.dtype: {dtype!r} is not for {runtime}, which takes {', '.join(known)}")
    if attention == "sliced":
        raise InputError(f"prior.attention: sliced is torch's; with prior.runtime={runtime} use auto")


def check_installed(runtime: str, device: torch.device) -> None:
    """Raise InputError where the packages of a runtime are missing, or the prior is not on the CPU."""
    if runtime == "torch":
        return
    missing = [name for name in BACKENDS[runtime].packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f'prior.runtime: {runtime} needs {" and ".join(missing)}: pip install -c constraints.txt -e ".[{runtime}]"'
        )
    if device.type != "cpu":
        raise InputError(f"prior.runtime: {runtime} computes on the CPU; set prior.device=cpu, or prior.runtime=torch")


class Exported:
    """A frozen network computed by `runtime`, called as the network is; gives its output [B, C, h, w] in float32.

    dtype: float32, or bfloat16 for products of matrices in it.  The number of threads is torch's.
    """

    def __init__(self, network: nn.Module, runtime: str, dtype: torch.dtype):
        self.network, self.runtime, self.dtype = network, runtime, dtype
        self.folder = cache_folder("runtimes") / f"{runtime}-{fingerprint(network, runtime)[:32]}"
        self._parts = parts_of(network)
        self._opened: dict[tuple, Callable[[Inputs], Tensor]] = {}
        self._told = False

    def holds(self) -> bool:
        """Whether the network may be computed by the runtime now; see the module's docstring."""
        if not (torch.is_grad_enabled() or is_altered(self.network, self._parts)):
            return True
        if not self._told:
            self._told = True
            logger.info("prior.runtime: torch computes the noise while a method changes the network")
        return False

    @torch.no_grad()
    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """The network's output for these arguments; InputError where it cannot be exported or differs from torch's."""
        inputs, fixed = flattened(self.network, args, options)
        names = tuple((name, x.dtype, x.ndim) for name, x in inputs.items())
        sizes = tuple(tuple(x.shape[1:]) for x in inputs.values())
        if (run := self._opened.get((names, sizes, fixed))) is None:
            run = self._opened[names, sizes, fixed] = self._open(inputs, fixed, repr(names), repr(sizes))
        return run(inputs)

    def _open(self, inputs: Inputs, fixed: tuple, names: str, sizes: str) -> Callable[[Inputs], Tensor]:
        """The exported network for inputs of these sizes, compared with torch."""
        network = FlatCall(self.network, tuple(inputs), fixed)
        expected = network(*(x[:1] for x in inputs.values())).float()
        problem = ""
        for part in (f"{names} {fixed}", f"{names} {fixed} {sizes}"):  # of any size, then of exactly this one
            folder = self.folder / hashlib.sha256(part.encode()).hexdigest()[:16]
            run = self._read_or_export(folder, network, inputs)
            try:
                answer = run(inputs)[:1]
            except Exception as error:  # other libraries' own; the graph does not fit these sizes
                problem = one_line(error)
                continue
            difference = ((answer - expected).norm() / expected.norm().clamp_min(1e-12)).item()
            if difference <= TOLERANCE[self.dtype] or not expected.isfinite().all():
                return run
            problem = f"relative difference to torch {difference:.1e}"
        raise InputError(
            f"prior.runtime: {self.runtime} cannot compute this model ({problem}); use prior.runtime=torch"
        )

    def _read_or_export(self, folder: Path, network: "FlatCall", inputs: Inputs) -> Callable[[Inputs], Tensor]:
        read = BACKENDS[self.runtime]
        if folder.is_dir():
            try:
                return read(folder, self.dtype)
            except Exception as error:  # damaged
                logger.warning("%s: unreadable (%s), exporting again", folder, one_line(error, 80))
                shutil.rmtree(folder, ignore_errors=True)
        start = time.monotonic()
        try:
            weights = sum(x.numel() * x.element_size() for x in self.network.state_dict().values())
            with whole_folder(folder, weights + ROOM) as partial:
                self._export(network, inputs, partial)
        except OSError as error:
            where = error.filename or folder
            raise InputError(f"prior.runtime: {where}: cannot be written ({error.strerror})") from None
        logger.info("exported the noise predictor to %s in %.0f s", folder, time.monotonic() - start)
        return read(folder, self.dtype)

    def _export(self, network: "FlatCall", inputs: Inputs, folder: Path) -> None:
        # another batch than that of the call, so that the comparison notices one that was traced as a constant
        rows = 3 if len(next(iter(inputs.values()))) == 2 else 2
        example = tuple(x[:1].expand(rows, *x.shape[1:]).contiguous() for x in inputs.values())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tracing: the comparison with torch judges the result
                BACKENDS[self.runtime].export(network, example, tuple(inputs), folder)
        except OSError:
            raise
        except Exception as error:  # a tracer can raise anything
            raise InputError(
                f"prior.runtime: {self.runtime} cannot export a {type(self.network).__name__} "
                f"({type(error).__name__}: {one_line(error, 120)}); use prior.runtime=torch"
            ) from None


def fingerprint(network: nn.Module, runtime: str) -> str:
    """A hash of a network's class, config and weights, and of the versions that export and run it."""
    versions = {name: _version(name) for name in ("torch", "diffusers", *BACKENDS[runtime].packages)}
    config = {key: value for key, value in getattr(network, "config", {}).items() if key != "_name_or_path"}
    about = [FORMAT, type(network).__qualname__, config, versions]
    found = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        found.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(tensor.cpu().flatten().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


# ----------------------------------------------------------------------------------------------------- the two runtimes


class OpenVino:
    """An exported network in OpenVINO.

    Small networks are compiled for each shape, which is faster; large ones, where that takes long, once for all shapes.
    """

    packages = ("openvino",)
    dtypes = ("auto", "float32", "bfloat16")

    @staticmethod
    def export(network: nn.Module, example: tuple[Tensor, ...], names: tuple[str, ...], folder: Path) -> None:
        openvino = _openvino()
        model = openvino.convert_model(network, example_input=example)
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
        # fusing layers has crashed the process for a very small network, so a process of its own tries it
        shapes = {number: list(x.shape) for number, x in enumerate(example)}
        tried = subprocess.run(
            [sys.executable, "-c", TRIAL.format(str(folder / "model.xml"), shapes)], capture_output=True
        )
        if tried.returncode:
            (folder / UNFUSED).touch()

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.core = _openvino().Core()
        self.model = self.core.read_model(folder / "model.xml")
        self.static = (folder / "model.bin").stat().st_size <= STATIC_BYTES
        self.options = {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",  # its own choice may be bf16
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # torch's threads use the same cores
        }
        if (folder / UNFUSED).exists():
            self.options["SNIPPETS_MODE"] = "DISABLE"
        self.requests: dict[tuple, Any] = {}  # by shape, the latest last

    def __call__(self, inputs: Inputs) -> Tensor:
        request = self._request(tuple(tuple(x.shape) for x in inputs.values()) if self.static else ())
        answer = request.infer({number: x.numpy() for number, x in enumerate(inputs.values())})[0]
        return torch.from_numpy(answer.copy()).float()  # the request writes its next answer in the same place

    def _request(self, shapes: tuple) -> Any:
        if (request := self.requests.pop(shapes, None)) is None:
            model = self.model.clone()
            if shapes:
                model.reshape({number: list(shape) for number, shape in enumerate(shapes)})
            if len(self.requests) == STATIC_SHAPES:
                del self.requests[next(iter(self.requests))]
            request = self.core.compile_model(model, "CPU", self.options).create_infer_request()
        self.requests[shapes] = request
        return request


def _openvino() -> Any:
    _stop_reports()
    import openvino

    return openvino


def _stop_reports() -> None:
    """Keep both libraries from reporting every use to their makers over the network."""
    sys.modules.setdefault("openvino_telemetry", None)
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class OnnxRuntime:
    """An exported network in ONNX Runtime, for all shapes."""

    packages = ("onnxruntime", "onnx")
    dtypes = ("auto", "float32")

    @staticmethod
    def export(network: nn.Module, example: tuple[Tensor, ...], names: tuple[str, ...], folder: Path) -> None:
        _stop_reports()
        sides = {0: "batch"}, {0: "batch", 2: "height", 3: "width"}
        axes = {name: sides[x.ndim == 4] for name, x in zip(names, example, strict=True)}
        options = {"input_names": list(names), "output_names": ["output"], "dynamic_axes": axes}
        torch.onnx.export(network, example, str(folder / "model.onnx"), opset_version=18, dynamo=False, **options)

    def __init__(self, folder: Path, dtype: torch.dtype):
        _stop_reports()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch's threads use the same cores
        options.log_severity_level = 4  # errors are raised too
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Inputs) -> Tensor:
        return torch.from_numpy(self.session.run(None, {name: x.numpy() for name, x in inputs.items()})[0]).float()


BACKENDS = {"openvino": OpenVino, "onnxruntime": OnnxRuntime}
RUNTIMES = ("torch", *BACKENDS)


# -------------------------------------------------------------------------------------------------------------- helpers


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
