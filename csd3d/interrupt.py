"""Ctrl+C: the first asks a run to finish with what there is, the second ends it at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any

MESSAGE = b"\nStopping: finishing with what there is (Ctrl+C again aborts at once)\n"


class StopRequest:
    """`with StopRequest() as stop: ... if stop.requested: break`; catches SIGINT while open, in the main thread.

    `StopRequest(signal.SIGINT, signal.SIGTERM)` catches these two.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self.requested = False
        self._signals = signals or (signal.SIGINT,)
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, MESSAGE)  # not print, which the signal may have interrupted
