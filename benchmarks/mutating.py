"""Random damage to files, for benchmarks/mutations.py: to values of JSON and YAML, and to bytes of anything."""

import contextlib
import json
import random
from collections.abc import Iterator
from typing import Any

import yaml

VALUES = [None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, -1e-320, float("nan"), float("inf"), "", "x", "~"]
VALUES += ["../../x", "/dev/zero", "a" * 300, "\0", "${a}", "é\ud800", [], {}, [[]], [0.5] * 3, {"a": 1}, "/"]
VALUES += ["~nobody/x", "csd", {"type": "x"}, [[[[1]]]], "1e5", 1e-9, 65536, -0.5]
TOKENS = [b"{", b"[" * 300, b"]", b": ", b"!!bool x", b"!!timestamp 1", b"&a", b"*a", b"\0", b"\xff", b"-", b"1e999"]
TOKENS += [b"!!python/object:os.system", b"<<: *a", b"- " * 200, b'"', b"${seed}", b"\t", b"9" * 400, b"null", b"\n"]
Mutation = tuple[int, float, float, int]  # what it does, and three numbers that say where and with what


def draw(chance: random.Random) -> list[Mutation]:
    """Draw one to four mutations."""
    count = chance.choice((1, 1, 1, 2, 4))
    return [(chance.randrange(8), chance.random(), chance.random(), chance.randrange(10_000)) for _ in range(count)]


def mutate(data: bytes, mutations: list[Mutation], name: str) -> bytes:
    """Apply mutations, in the structure of JSON and YAML for half of them, else to bytes."""
    for kind, where, size, what in mutations:
        tree = _parse(data, name) if kind < 4 else None
        data = _change_tree(tree, where, what) if tree is not None else _change_bytes(data, kind, where, size, what)
    return data


def _parse(data: bytes, name: str) -> Any:
    with contextlib.suppress(Exception):
        return yaml.safe_load(data) if name.endswith(".yaml") else json.loads(data)
    return None


def _change_tree(tree: Any, where: float, what: int) -> bytes:
    places = list(_places(tree))
    if places:
        parent, key = places[int(where * len(places))]
        if what % 7 == 0 and isinstance(parent, dict):
            parent[str(key) + "x"] = parent.pop(key)
        elif what % 7 == 1:
            del parent[key]
        else:
            parent[key] = VALUES[what % len(VALUES)]
    return json.dumps(tree).encode()  # which is YAML too


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (parent, key) of every value of a tree."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in items:
        yield tree, key
        yield from _places(value)


def _change_bytes(data: bytes, kind: int, where: float, size: float, what: int) -> bytes:
    head = kind % 2 and len(data) > 400  # headers are more interesting than pixels
    at = int(where * (300 if head else len(data)))
    length = 1 + int(size**4 * len(data) / 4)
    part = data[at : at + length]
    changed = [
        lambda: data[:at] + bytes([data[at] ^ 1 << what % 8]) + data[at + 1 :] if at < len(data) else data,
        lambda: data[:at] + bytes([what % 256]) * min(length, 4) + data[at + min(length, 4) :],
        lambda: data[:at] + data[at + length :],
        lambda: data[:at] + part + data[at:],
        lambda: data[:at] + TOKENS[what % len(TOKENS)] + data[at:],
        lambda: data[:at],
        lambda: data[:at] + what.to_bytes(4, "big") + data[at + 4 :],
        lambda: data[:at] + bytes(b ^ 0xFF for b in part[:64]) + data[at + min(length, 64) :],
    ]
    return changed[(kind + what) % len(changed)]()
