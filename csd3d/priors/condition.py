"""What the noise is predicted under: the words, the source picture, sizes, the camera. Symbols as in `prior`."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What the noise is predicted under: `text` [B, L, D], and for an editing model the source `image` [B, C, h, w].

    Models with a second, pooled description of the prompt (SDXL, Stable Diffusion 3) need it in `pooled` [B, P]:
    `Prior.condition` fills it in. `time_ids` [B, 6] are SDXL's (height, width) of the source, (top, left) of its crop
    and (height, width) of the target, in pixels; where it is None they stand for the whole picture that z_t is.
    `camera` [B, K] is the embedding of where the picture is seen from, for models that take it; zeros are "not told".
    """

    text: Tensor
    image: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    camera: Tensor | None = None

    def __post_init__(self) -> None:
        if self.text.ndim != 3:
            raise ValueError(f"Condition.text must be [B, L, D], got {tuple(self.text.shape)}")
        if self.image is not None and (self.image.ndim != 4 or len(self.image) != len(self.text)):
            raise ValueError(f"Condition.image must be [{len(self.text)}, C, h, w], got {tuple(self.image.shape)}")
        for name, width in (("pooled", "P"), ("time_ids", 6), ("camera", "K")):
            value = getattr(self, name)
            if value is not None and (value.ndim != 2 or len(value) != len(self.text)):
                raise ValueError(f"Condition.{name} must be [{len(self.text)}, {width}], got {tuple(value.shape)}")

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, rows: slice | Tensor) -> "Condition":
        return self._map(lambda value: value[rows])

    def expand(self, batch: int) -> "Condition":
        """Repeats a condition of one element `batch` times without copying."""
        return self._map(lambda value: value.expand(batch, *value.shape[1:]))

    @property
    def shapes(self) -> tuple:
        """Equal for conditions that can be stacked."""
        values = (getattr(self, part.name) for part in fields(self))
        return tuple(None if value is None else tuple(value.shape[1:]) for value in values)

    @staticmethod
    def cat(conditions: list["Condition"]) -> "Condition":
        """Stacks conditions along the batch; all have an image (pooled text, ...) or none has (ValueError)."""
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


def edit_branches(
    text: Tensor | Condition, null_text: Tensor | Condition, image: Tensor
) -> tuple[Condition, Condition, Condition]:
    """The three branches of InstructPix2Pix, (∅, ∅), (x̃, ∅), (x̃, y), its null image being a zero latent.

    `text` and `null_text` are [B | 1, L, D] embeddings of the instruction and of "", or `Condition`s; `image`
    [B, C, h, w] is of `encode_condition`. `Prior.edit_conditions` does it for any family.
    """
    given = (words if isinstance(words, Condition) else Condition(words) for words in (null_text, text))
    null, full = (words.expand(len(image)) for words in given)
    return replace(null, image=torch.zeros_like(image)), replace(null, image=image), replace(full, image=image)
