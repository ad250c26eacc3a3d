"""Metrics of an edited picture or video, updated with each frame, so that memory does not grow with its length.

Frames are compared along time at the size at which optical flow is computed, `flow_size`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from csd3d.canvas.clip import Captions, Clip
from csd3d.canvas.latents import EditedFrame, Latents, resize
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
from csd3d.metrics.image import decibels
from csd3d.metrics.motion import Flow, mean_of_ranges
from csd3d.priors import perceptual_distance

SSIM_WINDOW = 11  # pixels a side at least
RECENT = 8  # source frames kept for optical flow; more than the longest range of `WarpedError`
Figures = dict[str, float | int | None]


@dataclass
class Measured:
    """Measurements of one method so far, one for each frame."""

    psnr: list[Tensor] = field(default_factory=list)
    ssim: list[Tensor] = field(default_factory=list)
    outside: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    embedded: list[Tensor] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    seams: list[tuple[float, float]] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)
    before: list[Tensor] | None = None  # features of the previous frame
    last: Tensor | None = None  # the previous frame [3, H, W], for LPIPS
    warped: WarpedError | None = None


@dataclass
class Metrics:
    """Metrics of all methods of a run. For each frame, call `add_source`, then `add` for each method.

    judge: None for no CLIP metrics.  captions: what the clip and its edit show, if known.
    borders: rows and columns of pixels at which windows end; `wrap`: the right border continues at the left.
    inside [H, W]: how much of each pixel may be edited, None for all.
    flow(a, b): for videos, the source's optical flow at `size`.  features(images): for the perceptual distance.
    lpips(a, b): of neighbouring frames of a video [1, 3, H, W] in full size, None for none.
    """

    clip: Clip
    judge: Judge | None = None
    captions: Captions | None = None
    borders: tuple[list[int], list[int]] = ((), ())
    wrap: bool = False
    inside: Tensor | None = None
    flow: Flow | None = None
    size: tuple[int, int] = (0, 0)
    features: Callable[[Tensor], list[Tensor]] | None = None
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    recent: dict[int, Tensor] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)

    def add_source(self, number: int, source: Tensor) -> None:
        """Append a source frame [3, H, W]; computes here, once, what all methods need of it."""
        self.source = source
        if self.judge is not None:
            self.source_embedded = self.embed(source)
        if any(self.borders):
            self.source_seams = seam_visibility(source.permute(1, 2, 0), *self.borders, self.wrap)
        if self.clip.is_video:
            self.recent[number] = resize(source[None], self.size)[0]
            self.recent.pop(number - RECENT, None)

    def add(self, name: str, number: int, frame: EditedFrame) -> None:
        """Append the edit of that frame by the method `name`."""
        own, picture = self.measured.setdefault(name, Measured()), frame.picture
        if self.clip.answers is not None:
            self._compare(own, picture, number)
        if self.inside is not None and (self.inside == 0).any():
            own.outside.append((_squared(picture - self.source), _squared(frame.decoded - frame.decoded_source)))
        if self.judge is not None:
            own.embedded.append(torch.stack([self.embed(picture), self.source_embedded]))
        if any(self.borders):
            visible = seam_visibility(picture.permute(1, 2, 0), *self.borders, self.wrap)
            own.seams.append((visible, self.source_seams))
        if self.clip.is_video:
            self._follow(own, resize(picture[None], self.size)[0].permute(1, 2, 0))
        if self.clip.is_video and self.lpips is not None:
            if own.last is not None:
                own.lpips.append(float(self.lpips(own.last[None], picture[None])))
            own.last = picture

    def embed(self, picture: Tensor) -> Tensor:
        """Unit embeddings [P, D] of the parts of a frame [3, H, W]."""
        return self.judge.clip.embed_images(torch.stack(parts(picture, part_count(self.clip)))).cpu()

    def _compare(self, own: Measured, picture: Tensor, number: int) -> None:
        pixels = picture.permute(1, 2, 0)
        true = torch.from_numpy(np.ascontiguousarray(self.clip.answers[:, number]))
        true = true.float() / 255 if true.dtype == torch.uint8 else true
        own.psnr.append(psnr(pixels.expand_as(true), true))
        if min(true.shape[1:3]) >= SSIM_WINDOW:
            own.ssim.append(ssim(pixels.expand_as(true), true))

    def _follow(self, own: Measured, frame: Tensor) -> None:
        if own.warped is None:
            own.warped = WarpedError(self.flow or self._flow_of_sources())
        own.warped.add(frame)
        with torch.no_grad():
            features = self.features(frame.permute(2, 0, 1)[None])
        if own.before is not None:
            own.distances.append(perceptual_distance(own.before, features).item())
        own.before = features

    def _flow_of_sources(self) -> Flow:
        """Optical flow of the recent source frames, which need not be read again; shared by all methods."""
        from csd3d.canvas.optical_flow import ClipFlow  # here: pictures need no OpenCV

        self.flow = ClipFlow(lambda indices: torch.stack([self.recent[i] for i in indices])).pixels
        return self.flow

    # --------------------------------------------------------------------------------------------------------- figures

    def figures(self, name: str) -> Figures:
        """All metrics of a method: see `truth`, `outside_figures`, `clip_figures` and `steadiness`."""
        own = self.measured.get(name, Measured())
        found = truth(own)
        found |= self.outside_figures(own) | self.clip_figures(own, int(found.get("answer", 0)))
        return found | steadiness(own)

    def outside_figures(self, own: Measured) -> Figures:
        """PSNR outside the edited regions: `psnr_outside` of pictures, `psnr_outside_vae` of decoded latents."""
        if not own.outside:
            return {}
        mask = ~dilate(self.inside > 0, 2)
        means = [torch.stack(errors).mean(0)[mask].mean() for errors in zip(*own.outside, strict=True)]
        edited, decoded = (decibels(mse).item() for mse in means)
        return {"psnr_outside": edited, "psnr_outside_vae": decoded}

    def clip_figures(self, own: Measured, answer: int) -> Figures:
        """`clip_image` (similarity to the source), `clip_consistency` (of frames, or of parts of a picture) and, with
        captions, `clip_directional`: means over frames and parts."""
        if not own.embedded:
            return {}
        edited, source = torch.stack(own.embedded, 1)  # [F, P, D] both
        row = edited[:, 0] if self.clip.is_video else edited[0]
        found: Figures = {"clip_image": image_similarity(edited.flatten(0, 1), source.flatten(0, 1)).mean().item()}
        if len(row) > 1:
            found["clip_consistency"] = image_consistency(row).mean().item()
        if self.captions is not None:
            found["clip_directional"] = self.directional(edited, source, answer)
        return found

    def directional(self, edited: Tensor, source: Tensor, answer: int) -> float | None:
        """Directional similarity, mean over the parts whose caption changes; embeddings [F, P, D]."""
        found = []
        for part in range(edited.shape[1]):
            words = [texts[part % len(texts)] for texts in (self.captions.after[answer], self.captions.before)]
            if words[0] != words[1]:
                texts = self.judge.clip.embed_texts(words).cpu()
                found.append(directional_similarity(edited[:, part], source[:, part], *texts))
        return torch.cat(found).mean().item() if found else None


def truth(own: Measured) -> Figures:
    """`psnr_truth` and `ssim_truth` against `answer`, the true edit with the best mean PSNR over all frames."""
    if not own.psnr:
        return {}
    scores = torch.stack(own.psnr).mean(0)
    best = int(scores.argmax())
    found: Figures = {"psnr_truth": scores[best].item(), "answer": best}
    return found | ({"ssim_truth": torch.stack(own.ssim)[:, best].mean().item()} if own.ssim else {})


def steadiness(own: Measured) -> Figures:
    """For videos `flow_warped_error`, its two ranges, and `neighbour_distance` of successive frames in features of the
    prior's encoder, `lpips` if asked for; with windows `seam_visibility`, also relative to the source."""
    found: Figures = {}
    if own.warped is not None:
        found |= mean_of_ranges("flow_warped_error", own.warped.report())
    if own.distances:
        found["neighbour_distance"] = sum(own.distances) / len(own.distances)
    if own.lpips:
        found["lpips"] = sum(own.lpips) / len(own.lpips)
    if own.seams:
        edited, source = (sum(values) / len(values) for values in zip(*own.seams, strict=True))
        found |= {"seam_visibility": edited, "seam_visibility_relative": edited / source}
    return found


def make_metrics(latents: Latents, cover: Cover, judge: Judge | None, captions: Captions | None) -> Metrics:
    """Metrics for the methods of a run; `captions` are the user's, and default to those of a demo clip."""
    clip, flow, size = latents.clip, None, latents.clip.size
    if clip.is_video:
        from csd3d.canvas.optical_flow import flow_size  # here: pictures need no OpenCV

        size = flow_size(*clip.size)
        flow = clip.flow if size == clip.size else None
    prior = latents.codec.prior
    return Metrics(
        clip,
        judge,
        captions or clip.captions,
        window_borders(cover, latents),
        cover.wrap,
        latents.inside,
        flow,
        size,
        lambda images: prior.features(images.to(prior.device)),
    )


def window_borders(cover: Cover, latents: Latents) -> tuple[list[int], list[int]]:
    """Rows and columns of pixels at which evenly spaced windows begin or end."""
    found = []
    for side, size, whole in zip(cover.sides, latents.size, latents.clip.size, strict=True):
        ends = torch.cat([side.even(), side.even() + side.size])
        ends = ends % side.length if side.wrap else ends
        pixels = (ends * latents.codec.unit * whole / size).round().long().unique().tolist()
        first = 0 if side.wrap else 1
        found.append([pixel for pixel in pixels if first <= pixel < whole] if side.count > 1 else [])
    return found[0], found[1]


def part_count(clip: Clip) -> int:
    """Number of roughly square parts, side by side, that CLIP judges a picture by; 1 for the frames of a video."""
    return 1 if clip.is_video else max(1, round(clip.width / clip.height))


def parts(picture: Tensor, count: int) -> list[Tensor]:
    """A picture [3, H, W] cut from left to right into `count` parts of equal width."""
    return list(picture[..., : picture.shape[2] // count * count].tensor_split(count, dim=2))


def _squared(difference: Tensor) -> Tensor:
    """Mean square over the channels of [3, H, W]."""
    return difference.square().mean(0)
