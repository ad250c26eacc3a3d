"""Whether something has changed what a network computes since it was opened: LoRA, attention processors, hooks."""

from typing import Any

from torch import nn

Parts = list[tuple[nn.Module, Any]]


def parts_of(network: nn.Module) -> Parts:
    """The modules of a network with their attention processors, to compare with later."""
    return [(module, getattr(module, "processor", None)) for module in network.modules()]


def has_lora(network: nn.Module) -> bool:
    """Whether peft's LoRA weights act in a network."""
    if not getattr(network, "peft_config", None):
        return False
    switches = (getattr(module, "disable_adapters", None) for module in network.modules())
    return next((switch for switch in switches if isinstance(switch, bool)), True) is False  # peft sets all together


def is_hooked(parts: Parts) -> bool:
    """Whether modules have hooks, or attention processors that they did not have; their rows may depend on others."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
        or (processor is not None and module.processor is not processor)
        for module, processor in parts
    )


def is_altered(network: nn.Module, parts: Parts) -> bool:
    """Whether a network, whose `parts` were kept when it was opened, computes something else now."""
    return has_lora(network) or is_hooked(parts)
