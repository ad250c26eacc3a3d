"""Tools of `benchmarks.gpu_check`: sections with a time limit; measurements of time, memory and host waits."""

import contextlib
import json
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from csd3d.files import write_text

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


@dataclass
class Check:
    """A run of the check: its folders, its deadline, and its results so far."""

    out: Path
    work: Path
    device: str
    rehearse: bool
    deadline: float
    found: dict = field(default_factory=dict)
    model: Path | None = None  # the full-size editing model, once built

    @property
    def left(self) -> float:
        """Seconds left before the deadline."""
        return self.deadline - time.monotonic()

    def write(self) -> None:
        """Write gpu-check.json, atomically."""
        write_text(self.out / "gpu-check.json", json.dumps(self.found, indent=2, default=str) + "\n")

    def section(self, name: str, run: Callable[["Check"], dict], expected: float) -> None:
        """Run a section if there is time, for at most three times as long as expected; record its result or error."""
        if self.left < expected:
            self.found[name] = {"skipped": f"{self.left:.0f} s left, about {expected:.0f} s wanted"}
            return self.write()
        print(f"== {name} ({self.left:.0f} s left)", flush=True)
        started = time.monotonic()
        reset_peak(self.device)
        try:
            with at_most(min(self.left, 3 * expected if not self.rehearse else 600)):
                result = run(self)
        except Exception as error:
            lines = traceback.format_exc().strip().splitlines()
            result = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": lines[-14:]}
            print("\n".join(lines[-6:]), flush=True)
        self.found[name] = result | {"took_s": time.monotonic() - started, **peak(self.device)}
        self.write()
        if self.device == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body after so many seconds, at the next Python instruction."""

    def end(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def synchronise(device: str) -> None:
    """Wait until the device has finished all work."""
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    """Free the cache and start measuring peak memory anew."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> dict[str, float]:
    """Return the peak of allocated and reserved memory since `reset_peak`."""
    if device != "cuda":
        return {}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


def tried(run: Callable[[], dict], error: type[Exception] = Exception) -> dict:
    """Return the result of a part of a section, or its error, so that the rest of the section still runs."""
    try:
        return run()
    except error as problem:
        return {"error": f"{type(problem).__name__}: {problem}"[:300]}


def milliseconds(device: str, run: Callable[[], object], times: int = 5, warm: int = 2) -> float:
    """Return the mean time of a call, after `warm` calls that are not counted."""
    for _ in range(warm):
        run()
    synchronise(device)
    started = time.perf_counter()
    for _ in range(times):
        run()
    synchronise(device)
    return 1000 * (time.perf_counter() - started) / times


@contextlib.contextmanager
def counted_waits(device: str) -> Iterator[Counter]:
    """Count the operations that make the host wait for the GPU, by line of Python."""
    found: Counter = Counter()
    if device != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroni" in str(warning.message) and "prototype" not in str(warning.message):
            found[f"{warning.filename.removeprefix(str(ROOT) + '/')}:{warning.lineno}"] += 1


def difference(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Return the largest difference of two tensors on any devices, and the largest magnitude of `b`."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return {"max_abs": (a - b).abs().max().item(), "scale": b.abs().max().item()}
