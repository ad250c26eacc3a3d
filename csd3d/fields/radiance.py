"""The radiance field of instant-ngp (arXiv 2201.05989, section 5.4): hash encoding, density and colour networks."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from csd3d.errors import InputError
from csd3d.fields.encoding import contract, mlp, spherical_harmonics, trunc_exp
from csd3d.memory import check_fits
from csd3d.schema import Within
from custom_kernels import field as kernels
from custom_kernels import native
from custom_kernels.hashgrid import BACKENDS, choose_backend, grid_layout, hash_encode, init_table

_TETRAHEDRON = ((1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0), (1.0, 1.0, 1.0))


@dataclass
class FieldConfig:
    """Sizes of a RadianceField. The grid spans the box, or contracted space where the scene is unbounded."""

    levels: Annotated[int, Within(1, 64)] = 12  # levels of the hash grid, from coarse to fine
    features_per_level: Annotated[int, Within(1, 16)] = 2  # numbers that an entry of the hash grid holds
    log2_hashmap_size: Annotated[int, Within(3, 28)] = 16  # a level has at most 2 to this many entries
    base_resolution: Annotated[int, Within(2, 4096)] = 16  # vertices along an axis, coarsest level
    max_resolution: Annotated[int, Within(2, 2**20)] = 1024  # vertices along an axis, finest level
    hidden: Annotated[int, Within(1, 8192)] = 64  # width of the hidden layers
    colour_layers: Annotated[int, Within(1, 64)] = 2  # hidden layers of the colour network
    geo_features: Annotated[int, Within(1, 1024)] = 15  # numbers that the density network passes to the colour network
    # the view direction is encoded as sh_degree² spherical harmonics; 1 to 4
    sh_degree: Annotated[int, Within(1, 4)] = 4
    density_scale: float = 5.0  # density = density_scale / (longest side of the box) · exp(network output − 1)
    blob_scale: float = 0.0  # added to the network output in the middle of the box, for text to 3D; 0: none
    blob_radius: float = 0.5  # distance where blob_scale's bias is 0, as a share of half the box's shortest side
    backend: str = "auto"  # auto | reference | native | triton | tcnn

    def __post_init__(self) -> None:
        for key in ("levels", "features_per_level", "hidden", "colour_layers", "geo_features"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: give a whole number of at least 1")
        if not 0 < self.density_scale < math.inf:
            raise ValueError(f"density_scale is {self.density_scale}: give a number above 0")
        if not self.blob_radius > 0:
            raise ValueError(f"blob_radius is {self.blob_radius}: give a number above 0")
        if not 1 <= self.sh_degree <= 4:
            raise ValueError(f"sh_degree is {self.sh_degree}: give 1 to 4")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}: give one of {', '.join(BACKENDS)}")
        sizes = ("levels", "log2_hashmap_size", "features_per_level", "hidden", "colour_layers", "geo_features")
        given = ", ".join(f"{key} {getattr(self, key)}" for key in sizes)
        check_fits(self.training_bytes, f"{given}: training a field of these sizes")

    def check_backend(self, device: torch.device) -> None:
        """Raise RuntimeError if the backend is one by name that cannot run on the device."""
        if self.backend != "auto":
            table = torch.empty(0, self.features_per_level, device=device)
            choose_backend(self.backend, torch.empty(0, 3, device=device), table)

    @property
    def training_bytes(self) -> int:
        """Memory for training the field: its parameters, their gradients and Adam's two moments."""
        offsets, _ = grid_layout(self.levels, self.base_resolution, self.max_resolution, self.log2_hashmap_size)
        encoded, inputs = self.levels * self.features_per_level, self.sh_degree**2 + self.geo_features
        density = self.hidden * (encoded + 1 + self.geo_features)
        colour = self.hidden * (inputs + self.hidden * (self.colour_layers - 1) + 3)
        return 16 * (offsets[-1] * self.features_per_level + density + colour)


class RadianceField(nn.Module):
    """Colour and density of points in the world.

    Bounded: positions are scaled from `aabb` [6] (min, max; world units) to [0, 1]³, and density is 0 outside.
    Unbounded: the box becomes [−1, 1]³ and space is contracted around it (Mip-NeRF 360), so that the box is the middle
    half of the grid along every axis.
    """

    def __init__(
        self, config: FieldConfig, aabb: Tensor, unbounded: bool = False, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        aabb = torch.as_tensor(aabb, dtype=torch.float32)
        if aabb.shape != (6,) or not (aabb[3:] > aabb[:3]).all():
            raise InputError(f"aabb must be six numbers, each maximum above its minimum, got {aabb.tolist()}")
        self.config, self.unbounded = config, unbounded
        self.density_scale = config.density_scale / float((aabb[3:] - aabb[:3]).max())
        self.register_buffer("aabb", aabb.clone())
        self.offsets, self.resolutions = grid_layout(
            config.levels, config.base_resolution, config.max_resolution, config.log2_hashmap_size
        )
        self.table = nn.Parameter(init_table(self.offsets[-1], config.features_per_level, generator))
        encoded = config.levels * config.features_per_level
        self.density_net = mlp([encoded, config.hidden, 1 + config.geo_features], generator)
        inputs = config.sh_degree**2 + config.geo_features
        self.colour_net = mlp([inputs, *[config.hidden] * config.colour_layers, 3], generator)
        self.active_levels = config.levels  # levels in use, from the coarsest (Li et al. 2023)

    def normalise(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """World positions [S, 3] -> grid positions [S, 3] in [0, 1], and [S] whether they can have density."""
        low, high = self.aabb[:3], self.aabb[3:]
        unit = (positions - low) / (high - low)
        if self.unbounded:
            return (contract(unit * 2 - 1) + 2) / 4, torch.ones_like(unit[:, 0], dtype=torch.bool)
        return unit, ((unit >= 0) & (unit <= 1)).all(dim=-1)

    def density(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """World positions [S, 3] -> density sigma [S] per world unit, features [S, geo_features] of the colour."""
        fused = self.fused(positions)
        if fused is not None:
            sigma, out = kernels.density(fused, positions)
            return sigma, out[:, : self.config.geo_features]
        raw, features, inside = self._raw(positions)
        return trunc_exp(raw - 1) * (self.density_scale * inside), features

    def fused(self, *inputs: Tensor) -> kernels.Field | None:
        """This field as the compiled kernels take it; None where torch must compute, as for inputs with gradients."""
        if self.config.backend not in ("auto", "native") or torch.compiler.is_compiling() or native.library() is None:
            return None
        config, halves = self.config, (self.aabb[3:] - self.aabb[:3]) / 2
        found = kernels.Field(
            offsets=self.offsets,
            resolutions=self.resolutions,
            levels=self.active_levels,
            sh_degree=config.sh_degree,
            unbounded=self.unbounded,
            density_scale=self.density_scale,
            blob_scale=config.blob_scale,
            blob_radius=config.blob_radius * float(halves.min()) if config.blob_scale else 1.0,
            aabb=self.aabb,
            table=self.table,
            density_weights=tuple(layer.weight for layer in self.density_net[::2]),
            colour_weights=tuple(layer.weight for layer in self.colour_net[::2]),
        )
        return found if kernels.obstacle(found, *inputs) is None else None

    def _raw(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log of the density up to a constant [S], features [S, geo_features], and [S] whether inside the box."""
        unit, inside = self.normalise(positions)
        fused = self.fused(positions)
        if fused is not None:
            out = kernels.density(fused, positions)[1]
            return out[:, self.config.geo_features], out[:, : self.config.geo_features], inside
        encoded = hash_encode(unit, self.table, self.offsets, self.resolutions, backend=self.config.backend)
        if self.active_levels < self.config.levels:
            active = self.active_levels * self.config.features_per_level
            used = torch.arange(encoded.shape[1], device=encoded.device) < active
            encoded = torch.where(used, encoded, 0)
        raw, features = self.density_net(encoded).split([1, self.config.geo_features], dim=-1)
        return raw[:, 0] + self._blob(positions), features, inside

    def _blob(self, positions: Tensor) -> Tensor | float:
        """Magic3D's bias (arXiv 2211.10440, section 4), scale (1 − r/radius): starts with matter in the middle."""
        if not self.config.blob_scale:
            return 0.0
        low, high = self.aabb[:3], self.aabb[3:]
        radius = self.config.blob_radius * (high - low).min() / 2
        distance = (positions - (low + high) / 2).norm(dim=-1)
        return self.config.blob_scale * (1 - distance / radius)

    def normals(self, positions: Tensor, step: float | None = None) -> Tensor:
        """Unit normals [S, 3], opposite to the density's gradient; zero where that is zero.

        With a `step` in world units: differences of log sigma at the corners of a tetrahedron, differentiable in the
        table. With None: analytic and not differentiable (that would need the kernel's second derivatives).
        """
        if step is None:
            with torch.enable_grad():
                at = positions.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self._raw(at)[0].sum(), at)
        else:
            corners = positions.new_tensor(_TETRAHEDRON)
            taps = self._raw((positions + step * corners[:, None]).reshape(-1, 3))[0].view(4, -1)
            gradient = torch.einsum("ks,kc->sc", taps, corners)
        return -torch.nn.functional.normalize(gradient, dim=-1, eps=1e-12)

    def colour(self, features: Tensor, directions: Tensor) -> Tensor:
        """Features [S, geo_features] and unit directions [S, 3] -> rgb [S, 3] in [0, 1]."""
        fused = self.fused(directions)
        if fused is not None:
            return kernels.colour(fused, features, directions)
        inputs = torch.cat([spherical_harmonics(directions, self.config.sh_degree), features], dim=-1)
        return torch.sigmoid(self.colour_net(inputs))

    def forward(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """World positions [S, 3] and unit directions [S, 3] -> rgb [S, 3] in [0, 1], sigma [S] per world unit."""
        fused = self.fused(positions, directions)
        if fused is not None:
            return kernels.radiance(fused, kernels.encode(fused, positions), directions)
        sigma, features = self.density(positions)
        return self.colour(features, directions), sigma
