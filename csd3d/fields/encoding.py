"""Encodings of positions and directions for a field's networks, and the networks' layers."""

import itertools

import torch
from torch import Tensor, nn

_EXP_CLAMP = 15.0


class _TruncExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.exp(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.exp(x.clamp(-_EXP_CLAMP, _EXP_CLAMP))


def trunc_exp(x: Tensor) -> Tensor:
    """exp(x) with the gradient exp(clamp(x, −15, 15)), instant-ngp's density activation."""
    return _TruncExp.apply(x)


def contract(x: Tensor) -> Tensor:
    """Contract all of space into [−2, 2]³: x where ‖x‖ ≤ 1, else (2 − 1/‖x‖) x/‖x‖; x [..., 3].

    Mip-NeRF 360 (arXiv 2111.12077), equation 10, with the L∞ norm, as in nerfstudio: the unit cube stays unchanged.
    """
    norm = x.abs().amax(dim=-1, keepdim=True).clamp_min(1)
    return (2 - 1 / norm) * x / norm


def spherical_harmonics(directions: Tensor, degree: int) -> Tensor:
    """Real orthonormal spherical harmonics of orders l < degree, [..., degree²], by l, then m = −l..l.

    directions [..., 3] of unit length. The polynomials of Sloan, "Efficient Spherical Harmonic Evaluation" (2013), with
    the Condon–Shortley sign, as in tiny-cuda-nn. Raises ValueError unless 1 <= degree <= 4.
    """
    if not 1 <= degree <= 4:
        raise ValueError(f"spherical harmonics go up to degree 4, got {degree}")
    x, y, z = directions.unbind(-1)
    bands = itertools.chain.from_iterable(band(x, y, z) for band in _BANDS[:degree])
    return torch.stack(list(bands), dim=-1)


_BANDS = (
    lambda x, y, z: (torch.full_like(x, 0.28209479177387814),),
    lambda x, y, z: (-0.48860251190291987 * y, 0.48860251190291987 * z, -0.48860251190291987 * x),
    lambda x, y, z: (
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.94617469575755997 * z * z - 0.31539156525251999,
        -1.0925484305920792 * x * z,
        0.54627421529603959 * (x * x - y * y),
    ),
    lambda x, y, z: (
        0.59004358992664352 * y * (y * y - 3 * x * x),
        2.8906114426405538 * x * y * z,
        0.45704579946446572 * y * (1 - 5 * z * z),
        0.3731763325901154 * z * (5 * z * z - 3),
        0.45704579946446572 * x * (1 - 5 * z * z),
        1.4453057213202769 * z * (x * x - y * y),
        0.59004358992664352 * x * (3 * y * y - x * x),
    ),
)


def mlp(widths: list[int], generator: torch.Generator | None = None) -> nn.Sequential:
    """Linear layers with ReLU between, no biases (as instant-ngp), He-uniform weights; widths [in, hidden..., out]."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, a, b, bias=False)
        nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu", generator=generator)
        layers += [linear, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])
