"""The conditions of a noise prediction: text, source picture, sizes, camera. Symbols as in `prior`."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """The conditions of a batch of noise predictions.

    text [B, L, D]: embeddings of the prompts.  image [B, C, h, w]: the source picture, for an editing model.
    pooled [B, P]: pooled embeddings of the prompts, which SDXL and Stable Diffusion 3 need.  time_ids [B, 6]: SDXL's
    (height, width) of the source, (top, left) of its crop and (height, width) of the target, in pixels; None is the
    uncropped picture of z_t.  camera [B, K]: the embedding of the camera, for models that take it; zeros mean none.
    mask [B, L]: true for the tokens of `text` that count; None: all do.
    """

    text: Tensor
    image: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    camera: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.text.ndim != 3:
            raise ValueError(f"Condition.text must be [B, L, D], got {tuple(self.text.shape)}")
        if self.image is not None and (self.image.ndim != 4 or len(self.image) != len(self.text)):
            raise ValueError(f"Condition.image must be [{len(self.text)}, C, h, w], got {tuple(self.image.shape)}")
        for name, width in (("pooled", "P"), ("time_ids", 6), ("camera", "K"), ("mask", "L")):
            value = getattr(self, name)
            if value is not None and (value.ndim != 2 or len(value) != len(self.text)):
                raise ValueError(f"Condition.{name} must be [{len(self.text)}, {width}], got {tuple(value.shape)}")

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, rows: slice | Tensor) -> "Condition":
        return self._map(lambda value: value[rows])

    def expand(self, batch: int) -> "Condition":
        """A condition of one element, repeated `batch` times without copying."""
        return self._map(lambda value: value.expand(batch, *value.shape[1:]))

    def to(self, device: torch.device) -> "Condition":
        """The condition on a device."""
        return self._map(lambda value: value.to(device))

    @property
    def shapes(self) -> tuple:
        """Shapes without the batch; conditions with equal `shapes` can be stacked."""
        values = (getattr(self, part.name) for part in fields(self))
        return tuple(None if value is None else tuple(value.shape[1:]) for value in values)

    @staticmethod
    def cat(conditions: list["Condition"]) -> "Condition":
        """Stack conditions along the batch; ValueError where some have an image (pooled text, ...) and others not."""
        parts = {}
        for name in (part.name for part in fields(Condition)):
            present = [value for condition in conditions if (value := getattr(condition, name)) is not None]
            if present and len(present) != len(conditions):
                raise ValueError(f"{len(present)} of {len(conditions)} conditions have `{name}`: all must, or none")
            parts[name] = torch.cat(present) if present else None
        return Condition(**parts)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return Condition(**{name: None if value is None else function(value) for name, value in values.items()})
