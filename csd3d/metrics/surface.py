"""Colours and shape of an object against the true one.

Symbols: P points or pixels, K colours, V views of S² pixels.
"""

import math
from collections.abc import Sequence

import torch
from kornia.filters import gaussian_blur2d
from scipy.spatial import cKDTree
from skimage.color import rgb2lab
from torch import Tensor

SAMPLES = 64  # true pixels that stand for each colour, from light to shade
UNLIKE = 22.0  # CIELAB units; a pixel further from all asked colours has none of them
LIGHTNESS = 0.6  # weight of a difference in lightness, of which shading makes much
WINDOW = 0.08  # standard deviation, of a picture's side, of the windows in which a pattern is looked for


def seen_as(pixels: Tensor, true_pixels: Tensor, asked: Tensor) -> Tensor:
    """The asked colour that each pixel shows, [P] int; −1: none of them.

    pixels [P,3]; true_pixels [Q,3] with the colours `asked` [Q] ≥ 0 that they are meant to have, all in [0, 1]. A pixel
    shows the colour of the nearest true pixel, in CIELAB with less weight on lightness, so light and shade need no
    model.
    """
    label = torch.full((len(pixels),), -1)
    if not len(pixels) or not len(true_pixels):
        return label
    lab, true_lab = _lab(pixels), _lab(true_pixels)
    best = torch.full((len(pixels),), UNLIKE)
    for k in asked.unique().tolist():
        distance = torch.cdist(lab, _shades(true_lab[asked == k])).amin(1)
        label[distance < best] = k
        best = torch.minimum(best, distance)
    return label


def _shades(lab: Tensor) -> Tensor:
    """`SAMPLES` of the pixels of one colour, from shade to light."""
    return lab[lab[:, 0].argsort()][torch.linspace(0, len(lab) - 1, SAMPLES).round().long()]


def _lab(pixels: Tensor) -> Tensor:
    lab = torch.from_numpy(rgb2lab(pixels.clamp(0, 1).numpy())).float()
    return lab * torch.tensor([LIGHTNESS, 1.0, 1.0])


def shares_found(label: Tensor, asked: Tensor, least: float = 0.03) -> dict[int, float]:
    """How much of each asked colour is there: its pixels over the true ones, at most 1, for each with a `least` share.

    label, asked: the colours of the asset's and of the true object's pixels, −1: none.
    """
    counts = {k: int((asked == k).sum()) for k in asked[asked >= 0].unique().tolist()}
    total = sum(counts.values())
    return {k: min(1.0, int((label == k).sum()) / n) for k, n in counts.items() if n >= least * total}


def between(pixels: Tensor, shades: Sequence[Tensor]) -> Tensor:
    """Where each pixel lies from colour 0 to 1: [P] in [0, 1], by its distance to each, in light or shade.

    pixels [P,3] in [0, 1]; shades: of both colours, see `_shades`.
    """
    lab = _lab(pixels)
    first, second = (torch.cdist(lab, other).amin(1) for other in shades)
    return first / (first + second).clamp_min(1e-6)


def pattern_found(rgb: Tensor, opaque: Tensor, true_rgb: Tensor, asked: Tensor) -> float | None:
    """How much of the pattern is there, in its place and in its colours, 0 to 1; None if the true object has none.

    rgb, true_rgb [V,S,S,3]; opaque [V,S,S] bool: where the asset is; asked [V,S,S] as of `TrueViews`. It is the slope
    of a local regression, in windows of `WINDOW` of the picture, of where the asset lies between both colours on where
    the true object does. A pattern with half of its contrast has 0.5; one colour, a mixture, halves, speckle and
    blotches have about 0, as have stripes where dots are asked for.
    """
    region = (asked == 0) | (asked == 1)
    if not (asked == 1).any() or not (asked == 0).any():
        return None
    shades = [_shades(_lab(true_rgb[asked == k])) for k in (0, 1)]
    place = torch.zeros(2, *asked.shape)
    for k, pictures in enumerate((true_rgb, rgb)):
        place[k][region] = between(pictures[region], shades)
    true, own = place

    def spread(first: Tensor, second: Tensor, there: Tensor) -> Tensor:
        mass = blurred(there.float(), WINDOW).clamp_min(1e-6)
        a, b, both = (blurred(x * there, WINDOW) / mass for x in (first, second, first * second))
        return ((both - a * b) * there).sum()

    slope = spread(true, own, region & opaque) / spread(true, true, region).clamp_min(1e-6)
    return slope.clamp(0, 1).item()


def blurred(maps: Tensor, sigma: float) -> Tensor:
    """Maps [V,S,S] blurred by a Gaussian of `sigma` of their side, zero outside."""
    width = sigma * maps.shape[-1]
    size = 2 * max(math.ceil(2.5 * width), 1) + 1
    return gaussian_blur2d(maps[:, None], (size, size), (width, width), border_type="constant")[:, 0]


def chamfer(points: Tensor, distance: Tensor, true_points: Tensor) -> float:
    """Mean distance between two surfaces, from each to the other, half the sum: world units.

    distance [P]: the unsigned distances of `points` [P,3] to the true surface, of which `true_points` [Q,3] are
    samples.
    """
    back, _ = cKDTree(points.numpy()).query(true_points.numpy())
    return (distance.mean().item() + float(back.mean())) / 2
