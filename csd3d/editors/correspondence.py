"""What windows of a canvas have in common, other than their address: an option of CSD-Edit.

    overlap  the same place of the canvas, for windows that overlap
    flow     the same content of a video, along its optical flow

Both came out worse than the address, which is the paper's (benchmarks/results/edit-2d.json).
"""

from collections.abc import Callable

from csd3d.canvas.latents import resize
from csd3d.canvas.windows import Windows
from csd3d.distillation import Correspondence, window_correspondence
from csd3d.editors.canvas import Canvas


def correspondence_of(kind: str, canvas: Canvas) -> Callable[[Windows], Correspondence]:
    """A function of some windows of the canvas, on the CPU; `kind`: "overlap" or "flow"."""
    latents = canvas.latents
    size, wrap = tuple(latents.z.shape[2:]), canvas.cover.wrap
    if kind == "overlap":
        return lambda windows: overlap_correspondence(windows, size[1] if wrap else None)
    from csd3d.canvas.optical_flow import ClipFlow  # here: pictures need no OpenCV

    flow = ClipFlow(lambda indices: resize(latents.clip.read(indices), latents.size), size, latents.codec.unit)
    return lambda windows: flow.correspondence(windows.frame, windows.top, windows.left, windows.size)


def overlap_correspondence(windows: Windows, wrap: int | None) -> Correspondence:
    """Windows of one frame share where they overlap; those of others share nothing. `wrap`: the canvas's width."""
    found = window_correspondence(windows.top, windows.left, windows.size, wrap)
    same = windows.frame[:, None] == windows.frame
    return Correspondence(found.positions, found.validity * same[:, :, None, None])
