"""The Triton kernels against the torch references: on a GPU, or without one in Triton's interpreter, on few numbers."""

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from custom_kernels.hashgrid import hash_encode
from custom_kernels.rendering import Grid, Steps, composite, march
from custom_kernels.trials import interpreting
from tests.custom_kernels.test_hashgrid import TOLERANCE, float64_truth, problem, value_and_gradients
from tests.custom_kernels.test_render_ops import COUNTS, march_args, packed_samples, random_cotangents, vjp

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of masked lanes in the interpreter
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[2]


def on_device(x):
    if isinstance(x, Grid):
        return Grid(x.occupancy.to(DEVICE), x.aabb.to(DEVICE))
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def triton_encode(positions, table, offsets, resolutions):
    return hash_encode(on_device(positions), on_device(table), offsets, resolutions, backend="triton").cpu()


def march_both(*args):
    """By Triton and by the reference, with all of the samples compared."""
    found = [x.cpu() for x in march(*map(on_device, args), backend="triton")]
    wanted = march(*args, backend="reference")
    assert torch.equal(found[3], wanted.packed_info)
    assert torch.equal(found[2], wanted.ray_indices)
    for a, b in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    return wanted


# ---- hash encoding


@pytest.mark.parametrize(("features", "layout"), [(2, (3, 4, 40, 9)), (3, (1, 16, 16, 8))])
def test_encoding_and_its_gradients(features, layout):
    """A dense level and hashed ones; among the points are the domain's edges and one outside; they fill no block."""
    inputs = problem(64, features, layout=layout)
    inputs[0][7] = torch.tensor([-0.5, 0.3, 1.7])
    for value, truth in zip(value_and_gradients(triton_encode, *inputs), float64_truth(*inputs), strict=True):
        # the interpreter rounds a fused multiply-add twice, which steep levels magnify in the positions' gradient
        torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-5 * max(1.0, truth.abs().max().item()))


def test_points_that_are_not_numbers_or_not_there():
    positions, table, _, *layout = problem(3, 1, layout=(1, 4, 4, 9))
    positions[1, 2] = math.nan
    out = triton_encode(positions, table, *layout)
    assert out.isnan().any(1).tolist() == [False, True, False]
    assert triton_encode(positions[:0], table, *layout).shape == (0, 1)


def test_a_gradient_in_a_fixed_order_on_demand(monkeypatch):
    """Atomics have none, so the reference sums the table's gradient where torch is told to be deterministic."""
    inputs = problem(20, 1, layout=(1, 4, 4, 9))
    wanted = value_and_gradients(triton_encode, *inputs)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr("custom_kernels.hashgrid_triton.kernels.table_gradient", None)
    for a, b in zip(value_and_gradients(triton_encode, *inputs), wanted, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


# ---- march


@pytest.mark.parametrize(
    ("levels", "cone", "share", "cap"),
    [(1, 0.0, 0.3, 2**31 - 1), (3, 0.0, 0.05, 2**31 - 1), (3, 0.05, 0.05, 2**31 - 1), (2, 0.05, 0.3, 3)],
)
def test_march_finds_the_reference_s_samples(levels, cone, share, cap):
    *rays, steps, jitter = march_args(3, levels, rays=16, cone=cone, share=share)
    assert len(march_both(*rays, replace(steps, size=0.09, max_samples=cap), jitter).t_starts) > 20


def test_march_along_axes_and_of_rays_that_have_no_samples():
    """Through walls and corners; beside the grid; not finite; without a direction; so far off that steps vanish."""
    grid = Grid(torch.zeros(1, 4, 4, 4, dtype=torch.bool), torch.tensor([-1.0, -1, -1, 1, 1, 1]))
    grid.occupancy[0, 1, 1, 1] = True  # [-0.5, 0]^3
    rays_o = torch.tensor([[-2, -0.25, -0.25], [-0.25, 2, -0.25], [-2, -0.25, 0.25], [-2, -2, -2], [2, 3, 2]])
    rays_d = torch.tensor([[1.0, 0, 0], [0, -1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]])
    bad = [[math.nan, 0, 0], [-math.inf, 0, 0], [2, 2, 2], [-1e20, -0.25, -0.25]]
    rays_o, rays_d = (
        torch.cat([rays_o, torch.tensor(bad)]),
        torch.cat([rays_d, rays_d[:2], torch.zeros(1, 3), rays_d[:1]]),
    )
    ends = torch.zeros(9), torch.full((9,), math.inf)
    samples = march(*map(on_device, (rays_o, rays_d, *ends, grid)), Steps(0.125), backend="triton")
    assert samples.packed_info[:, 1].tolist() == [4, 4, 0, 4, 0, 0, 0, 0, 0]
    assert samples.t_starts.tolist() == [1.5, 1.625, 1.75, 1.875, 2.0, 2.125, 2.25, 2.375, 1.5, 1.625, 1.75, 1.875]
    none = march(*(on_device(x[:0]) for x in (rays_o, rays_d, *ends)), on_device(grid), Steps(0.125), backend="triton")
    assert [tuple(x.shape) for x in none] == [(0,), (0,), (0,), (0, 2)]


# ---- compositing


@pytest.mark.parametrize("counts", [COUNTS, [1], [0, 0]])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e30])
def test_composite_and_its_gradients(counts, scale):
    """Rays of no sample, of one, and of several blocks of samples; nearly empty, and opaque at once."""
    sigmas, *rest = packed_samples(counts, 2)
    inputs = [sigmas * scale, *rest]
    cotangents = random_cotangents(inputs, 3)
    found = vjp("triton", [on_device(x) for x in inputs], [on_device(x) for x in cotangents])
    for value, truth in zip(found, vjp("reference", inputs, cotangents, torch.float64), strict=True):
        torch.testing.assert_close(value.cpu().double(), truth, rtol=1e-4, atol=1e-5)


def test_composite_has_no_gradient_of_lengths():
    sigmas, rgbs, t_starts, *rest = map(on_device, packed_samples([3], 0))
    with pytest.raises(ValueError, match="'triton' has no gradient for t_starts"):
        composite(sigmas, rgbs, t_starts.requires_grad_(), *rest, backend="triton")


# ---- for a card

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from custom_kernels.gpu import composite, hashgrid, march

OTHER = {"table": "*fp32", "offsets": "*i64", "packed": "*i64", "limits": "*i64", "counts": "*i64", "levels": "i32",
         "ray_indices": "*i64", "occupancy": "*u8", "blocks": "*u8", "count": "i64", "rays": "i64", "resolution": "i32",
         "vertices": "*i32", "sizes": "*i32", "hashed": "*i32", "starts": "*fp64", "ends": "*fp64", "space": "*fp64",
         "firsts": "*fp64"}
POINTS, GROWING = {"FEATURES": 2, "BLOCK": 256}, {"LEVELS": 2, "CONE": True, "BLOCK": 32}
KERNELS = [(hashgrid.encode, POINTS), (hashgrid.table_gradient, POINTS), (hashgrid.positions_gradient, POINTS),
           (march.march, GROWING | {"FILL": True}),
           (composite.forward, {"BLOCK": 32}), (composite.backward, {"BLOCK": 32})]
for kernel, constants in KERNELS:
    signature = {name: "constexpr" if name in constants else OTHER.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1})
    print(kernel.__name__, len(made.asm["cubin"]) > 0)
"""


def test_every_kernel_compiles_for_a_card(tmp_path):
    """To machine code of an Ampere card, by the compiler and assembler in Triton's wheel; no GPU is needed."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.stdout.count("True") == 6, done.stderr[-2000:]


# ---- choice of backend


def test_the_interpreter_is_not_what_auto_takes():
    if not interpreting():
        pytest.skip("on a GPU")
    from custom_kernels.libraries import try_triton

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        try_triton()
