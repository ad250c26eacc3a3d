"""Rows in training: encoded when they come from the stream, then kept on the device in a ring buffer.

Symbols: n rows, S a picture's side in pixels, L the length of a prompt in tokens.
"""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from csd3d.priors.camera_embedding import camera_embedding
from tools.train_shipped.loop import FitConfig, autocast
from tools.train_shipped.stream import Rows

Batch = dict[str, Tensor]


def picture_size(vae: AutoencoderKL, latent_size: int) -> int:
    """The side in pixels of the pictures whose latents have this side."""
    return latent_size * 2 ** (len(vae.config.block_out_channels) - 1)


class Store:
    """A ring buffer of at most `capacity` rows on the device; draws are uniform over its rows."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.written = capacity, 0
        self.fields: Batch = {}

    def __len__(self) -> int:
        return min(self.written, self.capacity)

    def add(self, rows: Batch) -> None:
        """Append rows, a tensor [n, ...] a field; n may not exceed the capacity."""
        count = len(next(iter(rows.values())))
        first = self.written % self.capacity
        head = min(count, self.capacity - first)
        for name, values in rows.items():
            if name not in self.fields:
                self.fields[name] = values.new_empty(self.capacity, *values.shape[1:])
            self.fields[name][first : first + head] = values[:head]
            self.fields[name][: count - head] = values[head:]
        self.written += count

    def all(self) -> Batch:
        """All rows, in the order of storage."""
        return {name: values[: len(self)] for name, values in self.fields.items()}

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        """Draw `batch` random rows, with replacement."""
        pick = torch.randint(len(self), (batch,), generator=generator, device=generator.device)
        return {name: values[pick] for name, values in self.fields.items()}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` restores."""
        return {"capacity": self.capacity, "written": self.written, "rows": self.all()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the rows back where they were; of a buffer of another size the newest that fit, the oldest first."""
        rows, same = state["rows"], state["capacity"] == self.capacity
        self.fields, self.written = {}, 0
        if not rows:
            return
        if not same:
            oldest = state["written"] % state["capacity"] if state["written"] > state["capacity"] else 0
            rows = {name: values.roll(-oldest, 0)[-self.capacity :] for name, values in rows.items()}
        self.add(rows)
        if same:
            self.written = state["written"]


class Encoder:
    """Encode rendered rows for the store: modes, tokens, camera vectors."""

    def __init__(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer, config: FitConfig) -> None:
        self.vae = vae.to(config.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.tokenizer, self.config = tokenizer, config
        self.empty = self.tokens([[""]])[0, 0].to(config.device).long()

    def tokens(self, texts: list[list[str]]) -> Tensor:
        """[n,k,L] int16 of n rows of k sentences."""
        flat = [text for row in texts for text in row]
        found = self.tokenizer(flat, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return found.short().unflatten(0, (len(texts), len(texts[0])))

    @torch.no_grad()
    def modes(self, pictures: np.ndarray) -> Tensor:
        """Posterior modes [n,4,h,w] float16 of pictures [n,S,S,3] uint8."""
        pixels = self._upload(torch.from_numpy(pictures)).permute(0, 3, 1, 2)
        pixels = (pixels.float() / 127.5 - 1).to(memory_format=torch.channels_last)
        # activations of four pictures fit into a core's cache: 9 ms a picture instead of 16
        parts = pixels.split(len(pixels) if pixels.is_cuda else 4)
        with autocast(self.config):
            return torch.cat([self.vae.encode(part).latent_dist.mean.half().contiguous() for part in parts])

    def _upload(self, values: Tensor) -> Tensor:
        """Copy to the device through pinned memory, so that the copy does not wait for queued steps."""
        pinned = values.pin_memory() if self.config.device.startswith("cuda") else values
        return pinned.to(self.config.device, non_blocking=True)

    def __call__(self, rows: Rows) -> Batch:
        camera = self._upload(torch.from_numpy(rows["camera"]))
        kept = {
            "modes": self.modes(rows["pictures"]),
            "tokens": self._upload(self.tokens(rows["texts"])),
            "camera": camera_embedding(*camera.unbind(1)),
            "patterned": self._upload(torch.from_numpy(rows["patterned"])),
        }
        return kept | ({"sources": self.modes(rows["sources"])} if "sources" in rows else {})
