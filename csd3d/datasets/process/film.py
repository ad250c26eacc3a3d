"""A film as frames for frames.py, in two passes of ffmpeg: all frames in small, then the chosen ones.

Colours, transparency and turned films are treated as where videos are edited (csd3d.media); pixels become square.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from csd3d.datasets.images import MAX_PIXELS
from csd3d.datasets.process.photos import LEAST_SIDE, MAX_SIDE
from csd3d.errors import InputError
from csd3d.media.decoding import Decoder, check_end, early_end, fault_in, film_input, over_white, picture_output
from csd3d.media.ffmpeg import command
from csd3d.media.probe import probe
from csd3d.media.refusals import CONTAINERS, check_film, nothing_found
from csd3d.media.videos import TRANSPARENT

EXPECTED = f"a film ({CONTAINERS}) or a folder of photos"
MAX_LOOKED_AT = 100_000  # frames


class Film:
    """The film `path`; `notes` say what is out of the ordinary, and are told when they are found.

    Raises InputError for what is no film, more than `MAX_LOOKED_AT` frames, and an ffmpeg that is killed. A film that
    breaks off ends there.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        check_film(path, EXPECTED)
        self.path, self.tell, self.notes = path, tell, []
        self._probe = probe(path, MAX_PIXELS)
        if self._probe.colour_note:
            self._note(self._probe.colour_note)

    def in_small(self, side: int) -> Iterator[np.ndarray]:
        """Every frame, no side over `side`: [H, W] uint8, grey."""
        small = dataclasses.replace(self._probe, odd=True)  # whatever the sides, once they are shrunk
        for count, frame in enumerate(self._decoded([*self._shrink(side), *small.filters], "gray"), 1):
            if count > MAX_LOOKED_AT:
                raise InputError(f"{self.path}: more than {MAX_LOOKED_AT} frames; cut it")
            if count % 500 == 0:
                self.tell(f"looking for sharp frames: {count} seen")
            if min(frame.shape[:2]) < LEAST_SIDE:
                size = f"{frame.shape[1]}x{frame.shape[0]} pixels, with no side over {side}"
                raise InputError(f"{self.path}: frames of {size}; expected at least {LEAST_SIDE} a side")
            yield frame[:, :, 0] if frame.shape[2] == 1 else cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)

    def chosen(self, numbers: list[int]) -> Iterator[np.ndarray]:
        """The frames `numbers`, in ascending order, no side over `MAX_SIDE`: [H, W, 3] uint8."""
        wanted = "+".join(f"eq(n,{i})" for i in numbers)
        frames = self._decoded([f"select='{wanted}'", *self._probe.filters, *self._shrink(MAX_SIDE)], "rgb24")
        done = 0
        for _, frame in zip(numbers, frames, strict=False):
            yield frame
            done += 1
        frames.close()
        if done < len(numbers):
            raise InputError(f"{self.path}: only {done} of {len(numbers)} chosen frames were decoded again; try again")

    def origin(self, number: int) -> int:
        return number

    def focal(self, _number: int, _size: tuple[int, int]) -> None:
        """None: films do not tell their focal length."""

    def _shrink(self, side: int) -> list[str]:
        aspect = self._probe.pixel_aspect
        square = [] if aspect == 1 else [f"scale=w='max(1,round(iw*{aspect}))':h=ih:flags=area,setsar=1"]
        fit = f"scale=w='min({side},iw)':h='min({side},ih)':force_original_aspect_ratio=decrease:flags=area"
        return [*square, fit]

    def _decoded(self, filters: list[str], pixels: str) -> Iterator[np.ndarray]:
        """The frames through ffmpeg's `filters`, [H, W, 1 | 3] uint8, upright, over white."""
        opened, output = film_input(self.path, self._probe, MAX_PIXELS), picture_output(self._probe, filters, pixels)
        count = 0
        with Decoder(command(*opened, *output)) as decoder:
            for frame in decoder.pictures():
                count += 1
                if frame.shape[2] == 4:
                    if frame[:, :, 3].min() < 255:
                        self._note(TRANSPARENT)
                    frame = over_white(frame)
                yield frame
            ended = decoder.end()
        check_end(self.path, ended, count)
        fault = fault_in(ended)
        if count == 0:
            raise nothing_found(self.path, ended.log, fault, EXPECTED, None)
        if fault and not any("ends early" in note for note in self.notes):
            self._note(early_end(fault, count))

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            self.tell(f"{self.path}: {note}")
