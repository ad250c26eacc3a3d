"""Windows on canvases: the two operators against each other and brute force, and that every pixel is edited alike."""

import pytest
import torch

from csd3d.canvas.windows import (
    Cover,
    Side,
    Sweep,
    Windows,
    add_windows,
    draw_chain,
    draw_sweep,
    even_windows,
    feather,
    gather,
    normalised_weights,
    scatter,
)

COVERS = {
    "strip": Cover((1, 16, 64), (16, 16), batch=16),
    "strip that closes": Cover((1, 16, 64), (16, 16), batch=16, wrap=True),
    "photo in mini-batches": Cover((1, 41, 70), (16, 16), batch=7),
    "video": Cover((10, 16, 16), (16, 16), batch=4),
    "video of large frames": Cover((3, 20, 33), (16, 16), batch=5),
    "narrow and closed": Cover((2, 9, 12), (9, 12), batch=2, wrap=True),
    "all at once": Cover((2, 24, 24), (16, 16)),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_windows(count, shape, size, wrap, generator):
    frames, _, height, width = shape
    left = torch.randint(width if wrap else width - size[1] + 1, (count,), generator=generator)
    top = torch.randint(height - size[0] + 1, (count,), generator=generator)
    return Windows(torch.randint(frames, (count,), generator=generator), top, left, size)


@pytest.mark.parametrize("size", [(3, 4), (5, 5), (1, 11), (6, 25)])
@pytest.mark.parametrize("wrap", [False, True])
def test_scatter_is_the_adjoint_of_gather(size, wrap):
    """⟨gather(z), u⟩ = ⟨z, scatter(u)⟩; a window may be wider than a canvas that wraps around."""
    shape = (2, 3, 6, 11)
    if not wrap and size[1] > shape[3]:
        pytest.skip("only what wraps around can be narrower than a window")
    windows = some_windows(9, shape, size, wrap, seeded(1))
    z, u = (torch.randn(s, generator=seeded(2), dtype=torch.float64) for s in (shape, (9, 3, *size)))
    torch.testing.assert_close((gather(z, windows) * u).sum(), (z * scatter(u, windows, shape)).sum())


def test_gather_against_indexing_one_by_one():
    z = torch.randn(2, 3, 6, 11, generator=seeded())
    windows = some_windows(20, z.shape, (3, 4), True, seeded(1))
    found = gather(z, windows)
    for m in range(20):
        for y in range(3):
            for x in range(4):
                here = z[windows.frame[m], :, windows.top[m] + y, (windows.left[m] + x) % 11]
                assert torch.equal(found[m, :, y, x], here)
    added = z.clone()
    add_windows(added, found[:1], windows[:1])
    assert torch.equal(added, z + scatter(found[:1], windows[:1], z.shape))


def test_windows_outside_the_rows_are_refused():
    with pytest.raises(IndexError):
        gather(torch.zeros(1, 1, 4, 4), Windows(*torch.tensor([[0], [2], [0]]), (3, 3)))
    with pytest.raises(ValueError, match="larger than the canvas"):
        Cover((1, 8, 8), (8, 9))
    with pytest.raises(ValueError, match=r"overlap is 1\.0"):
        Cover((1, 8, 8), (8, 8), overlap=1.0)


def touched(cover, sweeps, wanted=1):
    """How many steps touch each latent pixel, and the weight that it gets in all, [F, H, W] both."""
    frames, height, width = cover.shape
    steps, weight = torch.zeros(2, frames, 1, height, width)
    for number in range(sweeps):
        sweep = draw_sweep(cover, seeded(number))
        for step in range(cover.steps):
            part, weights = sweep.part(step, cover.steps)
            once = scatter(weights, part, weight.shape)
            weight += once
            steps += once > 0
    return steps[:, 0], weight[:, 0]


@pytest.mark.parametrize("name", COVERS)
def test_every_latent_pixel_is_edited_alike(name):
    """Weight 1 a sweep everywhere, in mini-batches too; never more windows a step than asked for."""
    cover = COVERS[name]
    steps, weight = touched(cover, 12)
    torch.testing.assert_close(weight, torch.full_like(weight, 12.0), rtol=1e-5, atol=0)
    assert steps.min() >= 12
    for number in range(12):
        sweep = draw_sweep(cover, seeded(number))
        assert len(sweep.windows) == cover.windows * cover.repeats
        parts = [sweep.part(step, cover.steps)[0] for step in range(cover.steps)]
        assert sum(map(len, parts)) == len(sweep.windows)
        assert max(map(len, parts)) <= (cover.batch or len(sweep.windows))


@pytest.mark.parametrize("name", ["strip", "strip that closes", "all at once"])
def test_a_cover_that_fits_into_a_step_is_touched_everywhere_in_every_step(name):
    steps, _ = touched(COVERS[name], 30)
    assert (steps == 30).all()


def test_windows_drawn_one_by_one_leave_the_ends_behind():
    """What is guarded against: the same five windows of 16 on 64, drawn uniformly from where they fit."""
    places = torch.randint(49, (2000, 5), generator=seeded())
    first, middle = (((places > x - 16) & (places <= x)).any(1).float().mean() for x in (0, 32))
    assert first < 0.2 < 0.8 < middle


def test_offsets_are_jittered_and_seams_fall_everywhere():
    """Without wrap the outer windows stay at the ends and the others move; with it all of them move, evenly."""
    side = COVERS["strip"].sides[1]
    drawn = torch.stack([side.draw(seeded(k)) for k in range(500)])
    assert drawn.shape == (500, 5)
    assert (drawn[:, 0] == 0).all()
    assert (drawn[:, -1] == 48).all()
    assert (drawn[:, 1:-1].float().std(0) > 1.5).all()
    assert abs(drawn[:, 1].float().mean() - (48 - drawn[:, -2].float()).mean()) < 0.5  # alike from both ends
    closed = COVERS["strip that closes"].sides[1]
    starts = torch.cat([closed.draw(seeded(k)) for k in range(2000)]).bincount(minlength=64)
    assert len(starts) == 64
    assert starts.min() > 0.75 * starts.float().mean()
    assert starts.max() < 1.25 * starts.float().mean()


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_no_gap_at_any_length(wrap, overlap):
    for length in range(7, 60):
        side = Side(length, 7, wrap, overlap)
        places = side.draw(seeded(length))
        assert len(places) == side.count
        columns = (places[:, None] + torch.arange(7)) % length
        assert len(columns.unique()) == length
        assert wrap or places.max() <= length - 7


def test_chains_take_no_step_that_is_too_long():
    for seed in range(200):
        chain = draw_chain(37, 5, 8, seeded(seed))
        assert chain[0] == 0
        assert chain[-1] == 37
        assert (chain.diff() >= 0).all()
        assert chain.diff().max() <= 8
    assert draw_chain(0, 0, 3, seeded()).tolist() == [0]


def test_weights_fade_over_the_overlap_and_are_one_alone():
    windows = Windows(torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long), torch.tensor([0, 4]), (3, 6))
    first, second = normalised_weights(windows, (3, 10))[:, 0, 1]
    torch.testing.assert_close(first[:4], torch.ones(4))
    torch.testing.assert_close(second[2:], torch.ones(4))
    torch.testing.assert_close(first[4:] + second[:2], torch.ones(2))
    assert first[4] > first[5] > 0
    assert feather((1, 4)).tolist() == [[0.25, 0.75, 0.75, 0.25]]


def test_rolled_windows_on_a_rolled_canvas_see_the_same():
    z = torch.randn(2, 3, 5, 12, generator=seeded())
    windows = some_windows(6, z.shape, (5, 4), True, seeded(1))
    moved = Windows(windows.frame, windows.top, (windows.left + 7) % 12, windows.size)
    assert torch.equal(gather(z.roll(7, 3), moved), gather(z, windows))


def test_a_sweep_is_drawn_from_its_generator_alone():
    cover = COVERS["video of large frames"]
    one, same, other = (draw_sweep(cover, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(one.windows.left, same.windows.left)
    assert torch.equal(one.windows.frame, same.windows.frame)
    assert not torch.equal(one.windows.frame, other.windows.frame)
    assert one.windows[:4].on_one_frame().frame.tolist() == [0] * 4


def test_a_step_of_a_video_takes_one_place_of_many_frames():
    sweep = draw_sweep(Cover((6, 20, 16), (16, 16), batch=6), seeded())
    for step in range(2):
        part, _ = sweep.part(step, 2)
        assert part.frame.sort().values.tolist() == list(range(6))
        assert len(part.top.unique()) == 1


def test_even_windows_cover_every_frame_alike():
    cover = Cover((2, 20, 33), (16, 16), wrap=False)
    windows = even_windows(cover)
    assert len(windows) == cover.windows
    assert windows.left[:4].tolist() == [0, 8, 17, 0]
    assert windows.frame.bincount().tolist() == [6, 6]
    closed = even_windows(Cover((1, 16, 32), (16, 16), wrap=True))
    assert closed.left.tolist() == [0, 10, 21]


@pytest.mark.parametrize("name", ["strip", "strip that closes", "photo in mini-batches", "video of large frames"])
def test_shared_noise_is_one_window_repeated(name):
    """Windows agree on what they both show, in every step of a sweep; the first has the tile as it was drawn."""
    cover = COVERS[name]
    sweep, z = draw_sweep(cover, seeded(1)), torch.zeros(cover.shape[0], 3, *cover.shape[1:])
    seen = torch.full_like(z, torch.nan)[:1]
    for number in range(cover.steps):
        windows, _ = sweep.part(number, cover.steps)
        eps = sweep.noise(windows, z, "shared", seeded(7))
        assert (eps.flatten(1).std(1) - 1).abs().max() < 0.15
        if number == 0:
            assert torch.equal(eps[0], torch.randn(1, 3, *cover.size, generator=seeded(7))[0])
        for row, own in enumerate(eps):
            window = windows[row : row + 1].on_one_frame()
            there = gather(seen, window)[0]
            assert torch.equal(torch.where(there.isnan(), own, there), own)
            put = scatter(own[None], window, seen.shape)
            seen = torch.where(scatter(torch.ones_like(own)[None], window, seen.shape) > 0, put, seen)
    assert not seen.isnan().any()


def test_windows_whole_windows_apart_have_the_same_shared_noise():
    windows = Windows(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 3, 0, 0]), torch.tensor([2, 6, 10, 3]), (3, 4))
    sweep, z = Sweep(windows, torch.ones(4, 1, 3, 4)), torch.zeros(2, 5, 6, 16)
    eps = sweep.noise(windows, z, "shared", seeded())
    assert torch.equal(eps[0], eps[1])
    assert torch.equal(eps[0], eps[2])
    assert torch.equal(eps[0, :, :, 1:], eps[3, :, :, :3])
    own = sweep.noise(windows, z, "independent", seeded())
    assert not torch.equal(own[0], own[1])
