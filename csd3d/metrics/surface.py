"""Colours and shape of an object against the true one.

Symbols: P points or pixels, K colours, V views of S² pixels.
"""

import torch
from scipy.spatial import cKDTree
from skimage.color import rgb2lab
from torch import Tensor

SAMPLES = 64  # true pixels that stand for each colour, from light to shade
UNLIKE = 22.0  # CIELAB units; a pixel further from all asked colours has none of them
LIGHTNESS = 0.6  # weight of a difference in lightness, of which shading makes much


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
        own = true_lab[asked == k]
        own = own[own[:, 0].argsort()][torch.linspace(0, len(own) - 1, SAMPLES).round().long()]
        distance = torch.cdist(lab, own).amin(1)
        label[distance < best] = k
        best = torch.minimum(best, distance)
    return label


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


def borders(label: Tensor) -> int:
    """How many neighbouring pixels of the views [V,S,S] have colours 0 and 1: the length of a pattern's borders."""
    count = 0
    for a, b in ((label[:, 1:], label[:, :-1]), (label[:, :, 1:], label[:, :, :-1])):
        count += int((((a == 0) & (b == 1)) | ((a == 1) & (b == 0))).sum())
    return count


def pattern_found(label: Tensor, asked: Tensor) -> float | None:
    """How much of the pattern is there, 0 to 1, wherever its parts lie; None if the true object [V,S,S] has none.

    The least of: both colours' amounts over the true ones, and the ratio of the lengths of the borders between them,
    which tells stripes from one half in each colour, and from speckle.
    """
    shares = shares_found(label, asked, 0.0)
    if not {0, 1} <= shares.keys():
        return None
    true, found = borders(asked), borders(label)
    alike = min(true, found) / max(true, found, 1)
    return min(shares[0], shares[1], alike)


def chamfer(points: Tensor, distance: Tensor, true_points: Tensor) -> float:
    """Mean distance between two surfaces, from each to the other, half the sum: world units.

    distance [P]: the unsigned distances of `points` [P,3] to the true surface, of which `true_points` [Q,3] are
    samples.
    """
    back, _ = cKDTree(points.numpy()).query(true_points.numpy())
    return (distance.mean().item() + float(back.mean())) / 2
