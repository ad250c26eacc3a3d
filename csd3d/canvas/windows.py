"""Windows on canvases of latents, which cover them evenly.

Symbols: z [F, C, H, W] a canvas of F frames; M windows of one size (h, w), window m at row top[m] and column left[m] of
frame frame[m]. Columns are counted modulo W: a window may cross the right border of a canvas that wraps around.

A *sweep* is a set of windows that covers the canvas, with weights that sum to 1 at every latent pixel, so a weighted
update of all windows updates each latent pixel exactly once. Sampling windows independently cannot cover evenly: a
window must lie inside the canvas, so a border pixel is covered by one position and a central pixel by w positions;
re-weighting positions does not fix this in general.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from csd3d.distillation.noise import draw_noise


@dataclass(frozen=True)
class Windows:
    """M windows of `size` = (h, w) latent pixels: their frames, rows and columns, [M] integers each."""

    frame: Tensor
    top: Tensor
    left: Tensor
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, rows: slice | Tensor) -> "Windows":
        return replace(self, frame=self.frame[rows], top=self.top[rows], left=self.left[rows])

    def on_one_frame(self) -> "Windows":
        """The same places on frame 0, to cut what all frames have in common."""
        return replace(self, frame=torch.zeros_like(self.frame))


def gather(z: Tensor, windows: Windows) -> Tensor:
    """Cut the windows [M, C, h, w] out of a canvas [F, C, H, W]. Raises IndexError outside its rows or frames."""
    h, w = windows.size
    rows = windows.top[:, None] + torch.arange(h)
    columns = (windows.left[:, None] + torch.arange(w)) % z.shape[3]
    found = z[windows.frame[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return found.movedim(-1, 1).contiguous()


def scatter(patches: Tensor, windows: Windows, shape: tuple[int, int, int, int]) -> Tensor:
    """Add windows [M, C, h, w] up on a canvas of `shape` (F, C, H, W); the adjoint of `gather`."""
    z = patches.new_zeros(shape)
    add_windows(z, patches, windows)
    return z


def add_windows(z: Tensor, patches: Tensor, windows: Windows) -> None:
    """Add patches [M, C, h, w] to a canvas in place, one after the other: always in the same order."""
    (h, w), width = windows.size, z.shape[3]
    for patch, f, y, x in zip(
        patches, windows.frame.tolist(), windows.top.tolist(), windows.left.tolist(), strict=True
    ):
        done = 0
        while done < w:  # a second time for the part that wraps around
            at = (x + done) % width
            count = min(w - done, width - at)
            z[f, :, y : y + h, at : at + count] += patch[:, :, done : done + count]
            done += count


def feather(size: tuple[int, int]) -> Tensor:
    """A window's weights before normalisation, [h, w]: the product of the distances to the nearer edge on each axis.

    Windows that overlap along a side then fade into each other over the whole overlap; a window has weight 1 elsewhere.
    """
    rows, columns = (torch.minimum(torch.arange(n), torch.arange(n).flip(0)) + 0.5 for n in size)
    return rows[:, None] * columns


def normalised_weights(windows: Windows, shape: tuple[int, int]) -> Tensor:
    """Weights [M, 1, h, w] of windows on one frame of `shape` = (H, W): feathered, summing to 1 at covered pixels."""
    raw = feather(windows.size).expand(len(windows), 1, -1, -1)
    return raw / gather(scatter(raw, windows, (1, 1, *shape)), windows)


def window_tracks(windows: Windows) -> list[Tensor]:
    """The indices of the windows at each (top, left), in the order of their frames; each list is a video."""
    top, left, frame = windows.top, windows.left, windows.frame
    places = torch.stack([top, left], dim=1).unique(dim=0)
    at = [((top == y) & (left == x)).nonzero().flatten() for y, x in places.tolist()]
    return [rows[frame[rows].argsort(stable=True)] for rows in at]


# -------------------------------------------------------------------------------------------------------- even coverage


@dataclass(frozen=True)
class Cover:
    """How windows of `size` cover a canvas of `shape` = (F, H, W), with at most `batch` windows a step.

    Neighbours overlap by a fraction `overlap` of a window's side on average, and by at least half of that; `wrap`: the
    columns are periodic. A sweep is one cover, in `steps` steps, or several covers if they fit into one step together.
    """

    shape: tuple[int, int, int]
    size: tuple[int, int]
    batch: int | None = None
    wrap: bool = False
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if any(side > whole for side, whole in zip(self.size, self.shape[1:], strict=True)):
            raise ValueError(f"windows of {self.size} are larger than the canvas {self.shape[1:]}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap is {self.overlap}: give a fraction of a window in [0, 1)")

    @property
    def sides(self) -> tuple["Side", "Side"]:
        """The rows and the columns."""
        wraps = (False, self.wrap)
        return tuple(Side(*s, self.overlap) for s in zip(self.shape[1:], self.size, wraps, strict=True))

    @property
    def windows(self) -> int:
        """The number of windows that cover all frames once."""
        rows, columns = self.sides
        return self.shape[0] * rows.count * columns.count

    @property
    def repeats(self) -> int:
        """The number of covers in a sweep: more than one only if they differ and fit into one step together."""
        if self.batch is None or all(side.fixed for side in self.sides):
            return 1
        return max(1, self.batch // self.windows)

    @property
    def steps(self) -> int:
        """The number of steps of a sweep."""
        return 1 if self.batch is None else max(1, math.ceil(self.windows / self.batch))


@dataclass(frozen=True)
class Side:
    """One axis of a canvas, `length` latent pixels, covered by windows of `size`."""

    length: int
    size: int
    wrap: bool
    overlap: float

    @property
    def count(self) -> int:
        """The number of windows along the axis."""
        step = max(1, self.size - round(self.overlap * self.size))
        if self.wrap:
            return 1 if self.size == self.length else math.ceil(self.length / step)
        return 1 + math.ceil((self.length - self.size) / step)

    @property
    def fixed(self) -> bool:
        """Whether each window has only one possible place."""
        return not self.wrap and self.count <= 2

    def even(self) -> Tensor:
        """Evenly spaced first pixels of the windows, [count]."""
        if self.wrap:
            return torch.arange(self.count) * self.length // self.count
        return torch.linspace(0, self.length - self.size, self.count).round().long()

    def draw(self, generator: torch.Generator) -> Tensor:
        """Random first pixels of the windows, [count], without gaps between the windows."""
        longest = max(1, self.size - round(self.overlap * self.size) // 2)
        if not self.wrap:
            return draw_chain(self.length - self.size, self.count - 1, longest, generator)
        start = torch.randint(self.length, (), generator=generator)
        if self.count == 1:
            return start[None]
        return (start + draw_chain(self.length, self.count, longest, generator)[:-1]) % self.length


def even_windows(cover: Cover) -> Windows:
    """The windows of one cover, evenly spaced, in the order of frames; not random."""
    rows, columns = cover.sides
    places = torch.cartesian_prod(rows.even(), columns.even()).reshape(-1, 2)
    frames = torch.arange(cover.shape[0]).repeat_interleave(len(places))
    return Windows(frames, *places.repeat(cover.shape[0], 1).T, cover.size)


def draw_chain(total: int, steps: int, longest: int, generator: torch.Generator) -> Tensor:
    """Random integers [steps + 1] rising from 0 to `total` by steps of at most `longest`, the same from both ends."""
    found = [0]
    for left in range(steps - 1, -1, -1):
        low, high = max(found[-1], total - left * longest), min(found[-1] + longest, total)
        found.append(int(torch.randint(low, high + 1, (), generator=generator)))
    chain = torch.tensor(found)
    return total - chain.flip(0) if torch.rand((), generator=generator) < 0.5 else chain


@dataclass(frozen=True)
class Sweep:
    """The windows of a sweep in order, and their weights [M, 1, h, w]."""

    windows: Windows
    weights: Tensor

    def part(self, number: int, parts: int) -> tuple[Windows, Tensor]:
        """The windows and weights of step `number` of `parts`."""
        rows = torch.arange(len(self.windows)).tensor_split(parts)[number]
        return self.windows[rows], self.weights[rows]

    def noise(self, windows: Windows, canvas: Tensor, kind: str, generator: torch.Generator) -> Tensor:
        """Standard normal ε [M, C, h, w] for some windows of a canvas [F, C, H, W], on its device.

        "independent": one draw per window. "shared": one window of noise, tiled over the canvas and its frames from the
        sweep's first window on. Then overlapping windows have the same noise where they overlap, so that they agree;
        windows at a distance of whole windows, such as the frames of a video, have it at equal addresses.
        """
        h, w = windows.size
        drawn = draw_noise(canvas.new_empty(1, canvas.shape[1], h, w).expand(len(windows), -1, -1, -1), kind, generator)
        if kind == "independent":
            return drawn
        tile, first = drawn[0], self.windows[0]
        rows = (windows.top - first.top)[:, None] + torch.arange(h)
        columns = ((windows.left - first.left)[:, None] + torch.arange(w)) % canvas.shape[3]
        return tile[:, (rows % h)[:, :, None], (columns % w)[:, None, :]].movedim(1, 0).contiguous()


def draw_sweep(cover: Cover, generator: torch.Generator) -> Sweep:
    """Draw a sweep: the same jittered places on every frame, ordered by place, with frames in random order at each.

    So a step's windows are one place in many frames or, with few frames, neighbouring places.
    """
    frames, height, width = cover.shape
    rows, columns = cover.sides
    grids = [torch.cartesian_prod(rows.draw(generator), columns.draw(generator)) for _ in range(cover.repeats)]
    places = torch.cat(grids).roll(int(torch.randint(len(grids[0]), (), generator=generator)), 0)
    one = Windows(torch.zeros(len(places), dtype=torch.long), *places.T, cover.size)
    order = torch.randperm(frames, generator=generator).repeat(len(places))
    windows = Windows(order, *(side.repeat_interleave(frames) for side in (one.top, one.left)), cover.size)
    return Sweep(windows, normalised_weights(one, (height, width)).repeat_interleave(frames, 0))
