"""The noise predictor compiled by torch.compile for its device.

    prior:
      compile: true

It is compiled at the first call, which takes up to minutes, and again for new sizes. As with `runtimes`, torch computes
it uncompiled where gradients are on and while a method changes the network. Results agree to rounding only.
"""

import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from csd3d.errors import InputError, one_line
from csd3d.priors.alterations import is_altered, parts_of
from csd3d.priors.options import Options
from csd3d.priors.runtimes import Exported


class Compiled:
    """A frozen network, compiled; called as the network is, gives its output in float32.

    dtype: float32, or the precision of autocast.
    """

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype):
        self.network, self.device, self.dtype = network, device, dtype
        self._parts, self._run = parts_of(network), torch.compile(network)

    def holds(self) -> bool:
        """Whether the compiled network may be used now."""
        return not (torch.is_grad_enabled() or is_altered(self.network, self._parts))

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """The network's output for these arguments; InputError where it cannot be compiled."""
        from torch._dynamo.exc import TorchDynamoException

        try:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                return self._run(*args, **options, return_dict=False)[0].float()
        except TorchDynamoException as error:
            raise InputError(
                f"prior.compile: torch.compile cannot compile this model ({type(error).__name__}: "
                f"{one_line(error, 120)}); set prior.compile=false"
            ) from None


def check_compiler(device: torch.device) -> None:
    """Raise InputError where torch.compile lacks its compiler: Triton on CUDA, a C++ compiler elsewhere."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError("prior.compile: needs Triton on CUDA: pip install triton, or set prior.compile=false")
    if device.type != "cuda" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise InputError("prior.compile: needs g++ on the CPU: apt install g++, or set prior.compile=false")


def faster(network: nn.Module, options: Options, device: torch.device) -> Exported | Compiled | None:
    """What computes the network in place of torch, as `options` say; None where torch does."""
    if options.runtime != "torch":
        return Exported(network, options.runtime, options.dtype)
    return Compiled(network, device, options.dtype) if options.compile else None
