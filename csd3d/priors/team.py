"""Several processes that predict together: rank 0 divides the rows, the others answer. Started by torchrun.

    torchrun --nproc-per-node 4 launch.py --config configs/csd-edit-scene.yaml

Only rank 0 has the job's state. Nothing else is computed twice, so nothing can drift apart. All answers come back to
it, in the order of the rows: what follows, such as SVGD's kernel, is the same as with one process.
"""

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from csd3d import __version__, ranks
from csd3d.errors import InputError
from csd3d.priors import messages
from csd3d.priors.condition import Condition
from csd3d.priors.rows import Part, compute

if TYPE_CHECKING:
    from csd3d.priors.prior import Prior

END = {"end": torch.zeros(1)}


class Team:
    """Rank 0's side: the other processes, each with the same model open."""

    def __init__(self, model: str, way: str = "") -> None:
        """Meet the others, which have to have opened the same, else InputError.

        model: the fingerprint of the weights; way: see `way_of`.
        """
        self.count = ranks.count()
        self._others = list(range(1, self.count))
        self._pulse = messages.Pulse(self._others)
        for other in self._others:
            told = json.loads(bytes(messages.receive(other, messages.ANSWER)["hello"].tolist()))
            if told["error"]:
                raise InputError(f"rank {other} on {told['host']}: {told['error']}")
            for name, own in identity(model, way).items():
                if told[name] != own:
                    raise InputError(f"rank {other} on {told['host']}: {name}: not the same as rank 0's; install alike")

    def predict(self, prior: "Prior", parts: list[Part]) -> list[Tensor]:
        """The prediction of each part; part i is computed by rank i modulo their number. Raises RankLost."""
        shares = {other: parts[other :: self.count] for other in self._others}
        busy = [other for other in self._others if shares[other]]
        with self._pulse.lock:
            for other in busy:
                messages.send(packed(shares[other]), other)
        found: list[Tensor | None] = [None] * len(parts)
        found[:: self.count] = compute(prior, parts[:: self.count])
        for other in busy:
            answers = messages.receive(other, messages.ANSWER)
            found[other :: self.count] = [answers[str(i)].to(prior.device) for i in range(len(shares[other]))]
        return found

    def end(self) -> None:
        """Let the other processes end."""
        self._pulse.end()
        with self._pulse.lock:
            for other in self._others:
                with contextlib.suppress(ranks.RankLost):
                    messages.send(END, other)


def hello(model: str = "", way: str = "", error: str = "") -> None:
    """Tell rank 0 that this process has opened a model, or why it could not."""
    told = {"error": error, "host": socket.gethostname()} | identity(model, way)
    messages.send({"hello": torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)}, 0)


def identity(model: str, way: str) -> dict[str, str]:
    """What must be the same in all processes, or rows would differ by who computes them."""
    return {"version of csd3d": __version__, "torch": torch.__version__, "prior.model": model, "how prior runs": way}


def way_of(prior: "Prior") -> str:
    """The device and the settings of a prior that its results depend on; "" for an exact prior, which has none."""
    if (options := getattr(prior, "options", None)) is None:
        return ""
    names = ("dtype", "weights", "quantise", "runtime", "compile", "distilled_guidance")
    return f"{prior.device.type} {[str(getattr(options, name)) for name in names]}"


@torch.no_grad()
def serve(prior: "Prior") -> None:
    """Compute what rank 0 asks for until it has no more to ask. Raises RankLost when it is gone."""
    if release := getattr(prior, "release_text_encoder", None):  # an exact prior has none, and asks for nothing
        release()
    for message in _asked():
        parts = [
            (z_t.to(prior.device), t.to(prior.device), condition.to(prior.device))
            for z_t, t, condition in unpacked(message)
        ]
        answers = compute(prior, parts)
        messages.send({str(i): answer.contiguous().cpu() for i, answer in enumerate(answers)}, 0)


def _asked() -> Iterator[dict[str, Tensor]]:
    while "end" not in (message := messages.receive(0, messages.SILENCE)):
        if message:
            yield message


def packed(parts: list[Part]) -> dict[str, Tensor]:
    """Parts as named tensors, on the CPU."""
    found: dict[str, Tensor] = {}
    for i, (z_t, t, condition) in enumerate(parts):
        tensors = {"z_t": z_t, "t": t} | {field.name: getattr(condition, field.name) for field in fields(condition)}
        for name, value in tensors.items():
            if value is not None:
                found[f"{i}/{name}"] = value.detach().cpu().contiguous().clone()
    return found


def unpacked(message: dict[str, Tensor]) -> list[Part]:
    """The parts of `packed`."""
    parts: list[Part] = []
    while f"{len(parts)}/z_t" in message:
        prefix = f"{len(parts)}/"
        own = {name.removeprefix(prefix): value for name, value in message.items() if name.startswith(prefix)}
        parts.append((own.pop("z_t"), own.pop("t"), Condition(**own)))
    return parts
