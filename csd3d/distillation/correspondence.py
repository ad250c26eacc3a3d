"""Which pixel of one particle shows what a pixel of another shows: sparse linear operators between their latents.

Symbols: N particles of latents [C, h, w]; i the particle looked from, j the one looked at, p a pixel of i. `positions`
[N, N, h, w, 2]: x_ij(p) = (x, y), where in j the content of pixel p of i is, in pixels, the first pixel's centre at
(0, 0). `validity` [N, N, h, w] in [0, 1]: v_ij(p), 0 where j does not show it (outside, occluded, unknown). The
operators act on every channel alike:

    (A_ij u)(p) = v_ij(p) Σ_q b(q − x_ij(p)) u(q),   b bilinear

so that a row of A_ij sums to v_ij(p), and A_ii is the identity. Stored is x and v, 3 numbers a row: O(N² h w).

A `Correspondence` is a way to share (`svgd.Sharing`): particle j is first brought to i's pixels, and i shares with what
shows the same content (`Correspondence.sums`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.distillation.kernel import SVGDConfig, as_rows, kernel_of
from csd3d.distillation.svgd import Sums

BORDER = 0.5  # pixels: a position in the outer half of a border pixel is that pixel
SEEN = 0.5  # share of a latent pixel that must be seen


class Correspondence:
    """The operators A_ij of N particles. What a particle shows of itself is the identity, whatever is given for it."""

    def __init__(self, positions: Tensor, validity: Tensor) -> None:
        """`positions` [N, N, h, w, 2] and `validity` [N, N, h, w], bool or in [0, 1], as the module's docstring says.

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
        """That of the particles `indices` [M] alone."""
        return Correspondence(self.positions[indices][:, indices], self.validity[indices][:, indices])

    def bring(self, values: Tensor, j: int, i: int) -> Tensor:
        """A_ij u_j: row j of `values` [N, C, h, w] brought to i's pixels, [C, h, w]; 0 where j does not show them."""
        self._check(values)
        return self.validity[i, j] * self._sample(values[j : j + 1], i, slice(j, j + 1))[0]

    def adjoint(self, cotangent: Tensor, j: int, i: int) -> Tensor:
        """A_ijᵀ g: `cotangent` [C, h, w] of i's pixels spread over j's, [C, h, w]; ⟨g, A_ij u⟩ = ⟨A_ijᵀ g, u⟩."""
        if cotangent.ndim != 3 or tuple(cotangent.shape[1:]) != self.size:
            raise ValueError(f"cotangent must be [C, {self.size[0]}, {self.size[1]}], got {tuple(cotangent.shape)}")
        index, weight = self._taps(i, j)
        rows = (self.validity[i, j] * cotangent).flatten(1)
        spread = torch.zeros_like(rows)
        for tap in range(4):
            spread.index_add_(1, index[:, tap], weight[:, tap].to(rows) * rows)
        return spread.view_as(cotangent)

    def weighed(self, source: Tensor, variance: float) -> "Correspondence":
        """That of estimates which each particle knows to `variance` s², by how well `source` u [N, C, h, w] follows it.

            v_ij(p) ← v_ij(p) s² / (s² + ρ²_ij(p)),   ρ²_ij(p) = mean over channels of (u_i(p) − u_j(x_ij(p)))²

        What j has to say of p reaches i with variance s² + ρ², the interpolation's and the flow's errors and what is
        i's own included; these are the weights of the best mean. Exact correspondences (ρ = 0) stay as they are, and
        the surer the particles are, the less others' blurred words count.
        """
        self._check(source)
        misses = torch.stack([(source[i] - self.sample(source, i)).square().mean(1) for i in range(len(self))])
        return Correspondence(self.positions, self.validity * (variance / (variance + misses)).to(self.validity))

    def sums(self, directions: Tensor, particles: Tensor, coefficient: float, config: SVGDConfig) -> Sums:
        """SVGD's two sums for particle i among the others as they look from i, y_j = z_j(x_ij(·)).

            score_i(p) = Σ_j k_ij [v_ij Δ_i + A_ij (Δ_j − B_ji Δ_i)](p) / n_i(p)
            force_i(p) = Σ_j 2 s_ij v_ij(p) (z_i − y_j)(p) / n_i(p),   s the slope

        Scores. Brought is how j's direction differs from i's, on j's pixels (0 where i does not show them), not the
        direction itself: interpolation then blurs disagreement alone, and directions that agree come out as sharp as
        they are. Where positions are whole numbers, as windows on one canvas have them, it is Σ_j k_ij A_ij Δ_j.

        Repulsion. With B_ij the bilinear rows alone, A_ij = v_ij B_ij, k depends on z_j through y_j = B_ij z_j, so that
        ∇_{z_j} k = B_ijᵀ ∇_{y_j} k: on j's pixels, spread there by the adjoint. A gradient, unlike a direction, comes
        back to i by the inverse of that adjoint, not by A_ij (A_ij B_ijᵀ would blur it), and what is back is ∇_{y_j} k
        itself, as from SVGD among the y_j: 2 s_ij v_ij (z_i − y_j). d² is that of what is shown and, for what is not, a
        guess in proportion to it. The guess is no coordinate of y_j and is held fixed: the force on a pixel that is
        shared does not grow as fewer are.

        Normalisation. Where j does not show p, its weight k_ij goes to those who do, i itself always among them:

            n_i(p) = n_i Σ_j k_ij v_ij(p) / Σ_j k_ij,   n_i = N ("mean") or Σ_j k_ij ("row")

        With "row" the weights at every pixel sum to one. With "mean" they sum to what they do in the plain form,
        Σ_j k_ij / N, at all pixels of i, so that agreeing directions move the whole of i alike and the ends of an
        overlap do not show; an i that shares nothing with anyone gets Δ_i / N, as plain SVGD gives one infinitely far
        from all. Returned is what is divided by n_i.
        """
        K, slope = self.kernel(particles, config)
        z, delta = (as_rows(x).view_as(x) for x in (particles, directions))
        score, force = torch.empty_like(delta), torch.empty_like(z)
        for i in range(len(z)):
            validity = self.validity[i].to(z)
            weight, pull = (factor[i, :, None, None] * validity for factor in (K, slope))
            total = weight.sum(0)
            spared = K[i].sum() / total  # what goes to those who show p, over what they have of their own
            seen = (self.validity[:, i] > 0)[:, None]
            differs = torch.where(seen, delta - self.sample_back(delta[i], i), 0.0)
            differs, y_j = self.sample(torch.cat([differs, z], 1), i).chunk(2, dim=1)
            score[i] = (total * delta[i] + (weight[:, None] * differs).sum(0)) * spared
            force[i] = 2 * (pull[:, None] * (z[i] - y_j)).sum(0) * spared
        total = K.sum(1, keepdim=True) if config.normalize == "row" else torch.full_like(K[:, :1], len(K))
        score = score.flatten(1) if config.share else total * delta.flatten(1)
        others = ~torch.eye(len(K), dtype=torch.bool, device=K.device)
        report = {"shared_pixels": self.validity[others].mean().item()}
        pairs = others & (self.validity.sum((2, 3)) > 0)
        return Sums(K, score, force.flatten(1), total, coefficient, pairs=pairs, report=report)

    def kernel(self, particles: Tensor, config: SVGDConfig) -> tuple[Tensor, Tensor]:
        """`kernel_matrix` of particles z [N, C, h, w]: row i compares z_i with every particle brought to i's pixels.

            d²_ij = Σ_p v_ij(p) ‖z_i(p) − z_j(x_ij(p))‖² / (C Σ_p v_ij(p))

        the mean over what they have in common; K and slope are 0 where that is nothing. What i sees of j is not what j
        sees of i: K need not be symmetric.
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
        """What a particle reports that has nobody to share with."""
        return {"shared_pixels": 0.0}

    def sample(self, values: Tensor, i: int) -> Tensor:
        """All particles' `values` [N, C, h, w] where i's pixels are in them, [N, C, h, w]: B_ij u_j for every j, with
        A_ij = v_ij B_ij. It says nothing where validity[i] is 0.
        """
        self._check(values)
        return self._sample(values, i, slice(None))

    def sample_back(self, own: Tensor, i: int) -> Tensor:
        """`own` [C, h, w] of particle i where every j's pixels are in it, B_ji u_i: [N, C, h, w]."""
        return self._sample(own.expand(len(self), *own.shape), slice(None), i)

    def _sample(self, values: Tensor, i: int | slice, chosen: int | slice) -> Tensor:
        index, weight = self._taps(i, chosen)
        flat, found = values.flatten(2), 0
        for tap in range(4):
            picked = flat.gather(2, index[:, None, :, tap].expand(-1, values.shape[1], -1))
            found = found + weight[:, None, :, tap].to(picked) * picked
        return found.view_as(values)

    def _taps(self, i: int | slice, chosen: int | slice) -> tuple[Tensor, Tensor]:
        """The four pixels [..., h w, 4] each row looks at, as flat indices, and their bilinear weights."""
        h, w = self.size
        position = self.positions[i, chosen].flatten(-3, -2)
        low = position.floor()
        x, y = (position - low).unbind(-1)
        x0, y0 = low.long().unbind(-1)
        x1, y1 = (x0 + 1).clamp_max(w - 1), (y0 + 1).clamp_max(h - 1)
        index = torch.stack([y0 * w + x0, y0 * w + x1, y1 * w + x0, y1 * w + x1], -1)
        return index, torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], -1)

    def _check(self, values: Tensor) -> None:
        if values.ndim != 4 or len(values) != len(self) or tuple(values.shape[2:]) != self.size:
            wanted = f"[{len(self)}, C, {self.size[0]}, {self.size[1]}]"
            raise ValueError(f"a correspondence of particles {wanted} was given values {tuple(values.shape)}")


def pixel_grid(h: int, w: int) -> Tensor:
    """(x, y) of every pixel's centre, [h, w, 2], the first at (0, 0)."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([x, y], -1).float()


def flow_correspondence(flow: Tensor, validity: Tensor) -> Correspondence:
    """Of frames with `flow` [N, N, h, w, 2]: what i shows at p, j shows at p + flow_ij(p), (x, y) latent pixels."""
    return Correspondence(pixel_grid(*flow.shape[2:4]).to(flow) + flow, validity)


def to_latent(flow: Tensor, valid: Tensor, size: tuple[int, int], unit: int) -> tuple[Tensor, Tensor]:
    """Flow [h, w, 2] of latent pixels, and the share [h, w] of each that is valid: 0 where that is less than half.

    `size` = (h, w); a latent pixel is `unit` pixels a side, its flow the mean over the valid ones. What an autoencoder
    pads at the right and bottom is not valid.
    """
    height, width = (side * unit for side in size)
    weight = valid.to(flow)
    stack = torch.cat([flow * weight[..., None], weight[..., None]], -1).movedim(-1, 0)
    stack = F.pad(stack, (0, width - flow.shape[1], 0, height - flow.shape[0]))
    pooled = F.avg_pool2d(stack[None], unit)[0].movedim(0, -1)
    share = torch.where(pooled[..., 2] >= SEEN, pooled[..., 2], 0.0)
    return torch.where(share[..., None] > 0, pooled[..., :2] / pooled[..., 2:] / unit, 0.0), share


def window_correspondence(top: Tensor, left: Tensor, size: tuple[int, int], wrap: int | None = None) -> Correspondence:
    """Of windows `size` = (h, w) on one canvas, from their offsets `top`, `left` [N] in latent pixels, whole or not.

    `wrap`: the canvas's width where its two ends meet, as a 360° panorama's do.
    """
    offset = torch.stack([left, top], -1)
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    positions = pixel_grid(*size).to(offset) + (offset[:, None] - offset)[:, :, None, None]
    if wrap is not None:
        x, y = positions.unbind(-1)
        positions = torch.stack([(x + BORDER) % wrap - BORDER, y], -1)
    return Correspondence(positions, torch.ones_like(positions[..., 0]))
