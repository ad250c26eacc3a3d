"""COLMAP in a process of its own, which may die of it.

COLMAP ends its process where it cannot write its database, as on a full disk, and the system ends one that takes too
much memory. The caller is then told in an InputError. The child ends when its caller does, in whatever way.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from csd3d.errors import InputError
from csd3d.media.ffmpeg import start

PROGRAM = "import sys; sys.path[:] = {path!r}; from csd3d.datasets.process.apart import serve; serve()"
FULL = ("disk is full", "disk I/O error", "No space left", "File too large")  # in what COLMAP writes before it dies


def call(function: Callable, *arguments: Any, tell: Callable[[str], None], folder: Path) -> Any:
    """Return `function(*arguments, told)` as computed by a child; what it tells with `told` goes on to `tell`.

    folder: where it writes, for the message. Raises the InputError, OSError, RuntimeError or ValueError that it raises,
    and an InputError if it dies.
    """
    program = [sys.executable, "-c", PROGRAM.format(path=sys.path)]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with start(program, **pipes) as child:
        log: list[bytes] = []
        reader = threading.Thread(target=lambda: log.append(child.stderr.read()), daemon=True)
        reader.start()
        try:
            pickle.dump((function, arguments), child.stdin)
            child.stdin.flush()  # and left open: its end tells the child that its caller is gone
            while True:
                kind, value = pickle.load(child.stdout)
                if kind == "told":
                    tell(value)
                elif kind == "raised":
                    raise value
                else:
                    return value
        except (EOFError, pickle.UnpicklingError, BrokenPipeError):
            child.wait()
            reader.join()
            raise InputError(_how_it_died(child.returncode, b"".join(log).decode(errors="replace"), folder)) from None
        finally:
            child.kill()


def serve() -> None:
    """Be the child: read a function and its arguments from stdin, and write to stdout what it tells and returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(kind: str, value: Any) -> None:
        pickle.dump((kind, value), answers)
        answers.flush()

    function, arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_caller, args=(sys.stdin.buffer,), daemon=True).start()
    try:
        answer("returned", function(*arguments, lambda line: answer("told", line)))
    except (InputError, OSError, RuntimeError, ValueError) as error:
        answer("raised", error)


def _end_with_caller(pipe: IO[bytes]) -> None:
    pipe.read()
    os._exit(1)


def _how_it_died(code: int, log: str, folder: Path) -> str:
    if any(text in log for text in FULL):
        return f"{folder}: cannot be written, the disk is full: free some space, or set TMPDIR to a folder elsewhere"
    if code == -signal.SIGKILL:
        return "COLMAP was killed, as the system does when memory runs out; try --frames with a smaller number"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith(("what():", "F2", "E2"))), lines[-1] if lines else "")
    return f"COLMAP ended with code {code}{said and f' ({said[:200]})'}; try again, or --frames with a smaller number"
