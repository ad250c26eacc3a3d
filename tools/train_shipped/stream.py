"""Make training rows during training: random scenes are rendered, by worker processes or between two steps.

Rows are a dict: `pictures` [n,S,S,3] uint8, for edits also `sources`; `texts`, the same number of sentences for each;
`camera` [n,3] float32: azimuth from the object's front, elevation in degrees, distance; `patterned` [n] bool.
Row i of the held-out ones is the same in every run.
"""

import itertools
import os
import queue
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING

import numpy as np
import torch

from csd3d.world.language import FAMILIES, Edit, caption, contrast, sample_edit
from csd3d.world.pairs import FOV_DEG, View, sample_scene, to_bytes
from csd3d.world.prompts import loosen
from csd3d.world.render import render
from csd3d.world.scene import COLOURS, PATTERNS, Scene
from custom_kernels.native import require_library

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

Rows = dict[str, np.ndarray | list[list[str]]]

CHUNK = 64  # rows per item of the queue
WAITING = 2000  # largest number of waiting chunks: 6 GB of pictures
CAPTIONS = 4  # per picture; a fifth one says that it is blurred
LOOSENED = ("colour", "pattern_colour", "backdrop", "facing")
BLURRY = "blurry"
PATTERNED, PLATED = 0.6, 0.5  # shares of the scenes
SAID_PLATE, SAID_VIEW, LOOSE = 0.8, 0.6, 0.25  # shares of the captions
BOOST = {"pattern": 2.5, "any pattern": 2.5}  # families that are learned last are drawn more often


def training_scene(rng: random.Random, patterned: float = PATTERNED) -> Scene:
    """`sample_scene`, but a share `patterned` has a pattern (not 0.3) and only a share `PLATED` stands on a plate."""
    scene = sample_scene(rng)
    if scene.pattern == "plain" and rng.random() < (patterned - 0.3) / 0.7:
        others = [colour for colour in COLOURS if colour != scene.colour]
        other = contrast(scene.colour) if rng.random() < 0.4 else rng.choice(others)
        scene = replace(scene, pattern=rng.choice(PATTERNS[1:]), pattern_colour=other)
    return replace(scene, plate=rng.random() < PLATED)


def training_view(rng: random.Random) -> View:
    """A random camera from a range that covers text to 3D (`csd3d.guidance.views`)."""
    target = tuple(rng.uniform(-0.06, 0.06) for _ in range(3))
    return View(rng.uniform(0, 360), rng.uniform(0, 70), rng.uniform(3.6, 4.4), FOV_DEG, target)


def some_caption(scene: Scene, view: View, rng: random.Random) -> str:
    """A caption that mentions view, plate and other attributes with the probabilities above."""
    azimuth = view.azimuth_deg if rng.random() < SAID_VIEW else None
    text = caption(scene, azimuth, view.elevation_deg, plate=rng.random() < SAID_PLATE)
    return loosen(text, LOOSENED, rng) if rng.random() < LOOSE else text


def captions_of(scene: Scene, view: View, rng: random.Random) -> list[str]:
    """`CAPTIONS` captions of one picture, and one for its blurred version."""
    texts = [some_caption(scene, view, rng) for _ in range(CAPTIONS)]
    return [*texts, BLURRY if rng.random() < 0.25 else f"{rng.choice(texts)}, {BLURRY}"]


def text_rows(rng: random.Random, size: int) -> Rows:
    """CHUNK pictures with captions."""
    drawn = [(training_scene(rng), training_view(rng)) for _ in range(CHUNK)]
    scenes, views = zip(*drawn, strict=True)
    texts = [captions_of(scene, view, rng) for scene, view in drawn]
    return {"pictures": _pictures(scenes, views, size), "texts": texts, **_facts(scenes, views)}


def training_edit(rng: random.Random) -> tuple[Scene, Edit]:
    """A random scene and an instruction for it, with the families of `BOOST` drawn more often."""
    weights = [family.weight * BOOST.get(name, 1.0) for name, family in FAMILIES.items()]
    while True:
        scene = training_scene(rng, patterned=0.3)
        edit = sample_edit(scene, rng, rng.choices(list(FAMILIES), weights)[0])
        if edit is not None:
            return scene, edit


def edit_rows(rng: random.Random, size: int) -> Rows:
    """CHUNK pairs: source, edited picture, and the texts: instruction and caption of the edited picture."""
    drawn = [(*training_edit(rng), training_view(rng)) for _ in range(CHUNK)]
    sources, edits, views = zip(*drawn, strict=True)
    targets = [rng.choice(edit.answers) for edit in edits]
    where = [(view.azimuth_deg, view.elevation_deg) for view in views]
    texts = [[e.instruction, caption(t, *w)] for e, t, w in zip(edits, targets, where, strict=True)]
    pictures = {"pictures": _pictures(targets, views, size), "sources": _pictures(sources, views, size)}
    return {**pictures, "texts": texts, **_facts(targets, views)}


def _pictures(scenes: Sequence[Scene], views: Sequence[View], size: int) -> np.ndarray:
    return to_bytes(render(scenes, np.stack([view.row(size) for view in views]), size, size).rgb)


def _facts(scenes: Sequence[Scene], views: Sequence[View]) -> Rows:
    cameras = [(v.azimuth_deg - s.azimuth_deg, v.elevation_deg, v.distance) for s, v in zip(scenes, views, strict=True)]
    patterned = [scene.pattern != "plain" for scene in scenes]
    return {"camera": np.array(cameras, np.float32), "patterned": np.array(patterned)}


MAKERS = {"t2i": text_rows, "ip2p": edit_rows}


class Stream:
    """A source of chunks of rows: worker processes and the queue they fill; a context manager that ends them.

    Each worker renders its share of `held_out` chunks first, then those numbered from `first` on, without end. At most
    `waiting` chunks wait. With no workers `take` renders in this process: a machine with one core to spare loses
    nothing, and the order of rows is the same in every run. Workers die with this process, however it ends, and leave
    Ctrl+C and SIGTERM to it. Raises RuntimeError where the compiled kernels are missing: without them a picture takes
    seconds.
    """

    def __init__(
        self,
        part: str,
        workers: int,
        seed: int = 0,
        held_out: int = 0,
        size: int = 128,
        first: int = 0,
        waiting: int = WAITING,
    ) -> None:
        require_library()
        self.next = first  # the number of the first chunk that was not taken, nor any after it
        self._here = None if workers else _chunks(part, 0, 1, seed, held_out, size, first)
        context = get_context("spawn")
        self._queue = None if self._here else context.Queue(waiting)
        share = [(self._queue, part, worker, workers, seed, held_out, size, first) for worker in range(workers)]
        self._workers = [context.Process(target=_work, args=arguments, daemon=True) for arguments in share]
        for worker in self._workers:
            worker.start()

    def take(self, most: int, seconds: float = 0.0) -> list[tuple[int | None, Rows]]:
        """Up to `most` chunks (number, None for held-out ones; rows), waiting up to `seconds` for the first.

        Raises RuntimeError where there is none and no worker is left that could make one.
        """
        found = list(itertools.islice(self._here, most)) if self._here else self._waiting(most, seconds)
        self.next = max([self.next, *(number + 1 for number, _ in found if number is not None)])
        return found

    def _waiting(self, most: int, seconds: float) -> list[tuple[int | None, Rows]]:
        found = []
        try:
            while len(found) < most:
                found.append(self._queue.get(timeout=seconds) if seconds and not found else self._queue.get_nowait())
        except queue.Empty:
            if not found and not self.alive:
                raise RuntimeError("every worker has ended; see what they printed above") from None
        return found

    @property
    def alive(self) -> int:
        """The number of running workers."""
        return sum(worker.is_alive() for worker in self._workers)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.kill()  # they ignore SIGTERM


def held_out_rows(part: str, chunk: int, size: int) -> Rows:
    """Held-out chunk number `chunk`, the same in every run."""
    return MAKERS[part](random.Random(f"held out/{chunk}"), size)


def _chunks(
    part: str, worker: int, workers: int, seed: int, held_out: int, size: int, first: int
) -> Iterator[tuple[int | None, Rows]]:
    """The chunks of one worker; a chunk's number over all workers is its seed."""
    for chunk in range(worker, held_out, workers):
        yield None, held_out_rows(part, chunk, size)
    for chunk in itertools.count(first + worker, workers):
        yield chunk, MAKERS[part](random.Random(f"{seed}/{chunk}"), size)


def _work(out: "Queue", *share: object) -> None:
    """Body of one worker process."""
    for ending in (signal.SIGINT, signal.SIGTERM):  # a whole process group gets these; the parent decides
        signal.signal(ending, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(5)  # training has priority
    torch.set_num_threads(1)  # the compiled kernels follow this too
    for chunk in _chunks(*share):
        out.put(chunk)


def _end_with_parent() -> None:
    """End this process when its parent has ended: one killed by SIGKILL could not have ended it."""
    parent_process().join()
    os._exit(1)
