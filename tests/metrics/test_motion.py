"""Motion metrics on clips whose motion and flicker are planted, and on the world's own."""

import math

import pytest
import torch
from torch import Tensor

from csd3d.metrics import WarpedError, seam_visibility
from csd3d.metrics.motion import warp_frame
from csd3d.world.scroll import orbit_clip, true_flow

H, W = 12, 20


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def flow_warped_error(frames, flow, gap: int = 4) -> dict:
    found = WarpedError(flow, gap)
    for frame in frames:
        found.add(frame)
    return found.report()


def still(a: int, b: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(H, W, 2), torch.ones(H, W, dtype=torch.bool)


def panning(a: int, b: int) -> tuple[Tensor, Tensor]:
    """Content moves 2 pixels to the right and 1 down a frame."""
    flow = (b - a) * torch.tensor([2.0, 1.0]).expand(H, W, 2)
    x, y = torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy")
    inside = (x + flow[..., 0] >= 0) & (x + flow[..., 0] < W) & (y + flow[..., 1] >= 0) & (y + flow[..., 1] < H)
    return flow, inside


def pan(count: int, seed: int = 0) -> Tensor:
    world = random(H + count, W + 2 * count, 3, seed=seed)
    return torch.stack([world[count - t : count - t + H, 2 * (count - t) : 2 * (count - t) + W] for t in range(count)])


def test_warping_brings_the_later_frame_back():
    frames = pan(4)
    flow, inside = panning(0, 2)
    torch.testing.assert_close(warp_frame(frames[2], flow)[inside], frames[0][inside], rtol=0.0, atol=1e-5)
    assert not torch.allclose(warp_frame(frames[0], flow)[inside], frames[2][inside], atol=0.1)


def test_warping_by_a_fraction_of_a_pixel_is_exact_on_a_ramp():
    x, y = torch.meshgrid(torch.arange(W).float(), torch.arange(H).float(), indexing="xy")
    ramp = (3 * x - 2 * y)[..., None]
    warped = warp_frame(ramp, torch.tensor([0.25, -0.5]).expand(H, W, 2))
    torch.testing.assert_close(warped[1:, :-1], (ramp + 1.75)[1:, :-1], rtol=1e-5, atol=1e-5)


def test_what_moves_with_the_source_has_no_error():
    report = flow_warped_error(pan(7), panning)
    assert report["short"] == pytest.approx(0, abs=1e-6)
    assert report["long"] == pytest.approx(0, abs=1e-6)
    assert report["short_pixels"] == 6 * (H - 1) * (W - 2)
    assert (report["short_pairs"], report["long_pairs"]) == (6, 3)


def test_flicker_is_its_own_size_and_is_pooled_over_pixels():
    """Frame t is brighter by d_t: the error of a range is the root of the mean of (d_b − d_a)² over seen pixels."""
    d = torch.tensor([0.0, 0.1, -0.05, 0.2, 0.0, 0.0])
    frames = 0.5 * pan(6) + d[:, None, None, None]
    report = flow_warped_error(frames, panning, gap=3)
    for name, gap in (("short", 1), ("long", 3)):
        expected = (d[gap:] - d[:-gap]).square().mean().sqrt().item()
        assert report[name] == pytest.approx(expected, abs=1e-6)
    assert report["long_pixels"] == 3 * (H - 3) * (W - 6)


def test_hidden_pixels_do_not_count_and_shares_weigh():
    frames = torch.zeros(2, H, W, 3)
    frames[1, :, :10], frames[1, :, 10:] = 0.3, 0.1
    share = torch.zeros(H, W)
    share[:, :10], share[:, 10:15] = 0.25, 1.0
    report = flow_warped_error(frames, lambda a, b: (torch.zeros(H, W, 2), share))
    assert report["short"] == pytest.approx(math.sqrt((2.5 * 0.09 + 5 * 0.01) / 7.5), rel=1e-6)
    assert report["short_pixels"] == 15 * H
    assert (report["long"], report["long_pairs"]) == (None, 0)
    nothing = flow_warped_error(frames, lambda a, b: (torch.zeros(H, W, 2), 0 * share))
    assert (nothing["short"], nothing["short_pixels"]) == (None, 0)


def test_a_clip_of_one_frame_has_no_pairs():
    report = flow_warped_error(torch.zeros(1, H, W, 3), still)
    assert (report["short"], report["long"], report["short_pairs"], report["long_pairs"]) == (None, None, 0, 0)
    with pytest.raises(ValueError, match="gap is 1"):
        flow_warped_error([], still, gap=1)


def test_the_worlds_clip_agrees_along_its_true_flow_and_flickering_colours_do_not():
    clip = orbit_clip(0, frames=7, size=48, arc_deg=30.0)
    masks = torch.from_numpy(clip.masks) > 0.9
    frames = torch.from_numpy(clip.frames).float() / 255

    def on_object(a: int, b: int) -> tuple[Tensor, Tensor]:
        flow, seen = true_flow(clip, a, b)
        return torch.from_numpy(flow), torch.from_numpy(seen) & masks[a]

    error = flow_warped_error(frames, on_object)
    assert error["short_pixels"] > 6 * 100
    assert error["short"] < 0.03
    assert error["long"] < 0.08
    colours = random(7, 1, 1, 3, seed=1)
    flickering = flow_warped_error(torch.where(masks[..., None], colours, frames), on_object)
    assert flickering["short"] > 0.2
    address = flow_warped_error(frames, lambda a, b: (torch.zeros(48, 48, 2), on_object(a, b)[1]))
    assert address["long"] > 1.5 * error["long"]


# Seams.


def test_a_ramp_has_no_seam():
    ramp = (torch.arange(W) / W)[None, :, None].expand(H, W, 3)
    assert seam_visibility(ramp, rows=[4, 8], columns=[5, 10]) == pytest.approx(1.0)


def test_a_step_on_a_border_is_its_energy_over_that_of_the_others():
    slope, step, floor = 0.01, 0.03, (0.5 / 255) ** 2
    image = (slope * torch.arange(W).double())[None, :, None].expand(H, W, 3).clone()
    image[:, 7:] += step
    seen = ((slope + step) ** 2 + floor) / (slope**2 + floor)
    assert seam_visibility(image, columns=[7]) == pytest.approx(seen, rel=1e-9)
    two = ((slope + step) ** 2 + slope**2 + 2 * floor) / (2 * slope**2 + 2 * floor)
    assert seam_visibility(image, columns=[7, 3, 7]) == pytest.approx(two, rel=1e-9)
    assert seam_visibility(image, columns=[6]) < 1  # the step is elsewhere
    assert seam_visibility(image.transpose(0, 1), rows=[7]) == pytest.approx(seen, rel=1e-9)


def test_borders_are_compared_with_lines_of_their_own_direction():
    """Horizontal bands: all gradient is across rows, and a vertical border has none to show."""
    bands = random(H, 1, 3).expand(H, W, 3)
    assert seam_visibility(bands, columns=[10]) == pytest.approx(1.0)
    assert seam_visibility(random(64, 64, 3, seed=2), [16, 32, 48], [16, 32, 48]) == pytest.approx(1.0, abs=0.2)


def test_where_a_panorama_closes():
    x = 2 * math.pi * torch.arange(64).double() / 64
    closing = (0.5 + 0.4 * torch.sin(x))[None, :, None].expand(4, 64, 3)
    open_ended = (torch.arange(64).double() / 64)[None, :, None].expand(4, 64, 3)
    assert seam_visibility(closing, columns=[0], wrap=True) < 2.1  # sin² is at its peak there, twice its mean
    assert seam_visibility(open_ended, columns=[0], wrap=True) > 1000
    with pytest.raises(ValueError, match=r"give numbers 1\.\.63"):
        seam_visibility(open_ended, columns=[0])


def test_flat_pictures_and_pictures_without_borders():
    flat = torch.full((H, W, 3), 0.5)
    assert seam_visibility(flat, rows=[6]) == 1.0
    assert seam_visibility(flat) is None
    flat[6:] += 0.1
    assert 1000 < seam_visibility(flat, rows=[6]) < math.inf
    for wrong in ([H], [-1], list(range(1, H))):
        with pytest.raises(ValueError, match="side"):
            seam_visibility(flat, rows=wrong)


def test_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"one size, got \(12, 20, 3\), \(12, 21, 2\)"):
        warp_frame(torch.zeros(H, W, 3), torch.zeros(H, W + 1, 2))
