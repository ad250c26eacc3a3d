"""Flow of planted motions and of the world's orbit, against what is known; and which latent pixels match."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.canvas import optical_flow as flow_module
from csd3d.canvas.latents import pixel_grid, to_latent
from csd3d.canvas.optical_flow import ClipFlow, consistent, flow_size, follow, resize_flow
from csd3d.editors.matches import places_seen
from csd3d.world.render import FAR
from csd3d.world.scroll import Clip, orbit_clip, true_flow


def texture(height: int, width: int, seed: int = 0, grain: int = 4) -> Tensor:
    """A random picture [H, W, 3] in [0, 1] whose details are about `grain` pixels."""
    noise = torch.rand(1, 3, height // grain + 2, width // grain + 2, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)[0].movedim(0, -1)


def flow_between(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    frames = torch.stack([a, b]).movedim(-1, 1)
    return ClipFlow(lambda indices: frames[list(indices)]).pixels(0, 1)


def shifted(world: Tensor, x: int, y: int, size: int) -> Tensor:
    """Content of `world` moved by (x, y), seen through a window in its middle."""
    top, left = (world.shape[0] - size) // 2 - y, (world.shape[1] - size) // 2 - x
    return world[top : top + size, left : left + size]


# Flow itself.


@pytest.mark.parametrize(("x", "y"), [(3, -2), (-7, 5), (0, 0)])
def test_a_planted_translation_is_found(x, y):
    world = texture(96, 96)
    flow, valid = flow_between(shifted(world, 0, 0, 64), shifted(world, x, y, 64))
    middle = (slice(8, -8), slice(8, -8))
    error = (flow - torch.tensor([float(x), float(y)])).norm(dim=-1)[middle]
    assert valid[middle].double().mean() > 0.95
    assert error[valid[middle]].max() < 0.5
    assert error[valid[middle]].mean() < 0.02


def test_what_leaves_the_frame_is_not_valid():
    world = texture(96, 96, seed=1)
    _, valid = flow_between(shifted(world, 0, 0, 64), shifted(world, 6, 0, 64))
    assert not valid[:, -5:].any()
    assert valid[8:-8, 8:-8].all()


def test_what_a_moving_square_covers_is_not_valid():
    """The square moves 8 to the right over a still ground: of the ground, the 8 columns before it get hidden."""
    ground, square = texture(128, 128, seed=3, grain=6), texture(48, 48, seed=4, grain=6)
    a, b = ground.clone(), ground.clone()
    a[40:88, 40:88], b[40:88, 48:96] = square, square
    flow, valid = flow_between(a, b)
    assert valid[44:84, 88:96].double().mean() < 0.1
    assert valid[:32].all()
    assert valid[44:84, 44:84].all()
    assert (flow[44:84, 44:84] - torch.tensor([8.0, 0.0])).norm(dim=-1).mean() < 0.05


def test_large_frames_are_compared_small_and_tiny_ones_enlarged():
    assert flow_size(1080, 1920) == (288, 512)
    assert flow_size(10, 2000) == (16, 512)
    assert flow_size(8, 8) == (16, 16)
    world = texture(200, 840, seed=5, grain=12)
    flow, valid = flow_between(world[50:150, 50:750], world[50:150, 38:738])  # content moves 12 to the right
    assert flow.shape == (100, 700, 2)
    middle = flow[20:-20, 50:-50]
    assert (middle - torch.tensor([12.0, 0.0])).norm(dim=-1).mean() < 0.5
    assert valid[20:-20, 50:-50].double().mean() > 0.95
    assert flow_between(world[:8, :8], world[:8, :8])[0].abs().max() < 0.5


def affine(matrix: Tensor, offset: Tensor, size: int = 32) -> Tensor:
    """Flow of p → M p + o, p in pixels from the middle."""
    x, y = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="xy")
    p = torch.stack([x, y], -1) - (size - 1) / 2
    return p @ matrix.T + offset - p


def rotation(degrees: float, scale: float = 1.0) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return scale * torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])


def test_following_composes_motions_in_their_order():
    """Bilinear interpolation is exact on affine flows, of which the composition is known and does not commute."""
    first, second = (rotation(20), torch.tensor([2.0, -1.0])), (rotation(-5, 1.1), torch.tensor([-3.0, 0.5]))
    third = (rotation(0, 0.9), torch.tensor([0.0, 1.0]))
    matrix, offset = torch.eye(2), torch.zeros(2)
    for M, o in (first, second, third):
        matrix, offset = M @ matrix, M @ offset + o
    followed = follow([affine(*motion) for motion in (first, second, third)])
    middle = slice(8, -8)
    expected = affine(matrix, offset)
    torch.testing.assert_close(followed[middle, middle], expected[middle, middle], rtol=1e-4, atol=1e-4)
    other_way = follow([affine(*motion) for motion in (third, second, first)])
    assert not torch.allclose(other_way[middle, middle], expected[middle, middle], atol=0.1)


def test_forward_and_backward_must_agree():
    there, back = affine(rotation(10), torch.zeros(2)), affine(rotation(-10), torch.zeros(2))
    middle = (slice(6, -6), slice(6, -6))
    assert consistent(there, back)[middle].all()
    assert not consistent(there, there)[:4].any()
    still = torch.zeros(32, 32, 2)
    for length, agrees in ((0.70, True), (0.72, False)):  # |f|² < 0.01 |f|² + 0.5 up to |f| = 0.7107
        forward = still.clone()
        forward[..., 0] = length
        assert consistent(forward, still)[4:-4, 4:-4].all().item() == agrees
    leaving = still.clone()
    leaving[..., 1] = 3.0
    valid = consistent(leaving, -leaving)
    assert valid[:-3].all()
    assert not valid[-3:].any()


def test_flow_at_another_size_is_in_that_sizes_pixels():
    flow, valid = torch.tensor([2.0, -3.0]).expand(10, 20, 2), torch.ones(10, 20, dtype=torch.bool)
    larger, seen = resize_flow(flow, valid, (40, 30))
    torch.testing.assert_close(larger, torch.tensor([3.0, -12.0]).expand(40, 30, 2))
    assert seen.all()
    half = valid.clone()
    half[:, 10:] = False
    _, seen = resize_flow(flow, half, (20, 40))
    assert torch.equal(seen[:, :19], torch.ones(20, 19, dtype=torch.bool))
    assert not seen[:, 21:].any()


def test_latent_pixels_take_the_mean_of_what_is_valid():
    flow, valid = torch.zeros(16, 16, 2), torch.ones(16, 16, dtype=torch.bool)
    flow[:, :8] = torch.tensor([8.0, -4.0])
    flow[:4, 8:], valid[:4, 8:] = 1e6, False  # above: half of the pixel is nonsense
    flow[4:8, 8:] = torch.tensor([0.0, 16.0])
    valid[8:13, 8:] = False  # below: five eighths are gone
    small, share = to_latent(flow, valid, (2, 2), unit=8)
    torch.testing.assert_close(small[:, 0], torch.tensor([1.0, -0.5]).expand(2, 2))
    torch.testing.assert_close(small[0, 1], torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(share, torch.tensor([[1.0, 0.5], [1.0, 0.0]]))
    assert (small[1, 1] == 0).all()


def test_padding_of_the_autoencoder_is_not_valid():
    flow, valid = torch.full((12, 20, 2), 4.0), torch.ones(12, 20, dtype=torch.bool)
    small, share = to_latent(flow, valid, (3, 3), unit=8)
    torch.testing.assert_close(share, torch.tensor([[1.0, 1.0, 0.5], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(small[share > 0], torch.full((5, 2), 0.5))


# A clip.


class Film:
    """Frames whose content moves by 4 pixels (one latent pixel) to the right a frame; notes what is read."""

    def __init__(self, count: int = 6, size: int = 64):
        world = texture(size, size + 4 * count, seed=6, grain=8)
        self.frames = torch.stack([world[:, 4 * (count - t) : 4 * (count - t) + size] for t in range(count)])
        self.reads = []

    def __call__(self, indices) -> Tensor:
        self.reads += list(indices)
        return self.frames[list(indices)].permute(0, 3, 1, 2)


def test_a_clips_frames_are_linked_by_its_motion():
    film = Film()
    flow = ClipFlow(film)
    for a, b in ((0, 1), (1, 0), (0, 4), (4, 0), (1, 4)):
        found, valid = flow.pixels(a, b)
        shared = slice(0, 4 * (a - b)) if b > a else slice(4 * (a - b), None)
        assert valid[:, shared].double().mean() > 0.95
        assert valid[:, shared].sum() > 0.99 * valid.sum()
        assert (found - torch.tensor([4.0 * (b - a), 0.0]))[valid].abs().mean() < 0.1
    same, valid = flow.pixels(2, 2)
    assert valid.all()
    assert (same == 0).all()


def test_a_link_is_computed_once_and_what_is_remembered_is_bounded(monkeypatch):
    film, calls = Film(), []
    dense_flow = flow_module.dense_flow
    monkeypatch.setattr(flow_module, "dense_flow", lambda a, b: calls.append(1) or dense_flow(a, b))

    def pairs(flow: ClipFlow) -> Tensor:
        return torch.stack([flow.pixels(a, b)[0] for a in (0, 3, 5) for b in (0, 3, 5)])

    flow = ClipFlow(film)
    first = pairs(flow)
    assert len(calls) == 10  # five links, there and back
    reads = len(film.reads)
    assert torch.equal(pairs(flow), first)
    assert (len(calls), len(film.reads)) == (10, reads)
    monkeypatch.setattr(flow_module, "CACHE_BYTES", 0)
    small = ClipFlow(film)
    assert small._link.cache_info().maxsize == 16
    assert torch.equal(pairs(small), first)


# The world.


@pytest.fixture(scope="module")
def clip() -> Clip:
    return orbit_clip(0, frames=6, size=96, arc_deg=30.0)


def test_flow_of_the_worlds_orbit_is_near_the_true_one(clip):
    """On the object: an error of a tenth of a latent pixel a frame apart, less than 0.7 of no flow's at any range."""
    pixels = torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float() / 255
    flow = ClipFlow(lambda indices: pixels[list(indices)])
    for a, b in ((0, 1), (3, 2), (0, 5), (5, 0)):
        surface = torch.from_numpy(clip.masks[a] > 0.5)
        wanted, seen = (torch.from_numpy(x) for x in true_flow(clip, a, b))
        wanted, share = to_latent(wanted, seen & surface, (12, 12), 8)
        followed, valid = flow.pixels(a, b)
        found, kept = to_latent(followed, valid & surface, (12, 12), 8)
        both = (share > 0) & (kept > 0)
        error, none = ((x[both]).norm(dim=-1).square().mean().sqrt() for x in (found - wanted, wanted))
        assert error < 0.7 * none
        assert error < 0.15 * abs(b - a)
        assert both.sum() > 0.5 * (share > 0).sum()


def orbit_cameras(clip: Clip) -> Cameras:
    rows, size = torch.from_numpy(clip.cameras), clip.depth.shape[1]
    return Cameras(rows[:, :12].reshape(-1, 3, 4), *rows[:, 12:].T, width=size, height=size)


def test_views_match_where_the_true_flow_says(clip):
    """Against the world's own reprojection, another piece of code: the same places, and nothing that it calls hidden.

    Latent pixels of which both see the whole: of others each may average over other parts.
    """
    depth = torch.from_numpy(clip.depth)
    depth = torch.where(depth < FAR, depth, torch.inf)
    pairs = torch.tensor([(0, 1), (1, 0), (0, 5), (5, 0)])
    places, shares = places_seen(orbit_cameras(clip), depth, pairs, (12, 12), unit=8, depth_tolerance=0.02)
    for (a, b), place, shown in zip(pairs.tolist(), places, shares, strict=True):
        flow, seen = (torch.from_numpy(x) for x in true_flow(clip, a, b))
        flow, share = to_latent(flow, seen & depth[a].isfinite(), (12, 12), 8)
        whole = (share == 1) & (shown == 1)
        assert whole.sum() > 0.8 * (share == 1).sum() > 15
        torch.testing.assert_close(place[whole], (pixel_grid(12, 12) + flow)[whole], rtol=0.0, atol=1e-4)
        assert (shown > 0).sum() < 1.2 * (share > 0).sum()
    assert (shares[0][0] == 0).all()  # the backdrop is nobody's
