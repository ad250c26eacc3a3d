"""The hash encoding: its reference against tiny-cuda-nn's loop, the compiled kernel against the reference."""

import math
import sys
import types
from pathlib import Path

import pytest
import torch

from custom_kernels import hashgrid, hashgrid_tcnn, native
from custom_kernels.hashgrid import (
    choose_backend,
    grid_layout,
    hash_encode,
    hash_encode_reference,
    init_table,
)

MIXED = (6, 4, 64, 10)  # levels of 4 and 7 vertices are dense, finer ones hashed
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
ISAS = [isa for isa, needs in native._REQUIRED_FLAGS.items() if needs <= native._cpu_flags()]


def built(isa):
    return Path(native.__file__).parent / f"_native_{isa}.so"


needs_native = pytest.mark.skipif(not any(built(isa).exists() for isa in ISAS), reason="the kernels are not compiled")


def problem(count, features=2, layout=MIXED, seed=0, dtype=torch.float32):
    """Positions with the domain's edges among them, a table of order one, a cotangent, and the layout."""
    generator = torch.Generator().manual_seed(seed)
    offsets, resolutions = grid_layout(*layout)
    table = torch.randn(offsets[-1], features, generator=generator)
    positions = torch.rand(count, 3, generator=generator)
    edges = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 1, 0.5], [1, 0.25, 1]])
    positions[: len(edges)] = edges[:count]
    cotangent = torch.randn(count, len(resolutions) * features, generator=generator)
    return positions.to(dtype), table.to(dtype), cotangent.to(dtype), offsets, resolutions


def value_and_gradients(encode, positions, table, cotangent, offsets, resolutions):
    positions, table = positions.clone().requires_grad_(), table.clone().requires_grad_()
    out = encode(positions, table, offsets, resolutions)
    return out.detach(), *torch.autograd.grad(out, (table, positions), cotangent)


def native_encode(*arguments):
    return hash_encode(*arguments, backend="native")


def float64_truth(positions, table, cotangent, offsets, resolutions):
    doubles = (positions.double(), table.double(), cotangent.double())
    return value_and_gradients(hash_encode_reference, *doubles, offsets, resolutions)


def assert_matches_truth(got, truth, resolutions):
    """Within rtol 1e-4 / atol 1e-5; a position's gradient is a difference times N_l, which scales its rounding."""
    for a, b, scale in zip(got, truth, (1, 1, max(resolutions)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"] * scale)


# ---- layout


def test_layout_is_tiny_cuda_nns():
    """Worked by hand: scales 3, 7 and 15 give 4, 8 and 16 vertices; 64 and 512 entries fit in 2^10, 4096 do not."""
    offsets, resolutions = grid_layout(3, 4, 16, 10)
    assert offsets == [0, 64, 64 + 512, 64 + 512 + 1024]
    assert resolutions == pytest.approx([4, 8, 16], rel=1e-6)
    assert grid_layout(1, 3, 3, 10)[0] == [0, 32]  # 27 vertices rounded up to 8s
    with pytest.raises(ValueError, match="levels >= 1"):
        grid_layout(0, 16, 32, 10)


def test_initial_table():
    table = init_table(5000, 2, torch.Generator().manual_seed(0))
    assert table.abs().max() <= 1e-4
    assert table.std() == pytest.approx(1e-4 / math.sqrt(3), rel=0.03)
    assert torch.equal(table, init_table(5000, 2, torch.Generator().manual_seed(0)))


# ---- reference


def brute_force_level(position, table, resolution):
    """One point in one level, as tiny-cuda-nn's kernel_grid, pos_fract and grid_index spell it out."""
    scale = resolution - 1.0
    vertices = math.ceil(scale) + 1
    size, features = len(table), len(table[0])
    cell, fraction = [], []
    for x in position:
        p = x * scale + 0.5
        cell.append(math.floor(p))
        fraction.append(p - math.floor(p))
    result = [0.0] * features
    for corner in range(8):
        weight, vertex = 1.0, []
        for dim in range(3):
            far = corner >> dim & 1
            weight *= fraction[dim] if far else 1 - fraction[dim]
            vertex.append(cell[dim] + far)
        stride, index = 1, 0
        for dim in range(3):
            if stride > size:
                break
            index += vertex[dim] * stride
            stride *= vertices
        if size < stride:
            index = 0
            for coordinate, prime in zip(vertex, (1, 2654435761, 805459861), strict=True):
                index ^= coordinate * prime & 0xFFFFFFFF
        for f in range(features):
            result[f] += weight * table[index % size][f]
    return result


def test_reference_is_the_brute_force_loop():
    positions, table, _, offsets, resolutions = problem(17, dtype=torch.float64)
    out = hash_encode_reference(positions, table, offsets, resolutions)
    for i, position in enumerate(positions.tolist()):
        expected = []
        for start, stop, resolution in zip(offsets, offsets[1:], resolutions, strict=False):
            expected += brute_force_level(position, table[start:stop].tolist(), resolution)
        torch.testing.assert_close(out[i], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_reference_gradcheck():
    offsets, resolutions = grid_layout(3, 2, 5, 5)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(offsets[-1], 2, generator=generator, dtype=torch.float64, requires_grad=True)
    positions = torch.rand(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def encode(x, t):
        return hash_encode_reference(x, t, offsets, resolutions)

    assert torch.autograd.gradcheck(encode, (positions, table), eps=1e-6)


def test_constant_table_encodes_to_that_constant():
    positions, table, _, offsets, resolutions = problem(100)
    out = hash_encode_reference(positions, torch.full_like(table, 3.0), offsets, resolutions)
    torch.testing.assert_close(out, torch.full_like(out, 3.0))


# ---- native


@needs_native
@pytest.mark.parametrize("count", [0, 1, 17, 1000])
@pytest.mark.parametrize("features", [1, 2, 4, 8])
def test_native_matches_float64(count, features):
    case = problem(count, features)
    assert_matches_truth(value_and_gradients(native_encode, *case), float64_truth(*case), case[-1])


@needs_native
@pytest.mark.parametrize("max_resolution", [64, 1024, 16384])
def test_native_stays_accurate_on_fine_grids(max_resolution):
    """x·scale in float32 would lose the fraction's low bits: an error of 1e-3 at 16384 vertices, 1e-4 at 1024."""
    case = problem(1000, layout=(8, 16, max_resolution, 12))
    assert_matches_truth(value_and_gradients(native_encode, *case), float64_truth(*case), case[-1])


@needs_native
def test_native_finds_the_cell_below_where_float32_rounds_up():
    """x·scale + 0.5 just under a whole number k, which float32 makes k: the point still lies in cell k − 1."""
    _, table, cotangent, offsets, resolutions = problem(200, layout=(1, 16384, 16384, 12))
    whole = torch.arange(8193, 16384, dtype=torch.float64)
    x = ((whole - 0.5) / (resolutions[0] - 1)).float()
    exact = x.double() * (resolutions[0] - 1) + 0.5
    x = x[(exact < whole) & (exact.float() == whole)][:600].reshape(200, 3)
    case = (x, table, cotangent, offsets, resolutions)
    assert_matches_truth(value_and_gradients(native_encode, *case), float64_truth(*case), resolutions)


@needs_native
def test_native_takes_non_contiguous_tensors():
    positions, table, cotangent, offsets, resolutions = problem(100)
    strided = (positions.T.contiguous().T, table.T.contiguous().T, cotangent.T.contiguous().T, offsets, resolutions)
    assert not any(t.is_contiguous() for t in strided[:3])
    expected = value_and_gradients(native_encode, positions, table, cotangent, offsets, resolutions)
    for a, b in zip(value_and_gradients(native_encode, *strided), expected, strict=True):
        assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("threads", [2, 7, 20])  # 20 threads split the 6 levels' tables into shards
def test_native_bits_do_not_depend_on_threads(monkeypatch, threads):
    case = problem(5000)
    monkeypatch.setattr(native, "num_threads", lambda: 1)
    alone = value_and_gradients(native_encode, *case)
    monkeypatch.setattr(native, "num_threads", lambda: threads)
    for a, b in zip(alone, value_and_gradients(native_encode, *case), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("instruction_set")
def test_instruction_sets_agree():
    case = problem(333, layout=(8, 16, 1024, 12))
    assert_matches_truth(value_and_gradients(native_encode, *case), float64_truth(*case), case[-1])


@needs_native
def test_positions_outside_are_clamped_and_get_no_gradient():
    positions, table, cotangent, offsets, resolutions = problem(4)
    positions[0, 1], positions[1, 2] = -0.7, 1e30
    outside = (positions < 0) | (positions > 1)
    for encode in (native_encode, hash_encode_reference):
        out, _, grad = value_and_gradients(encode, positions, table, cotangent, offsets, resolutions)
        assert torch.equal(out, encode(positions.clamp(0, 1), table, offsets, resolutions))
        assert grad[outside].eq(0).all()
        assert grad[0, 0] != 0


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_positions_stay_in_bounds_and_nan_shows(bad):
    positions, table, cotangent, offsets, resolutions = problem(20)
    positions[3] = bad
    out, *_ = value_and_gradients(native_encode, positions, table, cotangent, offsets, resolutions)
    assert out[3].isnan().all() == math.isnan(bad)
    assert out[[0, 1, 2, 4]].isfinite().all()


@needs_native
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e10, 1e30])
def test_native_is_finite_over_scales(scale):
    positions, table, cotangent, offsets, resolutions = problem(50)
    for result in value_and_gradients(native_encode, positions, table * scale, cotangent, offsets, resolutions):
        assert result.isfinite().all()


@needs_native
def test_opcheck():
    positions, table, cotangent, offsets, resolutions = problem(20)
    arguments = (positions.requires_grad_(), table.requires_grad_(), offsets, resolutions)
    torch.library.opcheck(hashgrid._encode, arguments)
    detached = (cotangent, positions.detach(), table.detach(), offsets, resolutions)
    torch.library.opcheck(hashgrid._table_grad, detached)
    torch.library.opcheck(hashgrid._positions_grad, detached)


@needs_native
def test_compiles_to_one_graph():
    positions, table, cotangent, offsets, resolutions = problem(20)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, t, o, r):
        return hash_encode(x, t, o, r, backend="native") * 1.0

    expected = value_and_gradients(native_encode, positions, table, cotangent, offsets, resolutions)
    got = value_and_gradients(compiled, positions, table, cotangent, offsets, resolutions)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@needs_native
def test_second_derivative_raises():
    positions, table, _, offsets, resolutions = problem(5)
    table.requires_grad_()
    out = hash_encode(positions, table, offsets, resolutions, backend="native").square().sum()
    (grad,) = torch.autograd.grad(out, table, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


# ---- choice of backend


def test_auto_falls_back_and_names_raise(monkeypatch):
    positions, table, _, offsets, resolutions = problem(5)
    monkeypatch.setattr(native, "library", lambda: None)
    reference = hash_encode_reference(positions, table, offsets, resolutions)
    assert torch.equal(hash_encode(positions, table, offsets, resolutions), reference)
    with pytest.raises(RuntimeError, match=r"pip install -c constraints\.txt"):
        native_encode(positions, table, offsets, resolutions)
    with pytest.raises(RuntimeError, match=r"pip install .*tiny-cuda-nn"):
        hash_encode(positions, table, offsets, resolutions, backend="tcnn")
    with pytest.raises(ValueError, match="choose one of"):
        hash_encode(positions, table, offsets, resolutions, backend="cuda")


@needs_native
def test_auto_takes_the_reference_where_native_cannot_compute():
    positions, table, *_ = problem(5)
    assert choose_backend("auto", positions, table) == "native"
    assert choose_backend("auto", positions.double(), table.double()) == "reference"
    assert choose_backend("auto", positions, torch.zeros(8, 3)) == "reference"
    with pytest.raises(RuntimeError, match="float32"):
        choose_backend("native", positions.double(), table.double())


def test_shapes_are_checked():
    positions, table, _, offsets, resolutions = problem(5)
    with pytest.raises(ValueError, match=r"\[S, 3\], got \[5, 2\]"):
        hash_encode(positions[:, :2], table, offsets, resolutions)
    with pytest.raises(ValueError, match="T = offsets"):
        hash_encode(positions, table[:-1], offsets, resolutions)


def test_tcnn_gets_the_same_grid(monkeypatch):
    """A stand-in for tinycudann, built from its config as tinycudann would: same parameters, same output."""

    class Encoding(torch.nn.Module):
        def __init__(self, dims, config, dtype):
            super().__init__()
            assert (dims, dtype, config["otype"]) == (3, torch.float32, "HashGrid")
            base, levels = config["base_resolution"], config["n_levels"]
            finest = base * config["per_level_scale"] ** (levels - 1)
            self.offsets, self.resolutions = grid_layout(levels, base, finest, config["log2_hashmap_size"])
            self.params = torch.nn.Parameter(torch.zeros(self.offsets[-1] * config["n_features_per_level"]))

        def forward(self, x):
            table = self.params.view(self.offsets[-1], -1)
            return hash_encode_reference(x, table, self.offsets, self.resolutions)

    monkeypatch.setitem(sys.modules, "tinycudann", types.SimpleNamespace(Encoding=Encoding))
    hashgrid_tcnn._encoding.cache_clear()
    case = problem(50)
    expected = value_and_gradients(hash_encode_reference, *case)
    got = value_and_gradients(hashgrid_tcnn.encode_tcnn, *case)
    hashgrid_tcnn._encoding.cache_clear()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
