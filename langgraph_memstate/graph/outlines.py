"""Outlines: whether a list begins as another one did, found out at the speed of C.

Comparing messages takes a fraction of the time of encoding them. It is exact, or not done at all:

* What cannot change is the same where it is the very same object: readers and writers share the atoms of templates.
* Whatever else is the same as its template where both come to the same MessagePack, written by a packer that refuses
  what is not exactly of a type it knows. What is refused is encoded, and the bytes decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, compress
from operator import is_
from typing import Any

import ormsgpack

from langgraph_memstate.graph.templates import (
    MESSAGES,
    Message,
    Scalars,
    Template,
    copy_into,
    extra_of,
    fields_of,
    is_copyable,
    names_of,
    pack_changing,
    pack_exactly,
    private_of,
)


def is_same(items: Sequence[Any], template: Template) -> bool:
    """Whether a run of items is surely what the template stands for."""
    try:
        if isinstance(template, Message):
            return len(items) == 1 and _is_same_message(items[0], template)
        made: list[Any] = []
        copy_into(made, template)
        if list(map(type, items)) != list(map(type, made)) or pack_exactly(list(items)) != pack_exactly(made):
            return False
        return isinstance(template, Scalars) or not template.has_bytes or _is_exact(items[0])
    except ormsgpack.MsgpackEncodeError:
        return False


def _is_same_message(item: Any, template: Message) -> bool:
    if type(item) is not template.cls:  # first: of these classes, attributes and names run nobody's code
        return False
    fields, names, known = fields_of(item), names_of(item), template.fields
    if type(fields) is not dict or len(fields) != len(known):
        return False
    if type(names) is not set or names != template.names or not _are_texts((names,)):
        return False
    rest = extra_of(item), private_of(item)
    same = False
    if all(map(is_, fields, known)):
        changed = {name: value for name, value in fields.items() if value is not known[name]}
        same = pack_changing(changed, *rest) == template.changing
    if not same:
        made: list[Any] = []
        copy_into(made, template)
        ours = pack_changing(fields_of(made[0]), extra_of(made[0]), private_of(made[0]))
        same = pack_changing(fields, *rest) == ours
    return same and (not template.has_bytes or _is_exact(item))


class Outline:
    """What a list begins with, column by column."""

    def __init__(self) -> None:
        self.length = 0
        """items"""
        self._classes: list[type] = []
        self._plain: list[int] = []
        self._messages: list[int] = []
        self._templates: list[Message] = []
        self._names: list[frozenset[str]] = []
        # of the attributes of all messages
        self._keys: list[str] = []
        self._atoms: list[Any] = []
        self._is_atom = bytearray()
        self._is_container = bytearray()
        self._sizes: list[int] = []
        self._packed = tuple(bytearray() for _ in _columns((), (), ()))
        self._with_bytes: list[int] = []

    def add(self, template: Template) -> None:
        made: list[Any] = []
        copy_into(made, template)
        if isinstance(template, Message):
            self._messages.append(self.length)
            self._templates.append(template)
            self._names.append(_shared(frozenset(template.names)))
            self._add_columns(self._add_fields(template, fields_of(made[0])), made, ())
        else:
            self._plain += range(self.length, self.length + len(made))
            self._add_columns((), (), made)
        if not isinstance(template, Scalars) and template.has_bytes:
            self._with_bytes.append(self.length)
        self._classes += map(type, made)
        self.length = len(self._classes)

    def _add_columns(self, containers: Sequence[Any], found: Sequence[Any], plain: Sequence[Any]) -> None:
        for ours, more in zip(self._packed, _columns(containers, found, plain), strict=True):
            ours += more

    def _add_fields(self, template: Message, fields: dict[str, Any]) -> list[Any]:
        """Add the attributes of a message; returns the containers among them."""
        changing = {name for name, _ in template.containers}
        is_atom = bytes(name not in changing for name in fields)
        self._keys += fields
        self._atoms += compress(fields.values(), is_atom)
        self._is_atom += is_atom
        self._is_container += bytes(not each for each in is_atom)
        self._sizes.append(len(fields))
        return [fields[name] for name, _ in template.containers]

    def begins(self, items: Sequence[Any]) -> bool:
        """Whether a list surely begins with this."""
        items = items[: self.length]
        if list(map(type, items)) != self._classes:  # first: of these types, attributes and names run nobody's code
            return False
        found = items if not self._plain else [items[place] for place in self._messages]
        plain = items if not self._messages else [items[place] for place in self._plain]
        names, fields = list(map(names_of, found)), list(map(fields_of, found))
        if list(map(type, names)) != [set] * len(found) or names != self._names or not _are_texts(names):
            return False
        if list(map(type, fields)) != [dict] * len(found) or list(map(len, fields)) != self._sizes:
            return False
        values = list(chain.from_iterable(map(dict.values, fields)))
        try:
            columns = _columns(list(compress(values, self._is_container)), found, plain)
            return (
                self._has_atoms(fields, values)
                and all(map(_is_equal, columns, self._packed))
                and all(_is_exact(items[place]) for place in self._with_bytes)
            )
        except ormsgpack.MsgpackEncodeError:
            return False

    def _has_atoms(self, fields: Sequence[dict[str, Any]], values: Sequence[Any]) -> bool:
        """Whether messages have the attributes of the templates, but for what is in their containers."""
        keys = list(chain.from_iterable(fields))
        if all(map(is_, keys, self._keys)) and all(map(is_, compress(values, self._is_atom), self._atoms)):
            return True
        made: list[Any] = []
        for template in self._templates:
            copy_into(made, template)
        if _packed(fields) != _packed(list(map(fields_of, made))):
            return False
        self._keys, self._atoms = keys, list(compress(values, self._is_atom))  # the next list has these, as a rule
        return True


def _are_texts(names: Sequence[set[str]]) -> bool:
    return set(map(type, chain.from_iterable(names))) <= {str}


_shared = lru_cache(maxsize=1024)(frozenset[str])
"""The one of all equal sets that is compared with, and so in the processor's cache."""


def _columns(containers: Sequence[Any], found: Sequence[Any], plain: Sequence[Any]) -> Iterator[bytes]:
    """What can change of messages, then plain values, packed.

    Raises:
        MsgpackEncodeError: one is not exactly of a type that has a MessagePack.
    """
    yield _packed(containers)
    yield _packed(list(map(extra_of, found)))
    yield _packed(list(map(private_of, found)))
    yield _packed(plain)


def _packed(values: Sequence[Any]) -> bytes:
    """Values behind one another. Raises what `_columns` does."""
    if not values:
        return b""
    packed = pack_exactly(list(values))
    return packed[1 if len(values) < 16 else 3 if len(values) < 1 << 16 else 5 :]  # without the array's length


def _is_equal(packed: bytes, ours: bytearray) -> bool:
    return len(packed) == len(ours) and packed.startswith(ours)


def _is_exact(item: Any) -> bool:
    """Whether what looks like bytes is: other types come to the same MessagePack."""
    return is_copyable([fields_of(item), extra_of(item)] if type(item) in MESSAGES else item)
