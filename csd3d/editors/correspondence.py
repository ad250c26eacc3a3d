"""Sharing between pixels that show the same thing, instead of pixels at the same address: an option of CSD-Edit.

    editors: {csd_edit: {correspondence: flow}}

A correspondence is registered in one class. `open` takes the work once; the function it returns is called at each step
of a canvas with the step's windows, or at each round of a scene with the rows and renders of its views. That function
returns a `svgd.Sharing` on the prior's device.

    @register("correspondence", "mine", title="My own match")
    @dataclass(frozen=True)
    class Mine:
        edits: ClassVar[tuple[str, ...]] = ("video",)  # of "picture", "video" and "scene"

        def open(self, canvas: Canvas) -> Callable[[Windows], Sharing]: ...

Overlap and flow gave worse results than sharing by address, which is the paper's way (benchmarks/results/edit-2d.json).

Symbols: N particles of latents [C, h, w]. For a pixel p of particle i, `positions` [N, N, h, w, 2] holds x_ij(p) =
(x, y), the place in particle j of the same content, in pixels, with the centre of the first pixel at (0, 0). `validity`
[N, N, h, w] in [0, 1] holds v_ij(p), 0 where j does not show it (outside, hidden, unknown). All channels are treated
alike by the sparse linear operators

    (A_ij u)(p) = v_ij(p) Σ_q b(q − x_ij(p)) u(q),   b bilinear

A row of A_ij sums to v_ij(p); A_ii is the identity. Memory: 3 numbers a row, O(N² h w).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from csd3d import registry
from csd3d.cameras import Cameras
from csd3d.canvas.latents import pixel_grid
from csd3d.canvas.windows import Windows
from csd3d.distillation.kernel import SVGDConfig, as_rows, kernel_of
from csd3d.distillation.svgd import Sums, off_diagonal
from csd3d.editors.canvas import Canvas
from csd3d.editors.matches import bilinear_taps, places_seen
from csd3d.editors.scene import SceneEdit, SceneSource
from csd3d.memory import check_fits
from csd3d.registry import register
from csd3d.rendering import Rendered
from csd3d.representations.base import surface_depth
from csd3d.schema import Chosen, OneOf

OneCorrespondence = Annotated[Chosen, OneOf("correspondence", also=("none",))]
NONE = Chosen("none")
BYTES = 40  # of one pixel of one pair of views while they are matched: flow, share and their copies
BORDER = 0.5  # pixels: positions up to here beyond a border pixel's centre count as that pixel


def check_works(chosen: Chosen, *works: str) -> None:
    """Raise ValueError if the chosen correspondence is for none of `works` ("picture", "video", "scene")."""
    if chosen.thing is not None and not set(works) & set(chosen.thing.edits):
        fitting = [entry.name for entry in registry.entries("correspondence") if set(works) & set(entry.thing.edits)]
        raise ValueError(f"correspondence is {chosen.name!r}: choose one of {', '.join(['none', *fitting])}")


@register("correspondence", "overlap", title="Windows share where they overlap on the canvas")
@dataclass(frozen=True)
class Overlap:
    """Windows of one frame share the pixels in which they overlap; windows of different frames share nothing."""

    edits: ClassVar[tuple[str, ...]] = ("picture", "video")

    def open(self, canvas: Canvas) -> Callable[[Windows], "Correspondence"]:
        wrap = canvas.latents.z.shape[3] if canvas.cover.wrap else None
        return lambda windows: window_correspondence(windows, wrap).to(canvas.device)


@register("correspondence", "flow", title="Windows of a video share along its optical flow")
@dataclass(frozen=True)
class Flow:
    """Windows of a video share pixels that show the same content, by the source's optical flow (`ClipFlow`)."""

    edits: ClassVar[tuple[str, ...]] = ("video",)

    def open(self, canvas: Canvas) -> Callable[[Windows], "Correspondence"]:
        from csd3d.canvas.optical_flow import ClipFlow  # here: pictures need no OpenCV

        flow = ClipFlow.between_latents(canvas.latents)
        return lambda windows: flow_correspondence(flow.latents, flow.size, windows).to(canvas.device)


@register("correspondence", "depth", title="Views of a scene share along its depth")
@dataclass(frozen=True)
class Depth:
    """Views share pixels that show the same surface point, by the depth of the scene as fitted so far."""

    edits: ClassVar[tuple[str, ...]] = ("scene",)

    def check(self, source: SceneSource, views: int, key: str) -> None:
        """Raise InputError if matching so many views pairwise does not fit in memory; `key`: the editor's place."""
        height, width = source.prior.latent_shape(*source.size)[1:]
        given = f"{key}.correspondence: depth, of {views} views of {height}x{width} latents, each with each,"
        device = source.prior.device
        check_fits(BYTES * views**2 * height * width, given, f"set {key}.views to fewer views a round", device)

    def open(self, edit: SceneEdit) -> Callable[[Tensor, Rendered], "Correspondence"]:
        size, unit = tuple(edit.source.z.shape[2:]), edit.prior.codec.downscale

        def of_views(rows: Tensor, views: Rendered) -> Correspondence:
            cameras = edit.cameras[rows].to(views.depth.device)
            return view_correspondence(cameras, surface_depth(views), size, unit).to(edit.prior.device)

        return of_views


def window_correspondence(windows: Windows, wrap: int | None = None) -> "Correspondence":
    """The overlaps of windows, at whole offsets or not. `wrap`: the canvas's width if its two ends meet (360°)."""
    offset = torch.stack([windows.left, windows.top], -1)
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    positions = pixel_grid(*windows.size).to(offset) + (offset[:, None] - offset)[:, :, None, None]
    if wrap is not None:
        x, y = positions.unbind(-1)
        positions = torch.stack([(x + BORDER) % wrap - BORDER, y], -1)
    same_frame = (windows.frame[:, None] == windows.frame)[:, :, None, None]
    return Correspondence(positions, same_frame.expand(positions.shape[:4]))


def flow_correspondence(
    flow: Callable[[int, int], tuple[Tensor, Tensor]], size: tuple[int, int], windows: Windows
) -> "Correspondence":
    """The matches of windows along `flow(a, b)` = (flow [H, W, 2], share [H, W]) between frames of `size` = (H, W)."""
    (h, w), grid, N = windows.size, pixel_grid(*size), len(windows)
    places = list(zip(windows.frame.tolist(), windows.top.tolist(), windows.left.tolist(), strict=True))
    positions, validity = torch.zeros(N, N, h, w, 2), torch.zeros(N, N, h, w)
    for (i, (a, y, x)), (j, (b, y_j, x_j)) in product(enumerate(places), repeat=2):
        found, share = flow(a, b)
        own = slice(y, y + h), slice(x, x + w)
        positions[i, j] = (grid + found)[own] - torch.tensor([x_j, y_j])
        validity[i, j] = share[own]
    return Correspondence(positions, validity)


def view_correspondence(
    cameras: Cameras, depths: Tensor, size: tuple[int, int], unit: int, depth_tolerance: float = 0.02
) -> "Correspondence":
    """The matches of N views by their `depths` [N, H, W], distances along the rays (`inf`, NaN or ≤ 0: no surface).

    `size` = (h, w) of the latents, each `unit` pixels a side. Pixels without a surface, or whose surface is hidden from
    the other view by `reproject` with `depth_tolerance`, match nothing. Raises ValueError on sizes that differ.
    """
    N, height, width = depths.shape
    if len(cameras) != N or (height, width) != (cameras.height, cameras.width):
        raise ValueError(f"{len(cameras)} cameras of {cameras.height}x{cameras.width} and depths {tuple(depths.shape)}")
    positions, validity = depths.new_zeros(N, N, *size, 2), depths.new_zeros(N, N, *size)
    pairs = torch.tensor([(i, j) for i in range(N) for j in range(N) if i != j]).reshape(-1, 2)
    own = tuple(pairs.T)  # the diagonal is the identity, whatever it is given
    positions[own], validity[own] = places_seen(cameras, depths, pairs, size, unit, depth_tolerance)
    return Correspondence(positions, validity)


class Correspondence:
    """The operators A_ij of N particles; a `svgd.Sharing`. A_ii is the identity, whatever is given for it."""

    def __init__(self, positions: Tensor, validity: Tensor) -> None:
        """`positions` [N, N, h, w, 2] and `validity` [N, N, h, w], bool or in [0, 1]; see the module's docstring.

        Validity becomes 0 where a position is not finite or lies outside the picture. Raises ValueError on shapes that
        differ and on validity outside [0, 1].
        """
        N = len(positions)
        if positions.ndim != 5 or positions.shape[1] != N or positions.shape[4] != 2 or N == 0:
            raise ValueError(f"positions must be [N, N, h, w, 2] with N >= 1, got {tuple(positions.shape)}")
        if validity.shape != positions.shape[:4]:
            shapes = f"{tuple(validity.shape)} and {tuple(positions.shape)}"
            raise ValueError(f"validity must be [N, N, h, w] as positions [N, N, h, w, 2] are, got {shapes}")
        positions = positions.to(torch.promote_types(positions.dtype, torch.float32))
        validity = validity.to(positions)
        if not ((validity >= 0) & (validity <= 1)).all():
            raise ValueError("validity must be in [0, 1]")
        h, w = self.size = tuple(positions.shape[2:4])
        last = positions.new_tensor([w - 1, h - 1])
        inside = ((positions >= -BORDER) & (positions <= last + BORDER)).all(-1)  # false for NaN
        held = torch.where(inside[..., None], positions, 0.0).clamp_min(0).minimum(last)
        diagonal = torch.arange(N, device=positions.device)
        held[diagonal, diagonal] = pixel_grid(h, w).to(held)
        validity = torch.where(inside, validity, 0.0)
        validity[diagonal, diagonal] = 1.0
        self.positions, self.validity = held, validity

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str) -> "Correspondence":
        return Correspondence(self.positions.to(device), self.validity.to(device))

    def select(self, indices: Tensor) -> "Correspondence":
        """The operators among the particles `indices` [M]."""
        return Correspondence(self.positions[indices][:, indices], self.validity[indices][:, indices])

    def weighed(self, source: Tensor, variance: float) -> "Correspondence":
        """Down-weight the validity where the source u [N, C, h, w] itself matches badly, by inverse variances.

            v_ij(p) ← v_ij(p) s² / (s² + ρ²_ij(p)),   ρ²_ij(p) = mean over channels of (u_i(p) − u_j(x_ij(p)))²

        Each particle's estimate has `variance` s²; a neighbour's, after warping, has s² + ρ². Exact matches (ρ = 0)
        keep their weight. At low noise (small s²) imperfect matches contribute little.
        """
        self._check(source)
        misses = torch.stack([(source[i] - self.sample(source, i)).square().mean(1) for i in range(len(self))])
        return Correspondence(self.positions, self.validity * (variance / (variance + misses)).to(self.validity))

    def sums(self, directions: Tensor, particles: Tensor, coefficient: float, config: SVGDConfig) -> Sums:
        """SVGD's two sums for every particle i, with the other particles warped to i's pixels, y_j = z_j(x_ij(·)).

            score_i(p) = Σ_j k_ij [v_ij Δ_i + A_ij (Δ_j − B_ji Δ_i)](p) / n_i(p)
            force_i(p) = Σ_j 2 s_ij v_ij(p) (z_i − y_j)(p) / n_i(p),   s the slope

        A_ij = v_ij B_ij, with B_ij the bilinear rows alone.

        Scores. We warp the difference Δ_j − Δ_i, formed on j's pixels (0 where i does not show them), rather than Δ_j.
        Bilinear warping blurs what it warps; if the two directions agree, the difference is zero and nothing is
        blurred. With whole-number positions the score is Σ_j k_ij A_ij Δ_j.

        Repulsion. k depends on z_j through y_j = B_ij z_j, so ∇_{z_j} k = B_ijᵀ ∇_{y_j} k lies on j's pixels. Warping
        it back to i with A_ij would blur it (A_ij B_ijᵀ); we use ∇_{y_j} k itself, as in SVGD among the y_j. The
        distance d² extrapolates from the visible part to the rest, as a constant: the force on a shared pixel does not
        grow when fewer pixels are shared.

        Normalisation. Where j does not show p, its weight k_ij goes to the particles that do; i is always one of them:

            n_i(p) = n_i Σ_j k_ij v_ij(p) / Σ_j k_ij,   n_i = N ("mean") or Σ_j k_ij ("row")

        With "row" the weights at every pixel sum to one. With "mean" they sum to Σ_j k_ij / N at every pixel of i, so
        equal directions move the whole of i equally and overlaps leave no visible edge. A particle that shares nothing
        gets Δ_i / N, like a particle infinitely far away in plain SVGD. The sums are returned before division by n_i.
        """
        K, slope = self.kernel(particles, config)
        z, delta = (as_rows(x).view_as(x) for x in (particles, directions))
        score, force = torch.empty_like(delta), torch.empty_like(z)
        for i in range(len(z)):
            validity = self.validity[i].to(z)
            weight, pull = (factor[i, :, None, None] * validity for factor in (K, slope))
            total = weight.sum(0)
            spared = K[i].sum() / total  # all weight over the weight of those that show p
            seen = (self.validity[:, i] > 0)[:, None]
            differs = torch.where(seen, delta - self.sample_back(delta[i], i), 0.0)
            differs, y_j = self.sample(torch.cat([differs, z], 1), i).chunk(2, dim=1)
            score[i] = (total * delta[i] + (weight[:, None] * differs).sum(0)) * spared
            force[i] = 2 * (pull[:, None] * (z[i] - y_j)).sum(0) * spared
        total = K.sum(1, keepdim=True) if config.normalize == "row" else torch.full_like(K[:, :1], len(K))
        score = score.flatten(1) if config.share else total * delta.flatten(1)
        others = ~torch.eye(len(K), dtype=torch.bool, device=K.device)
        report = {"shared_pixels": off_diagonal(self.validity).mean()}
        pairs = others & (self.validity.sum((2, 3)) > 0)
        return Sums(K, score, force.flatten(1), total, coefficient, pairs=pairs, report=report)

    def kernel(self, particles: Tensor, config: SVGDConfig) -> tuple[Tensor, Tensor]:
        """`kernel_matrix` of particles z [N, C, h, w]; row i compares z_i with every particle warped to i's pixels.

            d²_ij = Σ_p v_ij(p) ‖z_i(p) − z_j(x_ij(p))‖² / (C Σ_p v_ij(p))

        d² is the mean over the pixels that i and j share; K and slope are 0 if they share none. K need not be
        symmetric, because A_ij and A_ji need not be inverse to each other.
        """
        z = as_rows(particles).view_as(particles)
        rows = []
        for i in range(len(z)):
            difference = z[i] - self.sample(z, i)
            rows.append((self.validity[i, :, None] * difference.square()).sum((1, 2, 3)))
        shown = self.validity.sum((2, 3))
        common = shown > 0
        squared = torch.stack(rows) / (z.shape[1] * torch.where(common, shown, 1.0)).to(z)
        between = squared[common & ~torch.eye(len(z), dtype=torch.bool, device=z.device)]
        everything = squared[common]
        between = between if len(between) else everything
        K, slope = kernel_of(squared, z[0].numel(), config, between=between, everything=everything)
        return K * common, slope * common

    def alone(self) -> dict[str, float]:
        """The report of a single particle."""
        return {"shared_pixels": 0.0}

    def sample(self, values: Tensor, i: int) -> Tensor:
        """B_ij u_j for every j: `values` u [N, C, h, w] warped to i's pixels, meaningless where validity[i] is 0."""
        self._check(values)
        return self._sample(values, i, slice(None))

    def sample_back(self, own: Tensor, i: int) -> Tensor:
        """B_ji u_i for every j: `own` [C, h, w] of particle i warped to j's pixels, [N, C, h, w]."""
        return self._sample(own.expand(len(self), *own.shape), slice(None), i)

    def _sample(self, values: Tensor, i: int | slice, chosen: int | slice) -> Tensor:
        index, weight = self._taps(i, chosen)
        flat, found = values.flatten(2), 0
        for tap in range(4):
            picked = flat.gather(2, index[:, None, :, tap].expand(-1, values.shape[1], -1))
            found = found + weight[:, None, :, tap].to(picked) * picked
        return found.view_as(values)

    def _taps(self, i: int | slice, chosen: int | slice) -> tuple[Tensor, Tensor]:
        """The four pixels [..., h w, 4] that each row reads, as flat indices, and their bilinear weights."""
        return bilinear_taps(self.positions[i, chosen].flatten(-3, -2), self.size)

    def _check(self, values: Tensor) -> None:
        if values.ndim != 4 or len(values) != len(self) or tuple(values.shape[2:]) != self.size:
            wanted = f"[{len(self)}, C, {self.size[0]}, {self.size[1]}]"
            raise ValueError(f"a correspondence of particles {wanted} was given values {tuple(values.shape)}")
