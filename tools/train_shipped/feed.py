"""Fresh rows for training on a CPU: a chunk is rendered for every so many pictures trained on, and kept in a store.

With no workers rendering and training take turns on one core, and a run is repeated exactly, resumed or not.
"""

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch

from csd3d.errors import InputError
from tools.train_shipped import stream
from tools.train_shipped.rows import Batch, Encoder, Store

WAIT_SECONDS = 60.0  # a chunk takes a worker one or two
QUEUED = 4  # chunks that may wait for each worker


@dataclass(frozen=True)
class FeedConfig:
    """How rows are made and how long they are kept."""

    workers: int = 0  # processes that render beside the training; 0: rendering and training take turns
    reuse: float = 4.0  # pictures trained on for each new row, so how often a row is drawn on average
    capacity: int = 60_000  # rows kept: 2.5 kB each, 4.6 kB for edits
    first_rows: int = 4096  # rows rendered a chunk a step at the start, before `reuse` holds

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("capacity", stream.CHUNK), ("first_rows", 1)):
            if getattr(self, name) < least:
                raise InputError(f"train: --{name.replace('_', '-')} must be at least {least}")
        if not self.reuse > 0:
            raise InputError("train: --reuse must be above 0")
        if self.first_rows > self.capacity:
            raise InputError(f"train: --first-rows {self.first_rows} does not fit into --capacity {self.capacity}")


def add_options(part: argparse.ArgumentParser) -> None:
    """The fields of FeedConfig as options."""
    defaults = FeedConfig()
    part.add_argument("--workers", type=int, default=defaults.workers, help="processes that render; 0: this one does")
    part.add_argument("--reuse", type=float, default=defaults.reuse, help="pictures trained on for each new row")
    part.add_argument("--capacity", type=int, default=defaults.capacity, help="rows kept in memory and checkpoint")
    part.add_argument("--first-rows", type=int, default=defaults.first_rows, help="rows that are rendered first")


def feed_config(options: argparse.Namespace) -> FeedConfig:
    """The FeedConfig of the options."""
    return FeedConfig(options.workers, options.reuse, options.capacity, options.first_rows)


class Feed:
    """Draws of rows of `part` ("t2i", "ip2p"), pictures of `size` pixels; a context manager that ends its workers.

    Its state is part of a Trainer's checkpoint: the rows kept, and the number of the next chunk, so that a run that was
    resumed sees no chunk twice.
    """

    def __init__(self, part: str, encoder: Encoder, size: int, seed: int, config: FeedConfig) -> None:
        self.part, self.encoder, self.size, self.seed, self.config = part, encoder, size, seed, config
        self.store, self.owed, self.next = Store(config.capacity), 0.0, 0
        self._stream: stream.Stream | None = None
        self._busy, self._since = 0.0, time.monotonic()

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        """Draw `batch` rows; new ones are made first, if it is their turn. With workers it waits only at the start."""
        source, config = self._opened(), self.config
        if len(self.store) < config.first_rows:
            self._take(source, WAIT_SECONDS)
            while not len(self.store):
                self._take(source, WAIT_SECONDS)
        else:
            self.owed += batch / config.reuse
            while self.owed >= stream.CHUNK and self._take(source):
                self.owed -= stream.CHUNK
            self.owed = min(self.owed, QUEUED * stream.CHUNK)  # slow workers do not run up a debt
        return self.store.draw(batch, generator)

    def _take(self, source: stream.Stream, seconds: float = 0.0) -> bool:
        """Store the next chunk; False where there is none yet."""
        started = time.monotonic()
        found = source.take(1, seconds)
        for _, rows in found:
            self.store.add(self.encoder(rows))
        self.next = source.next
        self._busy += time.monotonic() - started
        return bool(found)

    def facts(self) -> dict[str, float]:
        """Rows made so far, and the share of the time since the last call that this process spent on them."""
        now = time.monotonic()
        found = {"rows": self.store.written, "rows_share": self._busy / max(now - self._since, 1e-9)}
        self._busy, self._since = 0.0, now
        return found

    def _opened(self) -> stream.Stream:
        """The stream, opened at the first draw: only then it is known where a resumed run goes on."""
        if self._stream is None:
            config, waiting = self.config, QUEUED * max(self.config.workers, 1)
            self._stream = stream.Stream(
                self.part, config.workers, self.seed, size=self.size, first=self.next, waiting=waiting
            )
        return self._stream

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stream:
            self._stream.__exit__(*exception)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` restores."""
        return {"next": self.next, "owed": self.owed, "store": self.store.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was made."""
        self.next, self.owed = state["next"], state["owed"]
        self.store.load_state_dict(state["store"])
