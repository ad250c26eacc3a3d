"""The GPU libraries that kernels can run by, and how each is tried: a tiny problem, by it and by the reference."""

import os
import signal
import subprocess
import sys

import torch
from torch import Tensor

from custom_kernels.trials import Library, close, interpreting

NERFACC_SECONDS = 300.0  # nerfacc compiles its sources at its first use, which can also wait for ever
NERFACC_CHILD = """
import nerfacc, torch
o, d = torch.zeros(1, 3, device="cuda"), torch.tensor([[0.0, 0, 1]], device="cuda")
cells, box = torch.ones(1, 2, 2, 2, dtype=torch.bool, device="cuda"), torch.tensor([[-1.0, -1, -1, 1, 1, 1]]).cuda()
assert len(nerfacc.traverse_grids(o, d, cells, box, step_size=0.25)[1].vals)
"""


def try_triton() -> None:
    """Compile every Triton kernel (seconds, then kept in Triton's cache) and compare values and gradients."""
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 runs its kernels in Python, one program after another")
    from custom_kernels.hashgrid import hash_encode_reference
    from custom_kernels.hashgrid_triton import encode_triton
    from custom_kernels.rendering import march_by
    from custom_kernels.rendering_reference import composite_reference
    from custom_kernels.rendering_triton import composite_triton

    positions, table, layout = _encoding("cuda")
    _compare(lambda *x: encode_triton(*x, *layout), lambda *x: hash_encode_reference(*x, *layout), positions, table)
    problem = _rays("cuda")
    samples, wanted = (march_by(name, *problem) for name in ("triton", "reference"))
    if not torch.equal(samples.packed_info, wanted.packed_info):
        raise ArithmeticError("its march finds other samples than the reference")
    close(samples.t_starts, wanted.t_starts)
    sigmas, rgbs = torch.rand(len(samples.t_starts), device="cuda"), torch.rand(len(samples.t_starts), 3, device="cuda")
    rest = samples.t_starts, samples.t_ends, samples.packed_info
    _compare(lambda *x: composite_triton(*x, *rest)[0], lambda *x: composite_reference(*x, *rest).rgb, sigmas, rgbs)


def try_tcnn() -> None:
    """Encode 256 points by tinycudann and by the reference."""
    from custom_kernels.hashgrid import hash_encode_reference
    from custom_kernels.hashgrid_tcnn import encode_tcnn

    positions, table, layout = _encoding("cuda")
    _compare(lambda *x: encode_tcnn(*x, *layout), lambda *x: hash_encode_reference(*x, *layout), positions, table)


def try_nerfacc() -> None:
    """Let nerfacc compile its sources, in another process that is ended if it takes too long; then march by them."""
    child = subprocess.Popen(
        [sys.executable, "-c", NERFACC_CHILD],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        errors = child.communicate(timeout=NERFACC_SECONDS)[1].splitlines()
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # with the compilers that it started
        child.wait()
        raise TimeoutError(f"its sources were not compiled after {NERFACC_SECONDS:.0f} s") from None
    if child.returncode:
        named = [line for line in errors if "error" in line.lower()]
        raise RuntimeError((named or errors or [f"its process ended with code {child.returncode}"])[0].strip())
    from custom_kernels.rendering import march_by

    problem = _rays("cuda")
    found, wanted = (march_by(name, *problem) for name in ("nerfacc", "reference"))
    # it steps in single precision: a sample at a cell's wall may fall on the other side
    if abs(len(found.t_starts) - len(wanted.t_starts)) > 0.05 * len(wanted.t_starts):
        raise ArithmeticError(f"it finds {len(found.t_starts)} samples, the reference {len(wanted.t_starts)}")


def try_gsplat() -> None:
    """Render three splats by gsplat and by the reference."""
    from custom_kernels.splats import Splats, View, render_gsplat, render_reference

    means = torch.tensor([[0.0, 0, 3], [0.4, 0.1, 4], [-0.3, -0.2, 5]], device="cuda")
    quats = torch.tensor([[1.0, 0, 0, 0]], device="cuda").repeat(3, 1)
    ones = torch.ones_like(means)
    splats = Splats(means, -1.5 * ones, quats, ones[:, 0], ones, means.new_zeros(3, 0, 3))
    view = View(torch.eye(3), torch.zeros(3), (16.0, 16.0), (8.0, 8.0), 16, 16)
    options = {"degree": 0, "antialiased": True, "depth": False}
    close(render_gsplat(splats, view, **options).rgb, render_reference(splats, view, **options).rgb, 0.01)


TRITON = Library("triton", "pip install triton", try_triton)
TCNN = Library(
    "tinycudann", "pip install git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch", try_tcnn
)
NERFACC = Library("nerfacc", "pip install nerfacc ninja, and a CUDA toolkit (nvcc) that builds it", try_nerfacc)
GSPLAT = Library("gsplat", 'pip install -c constraints.txt -e ".[gsplat]"', try_gsplat)


def _encoding(device: str) -> tuple[Tensor, Tensor, tuple[list[int], list[float]]]:
    from custom_kernels.hashgrid import grid_layout

    generator = torch.Generator().manual_seed(0)
    layout = grid_layout(4, 4, 64, 10)
    positions, table = torch.rand(256, 3, generator=generator), torch.randn(layout[0][-1], 2, generator=generator)
    return positions.to(device), table.to(device), layout


def _rays(device: str) -> tuple:
    """What `march` takes: 64 rays, one of them not finite, a half-full grid, steps, no jitter."""
    from custom_kernels.rendering import Grid, Steps

    generator = torch.Generator().manual_seed(0)
    rays_o = torch.rand(64, 3, generator=generator) * 4 - 2
    rays_d = torch.nn.functional.normalize(-rays_o, dim=1)
    grid = Grid(
        (torch.rand(1, 8, 8, 8, generator=generator) < 0.5).to(device),
        torch.tensor([-1.0, -1, -1, 1, 1, 1], device=device),
    )
    rays_o[7] = torch.nan
    rays = (x.to(device) for x in (rays_o, rays_d, torch.zeros(64), torch.full((64,), 9.0)))
    return *rays, grid, Steps(0.05), torch.zeros(64, device=device)


def _compare(found, wanted, *inputs: Tensor) -> None:
    """Compare two differentiable functions of tensors, with the gradients of their squares."""
    results = []
    for function in (found, wanted):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-3)
