"""Processes that torchrun started together, and the messages between them.

Rank 0 does the job; the others predict for it (`priors.team`). A message is named tensors in the bytes of a safetensors
file, sent by gloo over TCP, between any devices. An empty message says that rank 0 is still there.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from csd3d.errors import one_line
from csd3d.ranks import RankLost, rank

ANSWER = timedelta(minutes=20)  # in which a rank has opened its model, or computed its rows
SILENCE = timedelta(minutes=5)  # of rank 0, after which the others end
PULSE_S = 20.0  # between empty messages of rank 0
MAX_BYTES = 4 << 30  # of a message
GO_ON = "--resume RUN_DIR goes on from the last checkpoint, with any number of processes"


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Connect the processes while open; a process has the GPU of its number on its machine.

    torchrun ends all by SIGTERM when one has died. Ctrl+C is for rank 0, and only rank 0 logs.
    """
    import torch.distributed as dist

    if rank() == 0:
        signal.signal(signal.SIGTERM, _stopped)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        logging.disable()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank())) % torch.cuda.device_count())
    try:
        dist.init_process_group("gloo", timeout=ANSWER)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLost(f"rank {rank()}: the other ranks cannot be reached at {place} ({one_line(error)})") from None
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # of connections that are lost
            dist.destroy_process_group()


def _stopped(*_: object) -> None:
    os.write(2, f"error: rank 0: stopped by SIGTERM, as torchrun does when another rank has died; {GO_ON}\n".encode())
    os._exit(143)


def send(message: Mapping[str, Tensor], to: int) -> None:
    """Send named tensors to a rank; raises RankLost."""
    data = torch.frombuffer(bytearray(save(dict(message))), dtype=torch.uint8) if message else torch.empty(0)
    with _told(to):
        _wait("isend", torch.tensor([len(data)]), to, ANSWER)
        if len(data):
            _wait("isend", data, to, ANSWER)


def receive(source: int, patience: timedelta) -> dict[str, Tensor]:
    """The next message of a rank, {} for an empty one; raises RankLost after `patience`."""
    length = torch.zeros(1, dtype=torch.long)
    with _told(source):
        _wait("irecv", length, source, patience)
        if not 0 <= int(length) <= MAX_BYTES:
            raise RuntimeError(f"a message of {int(length)} bytes")
        if not int(length):
            return {}
        data = torch.empty(int(length), dtype=torch.uint8)
        _wait("irecv", data, source, ANSWER)
        return load(data.numpy().tobytes())


def _wait(operation: str, data: Tensor, other: int, patience: timedelta) -> None:
    import torch.distributed as dist

    getattr(dist, operation)(data, other).wait(patience)


@contextlib.contextmanager
def _told(other: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise RankLost(
            f"rank {rank()}: rank {other} does not answer any more, it ended or its machine is gone "
            f"({one_line(error, 120)}); {GO_ON}"
        ) from None


class Pulse:
    """Tells ranks now and then that this process is there; `lock` is held while other messages are sent."""

    def __init__(self, ranks: list[int]) -> None:
        self.lock, self._ranks, self._ended = threading.Lock(), ranks, threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def end(self) -> None:
        """Send no more."""
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(PULSE_S):
            with self.lock, contextlib.suppress(RankLost):  # the next prediction tells
                for each in self._ranks:
                    if not self._ended.is_set():
                        send({}, each)
