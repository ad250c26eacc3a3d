"""FID, the Fréchet Inception distance (Heusel et al. 2017, arXiv 1706.08500), by the network of published figures.

The features [B, 2048] are those before the last layer of TensorFlow's Inception of 2015-12-05, by the package
torch-fidelity (Apache-2.0, extra `metrics`), which also resizes as TensorFlow 1 did. Example:

    fid = open_fid("MY/PICTURES")
    distance = fid(images)  # [N, 3, H, W] in [0, 1]
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from csd3d.errors import InputError, one_line
from csd3d.media import read_image
from csd3d.metrics.clip import INSTALL
from csd3d.metrics.fid import frechet_distance

BATCH = 32
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Inception = Callable[[Tensor], Tensor]


def load_inception(device: torch.device | str = "cpu") -> Inception:
    """A function of images [B, 3, H, W] in [0, 1], rounded to 8 bits, that returns features [B, 2048] in float32.

    The weights (95 MB) are fetched once, to torch's cache. Raises InputError where the package is not installed, or the
    weights cannot be fetched or are others.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as package
    except ImportError as error:
        raise InputError(f"FID needs packages that are not installed ({error}): {INSTALL}") from None
    url = package.URL_INCEPTION_V3
    try:
        # here, because the package itself would unpickle what it finds
        weights = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True, progress=False
        )
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        buffer.seek(0)
        network = package.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], buffer)
    except Exception as error:  # no network, a broken download, other weights
        cache = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        raise InputError(f"FID: no weights of Inception from {url} in {cache} ({one_line(error, 120)})") from None
    network = network.to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        parts = (images.clamp(0, 1) * 255).round().to(torch.uint8).split(BATCH)
        return torch.cat([network(part.to(device))[0].cpu() for part in parts])

    return features


def reference_files(folder: str | Path) -> list[Path]:
    """The pictures of a folder of reference pictures by name; InputError where there are fewer than two."""
    folder = Path(folder).expanduser()
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if len(found) < 2:
        raise InputError(f"{folder}: FID needs a folder of two or more pictures ({', '.join(SUFFIXES)})")
    return found


@dataclass
class FID:
    """FID against the pictures in `files`, which may differ in size.

    It is biased upwards for few pictures (Bińkowski et al. 2018, arXiv 1801.01401): compare at equal numbers only.
    """

    inception: Inception
    files: list[Path]

    @cached_property
    def reference(self) -> Tensor:
        """The features [M, 2048] of the files; InputError for one that is broken."""
        pictures = (torch.tensor(read_image(path).rgb).permute(2, 0, 1)[None] for path in self.files)
        return torch.cat([self.inception(picture) for picture in pictures])

    def __call__(self, images: Tensor) -> float | None:
        """The FID of images [N, 3, H, W] in [0, 1]; None for fewer than two."""
        return frechet_distance(self.inception(images), self.reference) if len(images) > 1 else None


def open_fid(folder: str | Path, device: torch.device | str = "cpu") -> FID | None:
    """FID against the pictures of a folder, None for ""; what is missing raises InputError."""
    return FID(load_inception(device), reference_files(folder)) if folder else None
