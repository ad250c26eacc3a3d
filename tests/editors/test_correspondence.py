"""Correspondences against dense matrices and what windows on a canvas have in common."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from correspondences import (
    C,
    H,
    N,
    W,
    along_flow,
    bring,
    canvas_windows,
    dense,
    identity,
    pairs,
    random,
    random_correspondence,
    windows_at,
)

from csd3d import registry
from csd3d.canvas.latents import pixel_grid
from csd3d.convert import BadValue, build
from csd3d.distillation import svgd_combine
from csd3d.editors.correspondence import Correspondence
from csd3d.editors.csd_edit_canvas import CSDEditCanvas
from csd3d.editors.csd_edit_scene import CSDEditScene

# The operators.


def test_bring_is_the_matrix_of_the_definition_and_its_rows_sum_to_the_validity():
    maps, u = random_correspondence(), random(N, C, H, W, seed=5)
    for i, j in pairs():
        A = dense(maps, j, i)
        torch.testing.assert_close(bring(maps, u, j, i).flatten(1), u[j].flatten(1) @ A.T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(A.sum(1), maps.validity[i, j].flatten(), rtol=1e-12, atol=1e-12)


def test_a_fractional_shift_of_a_ramp_is_exact():
    x, y = pixel_grid(H, W).double().unbind(-1)
    ramp = (2 * x - 3 * y + 1).expand(2, 1, H, W)
    flow = torch.tensor([0.25, -0.5], dtype=torch.float64).expand(2, 2, H, W, 2)
    brought = bring(along_flow(flow, torch.ones(2, 2, H, W)), ramp, j=1, i=0)
    expected = ramp[0] + 2 * 0.25 + 3 * 0.5
    torch.testing.assert_close(brought[:, 1:, :-1], expected[:, 1:, :-1], rtol=1e-12, atol=0.0)


def test_flow_points_from_what_is_looked_at_from_to_what_is_looked_at():
    """What frame 0 shows at p, frame 1 shows 2 to the right and 1 down: so a pixel of 0 reads p + (2, 1) of 1."""
    u = torch.zeros(2, 1, H, W)
    u[0, 0, 2, 3], u[1, 0, 3, 5] = 1, 1
    flow = torch.zeros(2, 2, H, W, 2)
    flow[0, 1], flow[1, 0] = torch.tensor([2.0, 1.0]), torch.tensor([-2.0, -1.0])
    maps = along_flow(flow, torch.ones(2, 2, H, W))
    assert torch.equal(bring(maps, u, j=1, i=0), u[0])
    assert torch.equal(bring(maps, u, j=0, i=1), u[1])


def test_rows_of_what_is_outside_or_unknown_are_zero():
    positions = pixel_grid(H, W).expand(2, 2, H, W, 2).clone()
    positions[0, 1, 0] = torch.tensor([-0.5, 0.0])  # in the outer half of the first pixel: it is that pixel
    positions[0, 1, 1] = torch.tensor([W - 0.4, 0.0])
    positions[0, 1, 2] = torch.nan
    u = torch.ones(2, 1, H, W)
    u[1, 0, 0, 0] = 5
    maps = Correspondence(positions, torch.ones(2, 2, H, W, dtype=torch.bool))
    brought = bring(maps, u, j=1, i=0)[0]
    assert (brought[0] == 5).all()
    assert (brought[1:3] == 0).all()
    assert (brought[3:] == 1).all()
    assert (maps.validity[0, 1, 1:3] == 0).all()


def test_a_particle_is_itself_whatever_is_given_for_it():
    u, maps = random(N, C, H, W, seed=8), random_correspondence(seed=2)
    for i in range(N):
        assert torch.equal(bring(maps, u, i, i), u[i])


def test_select_keeps_the_operators_of_some_particles():
    u, maps, rows = random(N, C, H, W, seed=9), random_correspondence(seed=3), torch.tensor([3, 1])
    some = maps.select(rows)
    for i, j in pairs(2):
        assert torch.equal(bring(some, u[rows], j, i), bring(maps, u, int(rows[j]), int(rows[i])))


# Windows.


@pytest.mark.parametrize(("left", "wrap"), [([0, 3, 9], None), ([0, 7, 10], 12), ([0, 3, 5], 6), ([0, 2, 4], 5)])
def test_windows_bring_the_same_pixels_of_the_canvas(left, wrap):
    """Every pixel that two windows share is brought exactly, and no other; where both ends overlap too (5 and 6)."""
    top, h, w = [0, 1, 2], 4, 5
    canvas = torch.arange(6 * (wrap or 16), dtype=torch.float64).reshape(1, 6, -1)  # every pixel its own number
    windows = canvas_windows(canvas, top, left, h, w)
    maps = windows_at(top, left, (h, w), wrap)
    for i, j in pairs(3):
        shared = torch.isin(windows[i, 0], windows[j, 0])
        assert torch.equal(maps.validity[i, j] > 0, shared)
        assert torch.equal(bring(maps, windows, j, i)[0], torch.where(shared, windows[i, 0], 0.0))


def test_windows_between_pixels_interpolate():
    ramp = torch.arange(12.0).expand(1, 6, 12)
    windows = torch.stack([ramp[:, :H, :W], ramp[:, :H, 2 : W + 2] + 0.5])  # the second starts at 2.5
    maps = windows_at([0.0, 0.0], [0.0, 2.5], (H, W))
    brought = bring(maps, windows, j=1, i=0)
    assert (maps.validity[0, 1, :, :2] == 0).all()  # columns 0 and 1 lie left of it
    torch.testing.assert_close(brought[:, :, 3:], windows[0, :, :, 3:], rtol=1e-6, atol=1e-6)


def test_windows_between_pixels_reach_over_the_ends_of_a_canvas_that_wraps():
    """Half a pixel is lent there as at every border: the first pixel, at −0.25 of the other window, is its first."""
    maps = windows_at([0.0, 0.0], [0.0, 0.25], (H, W), wrap=9)
    assert (maps.validity[0, 1] == 1).all()
    torch.testing.assert_close(
        maps.positions[0, 1, 0, :, 0], (torch.arange(W) - 0.25).clamp_min(0), rtol=0.0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("positions", "validity", "message"),
    [
        (torch.zeros(2, 3, H, W, 2), torch.ones(2, 3, H, W), r"\[N, N, h, w, 2\].*\(2, 3, 5, 7, 2\)"),
        (torch.zeros(2, 2, H, W, 2), torch.ones(2, 2, H, W + 1), r"\(2, 2, 5, 8\)"),
        (torch.zeros(2, 2, H, W, 2), 2 * torch.ones(2, 2, H, W), r"\[0, 1\]"),
        (torch.zeros(2, 2, H, W, 2), torch.full((2, 2, H, W), torch.nan), r"\[0, 1\]"),
    ],
)
def test_wrong_tables_are_refused(positions, validity, message):
    with pytest.raises(ValueError, match=message):
        Correspondence(positions, validity)


def test_particles_of_another_shape_are_refused():
    for shape in [(N - 1, C, H, W), (N, C, H, W + 1), (N, C * H * W)]:
        with pytest.raises(ValueError, match="correspondence of particles"):
            svgd_combine(torch.zeros(shape), torch.zeros(shape), sigma=1.0, correspondence=identity())


# The registry.


def test_others_register_a_correspondence_of_their_own(monkeypatch):
    registry.names("correspondence")
    monkeypatch.setitem(registry._entries, "correspondence", dict(registry._entries["correspondence"]))

    @registry.register("correspondence", "mine")
    @dataclass(frozen=True)
    class Mine:
        strength: float = 1.0
        edits = ("picture",)

        def open(self, canvas):
            canvas.opened += 1
            return lambda windows: (self.strength, windows)

    editor = build(CSDEditCanvas, {"correspondence": {"type": "mine", "strength": 0.5}}, "", None)
    canvas = SimpleNamespace(kept={}, opened=0)
    assert editor.edits == ("picture",)
    assert [editor.sharing(canvas, windows) for windows in "ab"] == [(0.5, "a"), (0.5, "b")]
    assert canvas.opened == 1
    with pytest.raises(BadValue, match="choose one of none, depth"):
        build(CSDEditScene, {"correspondence": "mine"}, "", None)


def test_no_correspondence_is_the_default():
    for editor in (CSDEditCanvas, CSDEditScene):
        assert build(editor, {"correspondence": "none"}, "", None) == editor()
