"""Templates: private copies of decoded values, to copy again for a reader and to compare with what a writer brings.

Copying a message takes a tenth of the time of decoding it, and comparing it a thirtieth of that of encoding it. Both
are exact, or not done at all:

* A template is made of atoms, plain dictionaries and lists, and LangChain's messages, and of nothing else. Readers
  share the atoms, which cannot change, and no container.
* A value is *the same* as a template where both come to the same MessagePack, written by a packer that refuses whatever
  is not exactly of a type it knows. What is refused is encoded, and the bytes decide.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import attrgetter
from types import NoneType
from typing import Any, NamedTuple

import ormsgpack
from langchain_core import messages

from langgraph_memstate.graph.codec.models import new, set_extra, set_fields, set_names, set_private

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
_EXACTLY = (  # whatever equals an atom or a container without being one is refused
    ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_UUID
)

_fields = attrgetter("__dict__")
_names = attrgetter("__pydantic_fields_set__")
_extra = attrgetter("__pydantic_extra__")
_private = attrgetter("__pydantic_private__")

_Make = Callable[[], Any]


class Scalars(NamedTuple):
    """A run of atoms."""

    values: tuple[Any, ...]


class Plain(NamedTuple):
    """A dictionary or a list."""

    make: _Make
    has_bytes: bool


class Message(NamedTuple):
    """A message. Its containers are made by calls, as most of them are empty: `dict` and `list` themselves will do."""

    cls: type
    fields: dict[str, Any]
    containers: tuple[tuple[str, _Make], ...]
    names: set[str]
    make_extra: _Make
    has_bytes: bool


Template = Scalars | Plain | Message


def template_of(items: list[Any]) -> Template | None:
    """A template of one item, or of a run of atoms; None where there can be none. It is the caller's to keep."""
    try:
        if all(type(item) in ATOMS for item in items):
            _packed(items)
            return Scalars(tuple(items))
        if len(items) != 1:
            return None
        (item,) = items
        if type(item) in _MESSAGES:
            return _message(item)
        return Plain(_maker(item), _has_bytes(item)) if _is_copyable(item, _DEEPEST) else None
    except ormsgpack.MsgpackEncodeError:
        return None


def _is_copyable(value: Any, levels: int = _DEEPEST) -> bool:
    kind = type(value)
    if kind in ATOMS:
        return True
    if not levels:
        return False
    if kind is dict:
        return not value or (
            set(map(type, value)) == {str} and all(_is_copyable(each, levels - 1) for each in value.values())
        )
    return kind is list and (not value or all(_is_copyable(each, levels - 1) for each in value))


def _has_bytes(value: Any) -> bool:
    if type(value) in (dict, list):
        return any(map(_has_bytes, value.values() if type(value) is dict else value))
    return type(value) is bytes


def _message(message: Any) -> Message | None:
    fields, extra, names = _fields(message), _extra(message), _names(message)
    if _private(message) is not None or type(fields) is not dict or type(names) is not set or not _is_copyable(extra):
        return None
    if set(map(type, chain(fields, names))) != {str}:
        return None
    own, containers, has_bytes = dict(fields), [], _has_bytes(extra)
    for name, value in fields.items():
        kind = type(value)
        if kind is str or value is None:
            continue
        if kind is dict or kind is list:
            if value and not _is_copyable(value):
                return None
            containers.append((name, _maker(value)))
            own[name] = None
            has_bytes = has_bytes or (bool(value) and _has_bytes(value))
        elif kind in ATOMS:
            has_bytes = has_bytes or kind is bytes
        else:
            return None
    return Message(type(message), own, tuple(containers), set(names), _maker(extra), has_bytes)


def _maker(value: dict[str, Any] | list[Any] | None) -> _Make:
    """What makes a container, or nothing, again and again."""
    return partial(ormsgpack.unpackb, ormsgpack.packb(value, option=_EXACTLY)) if value else type(value)


# -- copying ----------------------------------------------------------------------------------------


def copy_into(items: list[Any], template: Template) -> None:
    """Append what a template stands for."""
    if isinstance(template, Message):
        items.append(_copy(template))
    elif isinstance(template, Scalars):
        items.extend(template.values)
    else:
        items.append(template.make())


def _copy(message: Message) -> Any:
    cls, own, containers, names, make_extra, _ = message
    fields = own.copy()
    for name, make in containers:
        fields[name] = make()
    copy: Any = new(cls)
    set_fields(copy, fields)
    set_names(copy, names.copy())
    set_extra(copy, make_extra())
    set_private(copy, None)
    return copy


# -- comparing --------------------------------------------------------------------------------------


def is_same(items: Sequence[Any], template: Template) -> bool:
    """Whether a run of items is surely what the template stands for."""
    outline = Outline()
    outline.add(template)
    return len(items) == outline.length and outline.begins(items)


class Outline:
    """What a list begins with, laid out so that another list is compared with it at the speed of C."""

    def __init__(self) -> None:
        self.length = 0
        """items"""
        self._classes: list[type] = []
        self._messages: list[int] = []
        self._plain: list[int] = []
        self._names: list[set[str]] = []
        self._packed = tuple(bytearray() for _ in _columns((), ()))
        self._with_bytes: list[int] = []

    def add(self, template: Template) -> None:
        made: list[Any] = []
        copy_into(made, template)
        if isinstance(template, Message):
            self._messages.append(self.length)
            self._names.append(template.names)
            columns = _columns(made, ())
        else:
            self._plain += range(self.length, self.length + len(made))
            columns = _columns((), made)
        if not isinstance(template, Scalars) and template.has_bytes:
            self._with_bytes.append(self.length)
        for ours, more in zip(self._packed, columns, strict=True):
            ours += more
        self._classes += map(type, made)
        self.length = len(self._classes)

    def begins(self, items: Sequence[Any]) -> bool:
        """Whether a list surely begins with this."""
        items = items[: self.length]
        if list(map(type, items)) != self._classes:  # first: of these types, attributes and names run nobody's code
            return False
        found = items if not self._plain else [items[place] for place in self._messages]
        plain = items if not self._messages else [items[place] for place in self._plain]
        names = list(map(_names, found))
        if list(map(type, names)) != [set] * len(found) or names != self._names:
            return False
        try:
            equal = all(map(_is_equal, _columns(found, plain), self._packed))
        except ormsgpack.MsgpackEncodeError:
            return False
        return equal and all(_is_exact(items[place]) for place in self._with_bytes)


def _columns(found: Sequence[Any], plain: Sequence[Any]) -> Iterator[bytes]:
    """The parts of messages, then plain values, packed.

    Raises:
        MsgpackEncodeError: one is not exactly of a type that has a MessagePack.
    """
    yield _packed(list(map(_fields, found)))
    yield _packed(list(map(_extra, found)))
    yield _packed(list(map(_private, found)))
    yield _packed(plain)


def _packed(values: Sequence[Any]) -> bytes:
    """Values behind one another. Raises what `_columns` does."""
    packed = ormsgpack.packb(list(values), option=_EXACTLY)
    return packed[1 if len(values) < 16 else 3 if len(values) < 1 << 16 else 5 :]  # without the array's length


def _is_equal(packed: bytes, ours: bytearray) -> bool:
    return len(packed) == len(ours) and packed.startswith(ours)


def _is_exact(item: Any) -> bool:
    """Whether what looks like bytes is: other types come to the same MessagePack."""
    return _is_copyable([_fields(item), _extra(item)] if type(item) in _MESSAGES else item)


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
