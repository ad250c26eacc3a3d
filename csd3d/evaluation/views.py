"""Measures of edited views that need no truth: do they agree with each other, and how much of the source is left?

Symbols: V views of H x W pixels; a, b two views; I, J the views before and after the edit; E(.) unit embeddings of a
CLIP, f(.) feature maps. What depends on the views before the edit alone is computed once, by `prepare_views`.

    source = prepare_views(before, cameras=cameras, depths=depths, clip=load_clip(), features=prior.features)
    for after in edits:
        figures = judge_views(source, after)

All measures are means over views or pairs, and None where they cannot be computed, such as from one view, or without a
CLIP.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.evaluation.overlap import Overlaps, by_depth, by_flow, neighbours_of
from csd3d.metrics.clip import ClipModel, directional_similarity, image_similarity
from csd3d.metrics.image import decibels
from csd3d.metrics.motion import mean_of_ranges
from csd3d.priors.perceptual import perceptual_vectors

ALIKE = 0.1  # two colours agree up to this root mean square difference over the channels
STILL = 1e-4  # a change of an embedding smaller than this has no direction
Features = Callable[[Tensor], list[Tensor]]  # images [B, 3, H, W] in [0, 1] → maps [B, C_l, h_l, w_l]
Figures = dict[str, float | None]
Name = TypeVar("Name", bound=Hashable)  # of a right answer


@dataclass(frozen=True)
class SourceViews:
    """What `judge_views` needs of the views before the edit: pairs, reprojection, embeddings, features."""

    images: Tensor  # [V, 3, H, W]
    near: Tensor  # [N, 2] neighbours, see `neighbours_of`
    overlaps: Overlaps | None  # None: not known
    figures: Figures  # measures of the source itself
    clip: ClipModel | None = None
    features: Features | None = None
    embedded: Tensor | None = None  # [V, D]
    captions: Tensor | None = None  # [2, D] of the captions before and after
    vectors: Tensor | None = None  # [V, F] of `perceptual_vectors`


def prepare_views(
    before: Tensor,
    *,
    cameras: Cameras | None = None,
    depths: Tensor | None = None,
    masks: Tensor | None = None,
    clip: ClipModel | None = None,
    captions: Sequence[str] | None = None,
    features: Features | None = None,
    flow: bool = True,
) -> SourceViews:
    """Compute once what depends on the views before the edit, [V, H, W, 3] in [0, 1].

    depths [V, H, W] along the rays (inf, NaN or ≤ 0: no surface) with their cameras: views are compared through them;
    else along the optical flow of the views before, unless `flow` is False, and then not at all. cameras: neighbours
    are the nearest by angle, instead of the next in order. masks [V, H, W] bool or weights: where the views are
    compared with each other. captions: (before, after), for `clip_directional`.
    Raises ValueError for shapes that do not fit.
    """
    count = len(before)
    if before.ndim != 4 or before.shape[3] != 3:
        raise ValueError(f"expected views [V, H, W, 3], got {tuple(before.shape)}")
    for name, maps in (("depths", depths), ("masks", masks)):
        if maps is not None and maps.shape != before.shape[:3]:
            raise ValueError(f"{name} are {tuple(maps.shape)}, the views {tuple(before.shape[:3])}")
    if cameras is not None and (len(cameras), cameras.height, cameras.width) != before.shape[:3]:
        raise ValueError(f"{len(cameras)} cameras of {cameras.width}x{cameras.height}, views {tuple(before.shape[:3])}")
    if depths is not None and cameras is None:
        raise ValueError("depths say nothing without the cameras")
    overlaps = None
    if depths is not None and count > 1:
        overlaps = by_depth(depths, cameras, masks)
    elif flow and count > 1:
        overlaps = by_flow(before, cameras, masks)
    images = before.permute(0, 3, 1, 2).float().contiguous()
    figures = {} if overlaps is None else agreement(images, overlaps)
    source = {"warped_error_before": figures.get("warped_error"), "overlap": overlaps and overlaps.share()}
    return SourceViews(
        images,
        neighbours_of(count, cameras),
        overlaps,
        source,
        clip,
        features,
        None if clip is None else clip.embed_images(images).cpu(),
        None if clip is None or captions is None else clip.embed_texts(list(captions)).cpu(),
        None if features is None else perceptual_vectors(_maps(features, images)),
    )


@torch.no_grad()
def judge_views(before: Tensor | SourceViews, after: Tensor, **options) -> Figures:
    """All measures of the views after the edit, [V, H, W, 3] in [0, 1].

    before: those before the edit, and `options` as for `prepare_views`, or what that returned. The keys are those of
    `agreement`, `clip_figures`, `preservation` and `feature_figures`, and `warped_error_before`, the error that the
    views before the edit have themselves, which is the least to expect, and `overlap`, the share of a view that its
    neighbours show.
    """
    source = before if isinstance(before, SourceViews) else prepare_views(before, **options)
    if isinstance(before, SourceViews) and options:
        raise ValueError(f"{', '.join(options)}: already settled by prepare_views")
    images = after.permute(0, 3, 1, 2).float().contiguous()
    if images.shape != source.images.shape:
        raise ValueError(
            f"views before are {tuple(source.images.shape)}, after {tuple(images.shape)}: one size, V 3 H W"
        )
    return (
        agreement(images, source.overlaps)
        | source.figures
        | clip_figures(images, source)
        | preservation(images, source)
        | feature_figures(images, source)
    )


def agreement(images: Tensor, overlaps: Overlaps | None) -> Figures:
    """How well views [V, 3, H, W] agree where they show the same, weighted by w of `Overlaps`.

        warped_error_<range> = √( Σ_ab Σ_p w d² / Σ_ab Σ_p w ),   d² = ‖J_a(p) − J_b(p seen in b)‖² / 3
        agreement            = Σ_ab Σ_p w [d ≤ 0.1] / Σ_ab Σ_p w

    sums over the pairs of a range, "short" or "long"; `agreement` over those of both. warped_error is the mean of the
    ranges that are known. As `csd3d.metrics.warped_error`, which sums in another order.
    """
    found: Figures = dict.fromkeys(("short", "long"))
    if overlaps is None or not len(overlaps.pairs):
        return mean_of_ranges("warped_error", found) | {"agreement": None}
    sums = torch.zeros(len(overlaps.pairs), 3, dtype=torch.float64)  # of w d², w [d ≤ 0.1] and w
    for rows in overlaps.chunks(torch.arange(len(overlaps.pairs)), 3 * images[0].numel()):
        warped, weight = overlaps.warp(images, rows)
        squared = (images[overlaps.pairs[rows, 0]] - warped).square().mean(1)
        terms = weight * squared, weight * (squared <= ALIKE**2), weight
        sums[rows] = torch.stack([term.sum((1, 2), dtype=torch.float64) for term in terms], 1)
    for name, rows in overlaps.ranges.items():
        error, _, weight = sums[rows].sum(0).tolist()
        found[name] = (error / weight) ** 0.5 if weight else None
    used = torch.cat(list(overlaps.ranges.values())).unique()
    _, alike, weight = sums[used].sum(0).tolist()
    return mean_of_ranges("warped_error", found) | {"agreement": alike / weight if weight else None}


def clip_figures(images: Tensor, source: SourceViews) -> Figures:
    """CLIP measures of views [V, 3, H, W]; a, b are neighbours, and ΔE_a = E(J_a) − E(I_a).

        clip_consistency            cos(E(J_a), E(J_b)): of frames, as in work on video ("frame consistency", "CLIP-F")
        clip_direction_consistency  cos(ΔE_a, ΔE_b): Instruct-NeRF2NeRF (arXiv 2303.12789, section 4.3)
        clip_directional            cos(ΔE_a, E_T(after) − E_T(before)), a mean over views; needs captions
        clip_similarity             cos(E(J_a), E(I_a)), a mean over views

    Where one of two views did not change, its direction's cosine is 0; pairs in which none did are left out.
    """
    keys = "clip_consistency", "clip_direction_consistency", "clip_directional", "clip_similarity"
    found: Figures = dict.fromkeys(keys)
    if source.clip is None:
        return found
    embedded = source.clip.embed_images(images).cpu()
    first, second = source.near.unbind(1)
    if len(first):
        found["clip_consistency"] = _within(image_similarity(embedded[first], embedded[second]).mean(), -1)
        change = embedded - source.embedded
        changed = change.norm(dim=1) > STILL
        change = torch.where(changed[:, None], change, 0.0)
        cosines = F.cosine_similarity(change[first], change[second], dim=1)[changed[first] | changed[second]]
        found["clip_direction_consistency"] = _within(cosines.mean(), -1) if len(cosines) else None
    if source.captions is not None:
        text_before, text_after = source.captions
        cosines = directional_similarity(embedded, source.embedded, text_after, text_before)
        found["clip_directional"] = _within(cosines.mean(), -1)
    found["clip_similarity"] = _within(image_similarity(embedded, source.embedded).mean(), -1)
    return found


def preservation(images: Tensor, source: SourceViews) -> Figures:
    """`psnr_source`: PSNR of views [V, 3, H, W] to those before, mean over views, at most 100 dB."""
    return {"psnr_source": decibels((images - source.images).square().mean((1, 2, 3))).mean().item()}


def feature_figures(images: Tensor, source: SourceViews) -> Figures:
    """Measures by feature maps f, means over maps; [.] is the mean over the pixels that both views show.

        lpips_like   ‖f̂(J_a) − f̂(I_a)‖², f̂ = f / ‖f‖ over channels: `perceptual_distance` to the source
        lpips_warped [‖f̂(J_a) − f̂(J_b→a)‖²]: of view a and view b warped onto it before f, for neighbours a < b
        met3r        1 − (S_ab + S_ba) / 2,  S_ab = [cos(f(J_a), f(J_b)→a)]: warped after f (arXiv 2501.06336)

    MEt3R finds the geometry by DUSt3R and takes DINO's features; here the geometry is given, and f is whatever
    `features` is. Its values compare with each other only for the same f: "MEt3R (VAE features)". 0 is best, 2 worst.
    """
    found: Figures = dict.fromkeys(("lpips_like", "lpips_warped", "met3r"))
    if source.features is None:
        return found
    maps = _maps(source.features, images)
    found["lpips_like"] = (perceptual_vectors(maps) - source.vectors).square().sum(1).mean().item()
    overlaps = source.overlaps
    if overlaps is not None and len(overlaps.both_ways):
        found["lpips_warped"] = _distance_after_warp(images, maps, overlaps, source.features)
        found["met3r"] = _mean([met3r(each, overlaps) for each in maps])
    return found


def met3r(maps: Tensor, overlaps: Overlaps) -> float | None:
    """MEt3R of feature maps [V, C, h, w], see `feature_figures`; None if no two neighbours show the same."""
    found = []
    points = overlaps.points(tuple(maps.shape[2:]))
    for row, (a, b) in zip(overlaps.both_ways.tolist(), overlaps.pairs[overlaps.both_ways].tolist(), strict=True):
        cells, grid, weight = points[row]
        warped = F.grid_sample(maps[b : b + 1], grid[None, None], padding_mode="border", align_corners=False)[0, :, 0]
        cosine = F.cosine_similarity(maps[a].flatten(1)[:, cells], warped, dim=0)
        total = weight.sum(dtype=torch.float64)
        found.append((weight * cosine).sum(dtype=torch.float64) / total if total else torch.tensor(torch.nan).double())
    score = 1 - torch.stack(found).reshape(-1, 2).mean(1)  # NaN where a pair has no overlap
    return _within(score.nanmean(), 0, 2) if score.isfinite().any() else None


def _distance_after_warp(images: Tensor, maps: list[Tensor], overlaps: Overlaps, features: Features) -> float | None:
    """`lpips_warped`. Where b does not show a's pixel, a's own is taken; there the distance does not count."""
    sums = torch.zeros(len(maps), 2, dtype=torch.float64)
    for rows in overlaps.chunks(overlaps.both_ways[::2], 64 * images[0].numel()):
        warped, weight = overlaps.warp(images, rows)
        a = overlaps.pairs[rows, 0]
        composed = torch.where(weight[:, None] > 0, warped, images[a])
        for i, (own, other) in enumerate(zip(maps, _maps(features, composed), strict=True)):
            distance = (F.normalize(own[a], dim=1) - F.normalize(other, dim=1)).square().sum(1)
            share = overlaps.at(tuple(own.shape[2:]))[1][rows]
            sums[i] += torch.stack([(each).sum(dtype=torch.float64) for each in (share * distance, share)])
    return _mean([each / weight if weight else None for each, weight in sums.tolist()])


def nearest_answer(after: Tensor, answers: Mapping[str, Tensor]) -> dict[str, float | str]:
    """How near views [V, H, W, 3] come to one of several right answers, each [V, H, W, 3], by name.

    psnr_truth: the mean PSNR over views to `answer`, the one with the best mean, chosen once for all views.
    answer_agreement: the share of views whose own nearest answer is the most common one; 1 / V to 1.
    """
    return nearest_of({name: decibels((after - answer).square().mean((1, 2, 3))) for name, answer in answers.items()})


def nearest_of(scores: Mapping[Name, Tensor]) -> dict[str, float | Name]:
    """`nearest_answer` of each answer's PSNR by view, [V]."""
    names, table = list(scores), torch.stack(list(scores.values()))
    best = int(table.mean(1).argmax())
    share = table.argmax(0).bincount().max().item() / table.shape[1]
    return {"psnr_truth": table[best].mean().item(), "answer": names[best], "answer_agreement": share}


def _within(value: Tensor, low: float, high: float = 1.0) -> float:
    """A figure of cosines in its range: those of equal vectors round to a little above 1."""
    return min(max(value.item(), low), high)


def _maps(features: Features, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [each.float().cpu() for each in features(images)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
