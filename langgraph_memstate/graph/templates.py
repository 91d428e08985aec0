"""Templates: private copies of decoded values, to copy again for a reader and to compare with what a writer brings.

Copying a message takes a tenth of the time of decoding it, and comparing it a thirtieth of that of encoding it. Both
are exact, or not done at all:

* A template is made of atoms, plain dictionaries and lists, and LangChain's messages, and of nothing else. Readers
  share the atoms, which cannot change, and no container.
* A value is *the same* as a template where every atom is equal and of the same type, and every container has the same
  type, length and order. Whatever else may be: it is encoded, and the bytes decide.
"""

from __future__ import annotations

import gc
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, is_, itemgetter
from types import NoneType
from typing import Any, NamedTuple

from langchain_core import messages
from pydantic import BaseModel

ATOMS = frozenset((str, int, float, bool, NoneType, bytes))
_MESSAGES = frozenset(
    (
        messages.AIMessage, messages.AIMessageChunk, messages.ChatMessage, messages.ChatMessageChunk,
        messages.FunctionMessage, messages.FunctionMessageChunk, messages.HumanMessage, messages.HumanMessageChunk,
        messages.RemoveMessage, messages.SystemMessage, messages.SystemMessageChunk, messages.ToolMessage,
        messages.ToolMessageChunk,
    )
)  # fmt: skip
_DEEPEST = 32  # containers in one another; what nests deeper is always encoded and decoded

_parts = attrgetter("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
_new = object.__new__
_slots = vars(BaseModel)
_set_fields: Callable[[Any, Any], None] = _slots["__dict__"].__set__
_set_names: Callable[[Any, Any], None] = _slots["__pydantic_fields_set__"].__set__
_set_extra: Callable[[Any, Any], None] = _slots["__pydantic_extra__"].__set__
_set_private: Callable[[Any, Any], None] = _slots["__pydantic_private__"].__set__


class Scalars(NamedTuple):
    """A run of atoms."""

    values: tuple[Any, ...]


class Whole(NamedTuple):
    """Any one value that can be copied."""

    value: Any


class FlatMessage(NamedTuple):
    """A message whose fields are texts, None, and containers that are empty: most are."""

    cls: type
    fields: dict[str, Any]
    empty: tuple[tuple[str, type], ...]
    names: set[str]
    extra: dict[str, Any] | None


Template = Scalars | Whole | FlatMessage


def template_of(items: list[Any]) -> Template | None:
    """A template of one item, or of a run of atoms; None where there can be none. It is the caller's to keep."""
    if all(type(item) in ATOMS for item in items):
        return Scalars(tuple(items))
    if len(items) != 1:
        return None
    return _flat(items[0]) or (Whole(copied(items[0])) if _is_copyable(items[0], _DEEPEST) else None)


def stands_for(template: Template, decoded: Any) -> bool:
    """Whether a copy of the template is exactly what decoding gave."""
    copies: list[Any] = []
    copy_into(copies, template)
    return _matches(copies, decoded)


def _flat(message: Any) -> FlatMessage | None:
    if type(message) not in _MESSAGES:
        return None
    fields, names, extra, private = _parts(message)
    if extra or private is not None or not _is_named(fields, names):
        return None
    empty = []
    for name, value in fields.items():
        kind = type(value)
        if kind is dict or kind is list:
            if value:
                return None
            empty.append((name, kind))
        elif kind is not str and value is not None:
            return None
    own = {**fields, **{name: kind() for name, kind in empty}}
    return FlatMessage(type(message), own, tuple(empty), set(names), None if extra is None else {})


def _is_copyable(value: Any, levels: int) -> bool:
    kind = type(value)
    if kind in ATOMS:
        return True
    if not levels:
        return False
    if kind is dict:
        return all(type(key) is str and _is_copyable(each, levels - 1) for key, each in value.items())
    if kind is list:
        return all(_is_copyable(each, levels - 1) for each in value)
    if kind not in _MESSAGES:
        return False
    fields, names, extra, private = _parts(value)
    return private is None and _is_named(fields, names) and _is_copyable([fields, extra], levels - 1)


def _is_named(fields: Any, names: Any) -> bool:
    return type(fields) is dict and type(names) is set and set(map(type, names)) <= {str}


# -- copying ----------------------------------------------------------------------------------------


def copied(value: Any) -> Any:
    """A copy of a copyable value that shares nothing with it that can change."""
    kind = type(value)
    if kind in ATOMS:
        return value
    if kind is dict:
        return {key: each if type(each) in ATOMS else copied(each) for key, each in value.items()}
    if kind is list:
        return [each if type(each) in ATOMS else copied(each) for each in value]
    fields, names, extra, _ = _parts(value)
    copy = _new(kind)
    _set_fields(copy, copied(fields))
    _set_names(copy, names.copy())
    _set_extra(copy, copied(extra))
    _set_private(copy, None)
    return copy


def copy_into(items: list[Any], template: Template) -> None:
    """Append what a template stands for."""
    if type(template) is FlatMessage:
        cls, flat, empty, names, extra = template
        fields = flat.copy()
        for name, kind in empty:
            fields[name] = kind()
        copy: Any = _new(cls)
        _set_fields(copy, fields)
        _set_names(copy, names.copy())
        _set_extra(copy, None if extra is None else {})
        _set_private(copy, None)
        items.append(copy)
    elif type(template) is Scalars:
        items.extend(template.values)
    else:
        items.append(copied(template[0]))


# -- comparing --------------------------------------------------------------------------------------


def is_same(items: Sequence[Any], template: Template) -> bool:
    """Whether a run of items is surely what the template stands for."""
    if type(template) is Scalars:
        return len(items) == len(template.values) and all(map(_equal_atoms, items, template.values))
    if len(items) != 1:
        return False
    if type(template) is FlatMessage:
        return _is_same_message(items[0], template)
    return _matches(items[0], template[0])


def _is_same_message(item: Any, template: FlatMessage) -> bool:
    if type(item) is not template.cls:
        return False
    fields, names, extra, private = _parts(item)
    return (
        type(fields) is dict
        and type(names) is set
        and type(extra) is type(template.extra)
        and private is None
        and list(map(type, fields.values())) == list(map(type, template.fields.values()))
        and _equal_names(list(fields), list(template.fields))
        and (fields, names, extra) == (template.fields, template.names, template.extra)
    )


def _equal_atoms(value: Any, atom: Any) -> bool:
    if value is atom:
        return True
    if type(value) is not type(atom):
        return False
    if type(atom) is float:
        return struct.pack("d", value) == struct.pack("d", atom)
    return bool(value == atom)


def _equal_names(names: list[Any], ours: list[str]) -> bool:
    return len(names) == len(ours) and (
        all(map(is_, names, ours)) or (set(map(type, names)) == {str} and names == ours)
    )


def _matches(value: Any, template: Any) -> bool:
    """Whether a value, which may be anything, is the same as a copyable one."""
    kind = type(template)
    if kind in ATOMS:
        return _equal_atoms(value, template)
    if type(value) is not kind:
        return False
    if kind is dict:
        return _equal_names(list(value), list(template)) and all(map(_matches, value.values(), template.values()))
    if kind is list:
        return len(value) == len(template) and all(map(_matches, value, template))
    if kind not in _MESSAGES:
        return False
    fields, names, extra, private = _parts(value)
    our_fields, our_names, our_extra, _ = _parts(template)
    return (
        private is None
        and type(names) is set
        and names == our_names
        and _matches(fields, our_fields)
        and _matches(extra, our_extra)
    )


class Outline:
    """What a list begins with, laid out so that another list is compared with it at the speed of C.

    The parts of all flat messages lie side by side. Types come first: what has the types of a template compares without
    running anybody's code.
    """

    def __init__(self) -> None:
        self.length = 0
        """items"""
        self._others: list[tuple[int, int, Template]] = []
        self._places: list[int] = []
        self._classes: list[type] = []
        self._parts: list[tuple[Any, ...]] = []
        self._part_types: list[type] = []
        self._names: list[str] = []
        self._types: list[type] = []

    def add(self, template: Template) -> None:
        end = self.length + (len(template.values) if type(template) is Scalars else 1)
        if type(template) is FlatMessage:
            parts = (template.fields, template.names, template.extra, None)
            self._places.append(self.length)
            self._classes.append(template.cls)
            self._parts.append(parts)
            self._part_types += map(type, parts)
            self._names += template.fields
            self._types += map(type, template.fields.values())
        else:
            self._others.append((self.length, end, template))
        self.length = end

    def begins(self, items: Sequence[Any]) -> bool:
        """Whether a list surely begins with this."""
        if len(items) < self.length:
            return False
        if not all(is_same(items[start:end], template) for start, end, template in self._others):
            return False
        return self._match(items[: self.length] if not self._others else [items[place] for place in self._places])

    def _match(self, items: Sequence[Any]) -> bool:
        if list(map(type, items)) != self._classes:
            return False
        parts = list(map(_parts, items))
        if list(map(type, chain.from_iterable(parts))) != self._part_types:
            return False
        fields = list(map(itemgetter(0), parts))
        if list(map(type, chain.from_iterable(map(dict.values, fields)))) != self._types:
            return False
        if not _equal_names(list(chain.from_iterable(fields)), self._names):
            return False
        return parts == self._parts


# -- allocating -------------------------------------------------------------------------------------

_pausing = threading.Lock()
_paused = 0
_resume = False


@contextmanager
def gc_paused() -> Iterator[None]:
    """No cyclic garbage collection while many objects are made: it would look at all of them, and they all stay."""
    global _paused, _resume
    with _pausing:
        if not _paused:
            _resume = gc.isenabled()
            gc.disable()
        _paused += 1
    try:
        yield
    finally:
        with _pausing:
            _paused -= 1
            if not _paused and _resume:
                gc.enable()
