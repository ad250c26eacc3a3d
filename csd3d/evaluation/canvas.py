"""Figures of an edited picture or video, frame by frame as it is written, so that memory does not grow with its length.

Along time frames are compared at the size that optical flow is computed at, `flow_size` of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from csd3d.canvas.clip import Captions, Footage
from csd3d.canvas.latents import Workspace, resize
from csd3d.canvas.windows import Cover
from csd3d.evaluation.text import Judge
from csd3d.metrics import (
    WarpedError,
    dilate,
    directional_similarity,
    image_consistency,
    image_similarity,
    psnr,
    seam_visibility,
    ssim,
)
from csd3d.metrics.motion import Flow
from csd3d.priors import perceptual_distance

SSIM_WINDOW = 11  # pixels a side at least
Figures = dict[str, float | int | None]


@dataclass
class Instruments:
    """What all methods of a run are measured with, whatever canvas each had; `borders` (rows, columns) are those of the
    main one's windows, which `wrap` around or do not; `sources`: the source frames' embeddings by number, [P, D]."""

    footage: Footage
    judge: Judge | None
    captions: Captions | None
    borders: tuple[list[int], list[int]]
    wrap: bool
    flow: Flow | None
    size: tuple[int, int]
    features: Callable[[Tensor], list[Tensor]]
    sources: dict[int, Tensor] = field(default_factory=dict)

    def embed(self, picture: Tensor) -> Tensor:
        """Unit embeddings [P, D] of the parts of a frame [3, H, W]."""
        return self.judge.clip.embed_images(torch.stack(parts(picture, part_count(self.footage)))).cpu()

    def embed_source(self, number: int, picture: Tensor) -> Tensor:
        """As `embed`, of a source frame, once."""
        if number not in self.sources:
            self.sources[number] = self.embed(picture)
        return self.sources[number]


def make_instruments(work: Workspace, cover: Cover, judge: Judge | None, captions: Captions | None) -> Instruments:
    """`captions` are the user's; the world has its own."""
    footage, flow, size = work.footage, None, work.footage.size
    if footage.is_video:
        from csd3d.canvas.optical_flow import ClipFlow, flow_size  # here: pictures need no OpenCV

        size = flow_size(*footage.size)
        true = footage.flow if size == footage.size else None
        flow = true or ClipFlow(lambda indices: resize(footage.read(indices), size), size, unit=1).pixels
    words, borders = captions or footage.captions, window_borders(cover, work)
    return Instruments(footage, judge, words, borders, cover.wrap, flow, size, work.codec.prior.features)


def window_borders(cover: Cover, work: Workspace) -> tuple[list[int], list[int]]:
    """Rows and columns of the footage's pixels at which evenly spaced windows begin or end, as baselines have them."""
    found = []
    for side, size, whole in zip(cover.sides, work.size, work.footage.size, strict=True):
        ends = torch.cat([side.even(), side.even() + side.size])
        ends = ends % side.length if side.wrap else ends
        pixels = (ends * work.codec.unit * whole / size).round().long().unique().tolist()
        first = 0 if side.wrap else 1
        found.append([pixel for pixel in pixels if first <= pixel < whole] if side.count > 1 else [])
    return found[0], found[1]


class Meter:
    """Figures of a method, frame by frame."""

    def __init__(self, work: Workspace, instruments: Instruments) -> None:
        self.work, self.tools, self.answers = work, instruments, work.footage.answers
        self.psnr: list[Tensor] = []
        self.ssim: list[Tensor] = []
        self.outside: list[tuple[Tensor, Tensor]] = []
        self.embedded: list[Tensor] = []
        self.distances: list[float] = []
        self.seams: list[tuple[float, float]] = []
        self.before: list[Tensor] | None = None  # the last frame's features
        self.warped = None if instruments.flow is None else WarpedError(instruments.flow)

    def add(self, number: int, picture: Tensor, source: Tensor, z: Tensor) -> None:
        """An edited frame [3, H, W], the next one, its source, and the canvas it was decoded from."""
        if self.answers is not None:
            self._compare(picture, number)
        if self.work.inside is not None and (self.work.inside == 0).any():
            decoded = [self.work.decode(canvas, [number])[0] for canvas in (z, self.work.z)]
            self.outside.append((_squared(picture - source), _squared(decoded[0] - decoded[1])))
        if self.tools.judge is not None:
            self.embedded.append(torch.stack([self.tools.embed(picture), self.tools.embed_source(number, source)]))
        if any(self.tools.borders):
            pictures = (picture.permute(1, 2, 0), source.permute(1, 2, 0))
            self.seams.append(tuple(seam_visibility(p, *self.tools.borders, self.tools.wrap) for p in pictures))
        if self.warped is not None:
            self._follow(resize(picture[None], self.tools.size)[0].permute(1, 2, 0))

    def _compare(self, picture: Tensor, number: int) -> None:
        own = picture.permute(1, 2, 0)
        true = torch.from_numpy(np.ascontiguousarray(self.answers[:, number]))
        true = true.float() / 255 if true.dtype == torch.uint8 else true
        self.psnr.append(psnr(own.expand_as(true), true))
        if min(true.shape[1:3]) >= SSIM_WINDOW:
            self.ssim.append(ssim(own.expand_as(true), true))

    def _follow(self, frame: Tensor) -> None:
        self.warped.add(frame)
        with torch.no_grad():
            features = self.tools.features(frame.permute(2, 0, 1)[None].to(self.work.codec.prior.device))
        if self.before is not None:
            self.distances.append(perceptual_distance(self.before, features).item())
        self.before = features

    def figures(self) -> Figures:
        """All that was measured: see `truth`, `outside_figures`, `clip_figures` and `steadiness`."""
        found = self.truth()
        return found | self.outside_figures() | self.clip_figures(int(found.get("answer", 0))) | self.steadiness()

    def truth(self) -> Figures:
        """`psnr_truth` and `ssim_truth` against `answer`, the one that suits all frames best."""
        if not self.psnr:
            return {}
        scores = torch.stack(self.psnr).mean(0)
        best = int(scores.argmax())
        found: Figures = {"psnr_truth": scores[best].item(), "answer": best}
        return found | ({"ssim_truth": torch.stack(self.ssim)[:, best].mean().item()} if self.ssim else {})

    def outside_figures(self) -> Figures:
        """`psnr_outside` the regions against the source, `psnr_outside_vae` of the decoded latents against its."""
        if not self.outside:
            return {}
        mask = ~dilate(self.work.inside > 0, 2)
        means = [torch.stack(errors).mean(0)[mask].mean() for errors in zip(*self.outside, strict=True)]
        own, decoded = (-10 * mse.clamp_min(1e-10).log10().item() for mse in means)
        return {"psnr_outside": own, "psnr_outside_vae": decoded}

    def clip_figures(self, answer: int) -> Figures:
        """`clip_image` (similarity to the source), `clip_consistency` (of frames, or a picture's parts) and, where
        captions are known, `clip_directional`: means over frames and parts."""
        if not self.embedded:
            return {}
        edited, source = torch.stack(self.embedded, 1)  # [F, P, D] both
        row = edited[:, 0] if self.work.footage.is_video else edited[0]
        found: Figures = {"clip_image": image_similarity(edited.flatten(0, 1), source.flatten(0, 1)).mean().item()}
        if len(row) > 1:
            found["clip_consistency"] = image_consistency(row).mean().item()
        if self.tools.captions is not None:
            found["clip_directional"] = self.directional(edited, source, self.tools.captions, answer)
        return found

    def directional(self, edited: Tensor, source: Tensor, captions: Captions, answer: int) -> float | None:
        """Mean over the parts whose caption changes."""
        found = []
        for part in range(edited.shape[1]):
            words = [texts[part % len(texts)] for texts in (captions.after[answer], captions.before)]
            if words[0] != words[1]:
                texts = self.tools.judge.clip.embed_texts(words).cpu()
                found.append(directional_similarity(edited[:, part], source[:, part], *texts))
        return torch.cat(found).mean().item() if found else None

    def steadiness(self) -> Figures:
        """Of videos `flow_warped_error`, its two ranges, and `neighbour_distance`, of neighbours in the features of the
        prior's encoder; where windows meet `seam_visibility`, and how many times the source's own it is."""
        found: Figures = {}
        if self.warped is not None:
            errors = {key: self.warped.report()[key] for key in ("short", "long")}
            known = [value for value in errors.values() if value is not None]
            found["flow_warped_error"] = sum(known) / len(known) if known else None
            found |= {f"flow_warped_error_{key}": value for key, value in errors.items()}
        if self.distances:
            found["neighbour_distance"] = sum(self.distances) / len(self.distances)
        if self.seams:
            own, source = (sum(values) / len(values) for values in zip(*self.seams, strict=True))
            found |= {"seam_visibility": own, "seam_visibility_relative": own / source}
        return found


def part_count(footage: Footage) -> int:
    """Into how many about square parts, side by side, a picture is cut to be judged; a video's frames are not."""
    return 1 if footage.is_video else max(1, round(footage.width / footage.height))


def parts(picture: Tensor, count: int) -> list[Tensor]:
    """A picture [3, H, W] cut from left to right into `count` parts of one width."""
    return list(picture[..., : picture.shape[2] // count * count].tensor_split(count, dim=2))


def _squared(difference: Tensor) -> Tensor:
    """Mean over the channels of [3, H, W], squared."""
    return difference.square().mean(0)
