"""The state of a loop as a tree: to tensors and JSON and back, and into the objects that it belongs to.

A tree has dicts, lists and tuples; its leaves are tensors, numbers and text. What is restored is checked first: a
checkpoint may have been changed by hand, and a tensor that is cast or broadcast would change the result unseen.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from csd3d.errors import InputError
from csd3d.optimisers import load_optimiser

NONE = object()  # a leaf that has no counterpart


def pack(tree: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split nested dicts, lists and tuples into (tensors by path, JSON-able state), which `unpack` joins again."""
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            while path in tensors:  # {"a/b": …, "a": {"b": …}}
                path += "+"
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"dict": [[key, encode(item, f"{path}/{key}" if path else str(key))] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [encode(item, f"{path}/{i}") for i, item in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{path}: a checkpoint holds tensors, numbers and text, not {type(value).__name__}")

    return tensors, {"tree": encode(tree, "")}


def unpack(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Any:
    """Return the tree that was packed."""

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, items),) = value.items()
        if kind == "tensor":
            return tensors[items]
        if kind == "dict":
            return {key: decode(item) for key, item in items}
        return [decode(item) for item in items] if kind == "list" else tuple(decode(item) for item in items)

    try:
        return decode(state["tree"])
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"its state and tensors do not belong together ({error!r:.200}); resume from another checkpoint"
        ) from None


def snapshot(**objects: Any) -> dict[str, Any]:
    """Return {name: state} of torch.Generators and of anything with a state_dict."""
    return {name: o.get_state() if isinstance(o, torch.Generator) else o.state_dict() for name, o in objects.items()}


def restore(tree: Mapping[str, Any], **objects: Any) -> None:
    """Restore a snapshot in place; InputError names the part that does not fit, and the tensor in it."""
    for name, target in objects.items():
        with _named(name):
            check_alike(tree[name], snapshot(own=target)["own"])
            if isinstance(target, torch.Generator):
                target.set_state(tree[name])
            elif isinstance(target, torch.optim.Optimizer):
                load_optimiser(target, tree[name])
            else:
                target.load_state_dict(tree[name])


def check_alike(saved: Any, own: Any, path: str = "") -> None:
    """Raise ValueError, with the path, where a saved tree cannot take the place of one's own; shapes may differ.

    Tensors must be finite, and of numbers of the same kind (floating or the same integers); so must numbers and text.
    Where a value of one's own is not finite, the saved one need not be.
    """
    if isinstance(saved, Tensor):
        _check_tensor(saved, own, path)
        return
    if isinstance(own, (Mapping, list, tuple, Tensor, str, bool)):
        kind = Mapping if isinstance(own, Mapping) else (list, tuple) if isinstance(own, (list, tuple)) else type(own)
        if not isinstance(saved, kind):
            raise ValueError(f"{path}: is a {type(saved).__name__}, expected a {type(own).__name__}")
    elif isinstance(own, (int, float)) and not _is_like(saved, own):
        raise ValueError(f"{path}: is {saved!r:.40}, expected a number")
    if isinstance(saved, Mapping):
        for key, item in saved.items():
            check_alike(item, own.get(key, NONE) if isinstance(own, Mapping) else NONE, _below(path, key))
    elif isinstance(saved, (list, tuple)):
        for i, item in enumerate(saved):
            fresh = own[i] if isinstance(own, (list, tuple)) and i < len(own) else NONE
            check_alike(item, fresh, _below(path, i))


def _is_like(saved: Any, own: float) -> bool:
    return type(saved) in (int, float) and (abs(saved) < 1e300 or not math.isfinite(own))


def _below(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def _check_tensor(saved: Tensor, own: Any, path: str) -> None:
    if own is not NONE and own is not None:
        if not isinstance(own, Tensor):
            raise ValueError(f"{path}: is a tensor, expected a {type(own).__name__}")
        same = saved.is_floating_point() if own.is_floating_point() else saved.dtype == own.dtype
        if not same:
            raise ValueError(f"{path}: is of {saved.dtype}, expected {own.dtype}")
    if not is_finite(saved) and not (isinstance(own, Tensor) and not is_finite(own)):
        raise ValueError(f"{path}: has values that are not finite")


def is_finite(x: Tensor) -> bool:
    """Whether no value is infinite or NaN."""
    if not (x.is_floating_point() or x.is_complex()) or not x.numel():
        return True
    if x.is_complex() or x.element_size() == 1:  # which have no order, and few operations
        return bool(torch.isfinite(x.to(torch.complex64) if x.is_complex() else x.float()).all())
    return all(math.isfinite(end.item()) for end in x.aminmax())


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
        detail = " ".join(str(error).split()).removeprefix(": ")  # of what has no parts
        raise InputError(
            f"{name}: does not fit this run ({detail[:300]}); resume with the config it was saved with, or from "
            "another checkpoint"
        ) from None
