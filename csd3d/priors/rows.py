"""The rows of one prediction, divided over threads and over processes, to the same bytes for any number of them.

The parts depend on the number of rows alone (`threads.divided`), since the last bits of a network's answer depend on
how many rows it is given together. Who computes a part makes no difference.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from csd3d.priors.alterations import has_lora, is_hooked
from csd3d.priors.condition import Condition
from csd3d.threads import divided, in_threads

if TYPE_CHECKING:
    from csd3d.priors.prior import Prior

Part = tuple[Tensor, Tensor, Condition]  # z_t, t, the condition


def predict_rows(prior: "Prior", z_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
    """The predictions of all rows, in parts.

    While a method has LoRA weights in the network, this process computes everything, as the others do not have them.
    While it has changed the attention, a call has as many rows as `micro_batch` allows, because rows see one another.
    """
    network = prior.unet  # it may be opened only now
    hooked = is_hooked(prior.parts)
    on_cpu, others = prior.device.type == "cpu", prior.team
    if hooked:
        rows = [slice(i, i + prior.micro_batch) for i in range(0, len(z_t), prior.micro_batch)]
    elif on_cpu:
        rows = divided(len(z_t), prior.micro_batch)
    else:  # a GPU takes more rows at once, and its results differ in last bits anyway
        size = min(prior.micro_batch, -(-len(z_t) // (1 if others is None else others.count)))
        rows = [slice(i, i + size) for i in range(0, len(z_t), size)]
    parts = [(z_t[part], t[part], condition[part]) for part in rows]
    if hooked:
        return [prior.predict_part(*part) for part in parts]
    if others is None or has_lora(network):
        return compute(prior, parts)
    return others.predict(prior, parts)


def compute(prior: "Prior", parts: list[Part]) -> list[Tensor]:
    """The prediction of each part, in this process."""
    if prior.exported is not None or prior.device.type != "cpu":
        return [prior.predict_part(*part) for part in parts]  # a runtime has threads of its own
    return in_threads(lambda part: prior.predict_part(*part), parts)
