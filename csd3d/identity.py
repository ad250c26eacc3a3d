"""What a run's result depends on, by dotted key, and how two records of it differ.

A record is compared with that of a run made by another version of csd3d, which may have other keys. A key that one of
the two lacks counts as unchanged where the other has its default value there.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from csd3d.schema import Chosen, default_of, join, plain


class Place(NamedTuple):
    """Where a key stands, which says whether a record without it is of a run without that key.

    The record must have keys in the section `item`, which need not be in every record: an item of a list or of a
    mapping, or a section that is null by default. Or it has no part of `whole`, the list or mapping, which must have
    its default value then. "" is the top level, and no list or mapping.
    """

    item: str = ""
    whole: str = ""

    def fits(self, record: Collection[str]) -> bool:
        """Whether it is only for want of the key that the record lacks it."""
        absent = self.whole and self.whole not in record and not _within(record, self.whole)
        return bool(absent) or _within(record, self.item)


class Defining(dict[str, Any]):
    """{dotted key: value} of all that a result depends on; `places` of all keys; `usual`: those with their default."""

    def __init__(
        self,
        values: Mapping[str, Any] | None = None,
        places: Mapping[str, Place] | None = None,
        usual: Collection[str] = (),
    ) -> None:
        super().__init__(values or {})
        self.places, self.usual = dict(places or {}), set(usual)

    def __or__(self, other: Mapping[str, Any]) -> "Defining":
        more = other if isinstance(other, Defining) else Defining(other)
        return Defining({**self, **more}, self.places | more.places, (self.usual - more.keys()) | more.usual)

    def below(self, name: str) -> "Defining":
        """The same with `name` in front of every key."""
        places = {key: Place(*(part and join(name, part) for part in place)) for key, place in self.places.items()}
        values, places = ({join(name, key): x for key, x in found.items()} for found in (self, places))
        return Defining(values, places, {join(name, key) for key in self.usual})

    def without(self, sections: Collection[str]) -> "Defining":
        """The same without these keys of the top level and all below them."""
        values = {key: value for key, value in self.items() if key.partition(".")[0] not in sections}
        return Defining(values, {k: self.places[k] for k in values if k in self.places}, self.usual & values.keys())


def _within(record: Collection[str], section: str) -> bool:
    return not section or any(key.startswith((f"{section}.", f"{section}[")) for key in record)


# ------------------------------------------------------------------------------------------------------------- reading


def defining_values(config: Any, content: Callable[[str], str] = str) -> Defining:
    """Return {dotted key: value} of all fields that a result depends on: those not marked `identity: False`.

    Marked fields are the device, previews, and what is written at the end.  content: gives the value that stands for
    a `path_key`, such as the fingerprint of the file there.
    """
    found = Defining()
    for key, value, default, place, is_path in _leaves(config, dataclasses.MISSING, "", Place()):
        if _json(value) == _json(default):
            found.usual.add(key)
        found[key] = _json(content(value) if is_path and isinstance(value, str) else value)
        found.places[key] = place
    return found


def _json(value: Any) -> Any:
    return value if value is dataclasses.MISSING else json.loads(json.dumps(plain(value), default=str))


Leaf = tuple[str, Any, Any, Place, bool]  # key, value, its default or MISSING, place, whether it is a path


def _leaves(value: Any, default: Any, key: str, place: Place, is_path: bool = False) -> Iterator[Leaf]:
    """The values below `key`, each with its default: that of the section above, or else of its own class."""
    if isinstance(value, Chosen) and value.thing is not None:
        name, thing = (default.name, default.thing) if isinstance(default, Chosen) else (dataclasses.MISSING,) * 2
        yield join(key, "type"), value.name, name, place, False
        value, default = value.thing, thing
    if dataclasses.is_dataclass(value) and not isinstance(value, Chosen):
        if key and type(default) is not type(value):
            place = Place(key)
        yield from _of_section(value, default, key, place)
    elif isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, *_of_item(value, default, name, join(key, name), key))
    elif isinstance(value, (list, tuple)) and any(dataclasses.is_dataclass(item) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, *_of_item(value, default, number, f"{key}[{number}]", key))
    else:
        yield key, value, default, place, is_path


def _of_section(value: Any, default: Any, key: str, place: Place) -> Iterator[Leaf]:
    for field in dataclasses.fields(value):
        counts, item = field.metadata.get("identity", True), getattr(value, field.name)
        usual = getattr(default, field.name) if type(default) is type(value) else default_of(field)
        if callable(counts):
            item, usual = (None if x is dataclasses.MISSING else counts(x) for x in (item, usual))
            counts = item is not None
        if counts:
            yield from _leaves(item, usual, join(key, field.name), place, field.metadata.get("path", False))


def _of_item(value: Any, default: Any, name: Any, item: str, whole: str) -> tuple[Any, str, Place]:
    """The default, key and place of an item of a list or mapping: an item has a default only where all of them do."""
    usual = type(default) is type(value) and _json(default) == _json(value)
    return (default[name] if usual else dataclasses.MISSING), item, Place(item, whole if usual else "")


# ----------------------------------------------------------------------------------------------------------- comparing


class Difference(NamedTuple):
    """A key by which two records differ."""

    key: str
    unknown: bool = False  # one of the two versions of csd3d seems not to have the key at all


def difference(saved: Defining, wanted: Defining) -> Difference | None:
    """Return the key by which two records differ, None if by none; another value comes before a key that is new."""
    changed = sorted(key for key in saved.keys() & wanted.keys() if saved[key] != wanted[key])
    if changed:
        return Difference(changed[0])
    lacking = [(key, one, other) for one, other in ((saved, wanted), (wanted, saved)) for key in one.keys() - other]
    lacking = [parts for parts in sorted(lacking, key=lambda parts: parts[0]) if not _may_lack(*parts)]
    found = [Difference(key, _is_unknown(key, one, other)) for key, one, other in lacking]
    return min(found, key=lambda each: each.unknown, default=None)


def _may_lack(key: str, one: Defining, other: Defining) -> bool:
    return key in one.usual and one.places[key].fits(other)


def _is_unknown(key: str, one: Defining, other: Defining) -> bool:
    """Whether `other` lacks the key itself, and not the section that it is in."""
    if key in one.places:
        return one.places[key].fits(other)
    return not any(key.startswith((f"{above}.", f"{above}[")) for above in other)
