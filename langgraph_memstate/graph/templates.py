"""Templates: private copies of decoded values, to copy again for a reader and to compare with what a writer brings.

Copying a message takes a fraction of the time of decoding it. A template is made of atoms, plain dictionaries and
lists, and LangChain's messages, and of nothing else: readers share the atoms, which cannot change, and no container.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from operator import attrgetter
from types import NoneType
from typing import Any, NamedTuple

import ormsgpack
from langchain_core import messages

from langgraph_memstate.graph.codec.models import new, set_extra, set_fields, set_names, set_private

ATOMS = frozenset((str, int, float, bool, NoneType, bytes))
MESSAGES = frozenset(
    (
        messages.AIMessage, messages.AIMessageChunk, messages.ChatMessage, messages.ChatMessageChunk,
        messages.FunctionMessage, messages.FunctionMessageChunk, messages.HumanMessage, messages.HumanMessageChunk,
        messages.RemoveMessage, messages.SystemMessage, messages.SystemMessageChunk, messages.ToolMessage,
        messages.ToolMessageChunk,
    )
)  # fmt: skip
_DEEPEST = 32  # containers in one another; what nests deeper is always encoded and decoded
pack_exactly: Callable[[Any], bytes] = partial(
    ormsgpack.packb,
    option=ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_UUID,
)
"""Whatever equals an atom or a container without being one is refused."""

fields_of = attrgetter("__dict__")
names_of = attrgetter("__pydantic_fields_set__")
extra_of = attrgetter("__pydantic_extra__")
private_of = attrgetter("__pydantic_private__")

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
    changing: bytes
    """what of it can change, packed as `pack_changing` does"""
    has_bytes: bool


Template = Scalars | Plain | Message


def template_of(items: list[Any]) -> Template | None:
    """A template of one item, or of a run of atoms; None where there can be none. It is the caller's to keep."""
    try:
        if all(type(item) in ATOMS for item in items):
            pack_exactly(items)
            return Scalars(tuple(items))
        if len(items) != 1:
            return None
        (item,) = items
        if type(item) in MESSAGES:
            return _message(item)
        return Plain(_maker(item), _has_bytes(item)) if is_copyable(item, _DEEPEST) else None
    except ormsgpack.MsgpackEncodeError:
        return None


def is_copyable(value: Any, levels: int = _DEEPEST) -> bool:
    kind = type(value)
    if kind in ATOMS:
        return True
    if not levels:
        return False
    if kind is dict:
        return not value or (
            set(map(type, value)) == {str} and all(is_copyable(each, levels - 1) for each in value.values())
        )
    return kind is list and (not value or all(is_copyable(each, levels - 1) for each in value))


def _has_bytes(value: Any) -> bool:
    if type(value) in (dict, list):
        return any(map(_has_bytes, value.values() if type(value) is dict else value))
    return type(value) is bytes


def _message(message: Any) -> Message | None:
    fields, extra, names = fields_of(message), extra_of(message), names_of(message)
    if private_of(message) is not None or type(fields) is not dict or type(names) is not set or not is_copyable(extra):
        return None
    if set(map(type, chain(fields, names))) != {str}:
        return None
    own, containers, has_bytes = dict(fields), {}, _has_bytes(extra)
    for name, value in fields.items():
        kind = type(value)
        if kind is str or value is None:
            continue
        if kind is dict or kind is list:
            if value and not is_copyable(value):
                return None
            containers[name] = value
            own[name] = None
            has_bytes = has_bytes or (bool(value) and _has_bytes(value))
        elif kind in ATOMS:
            has_bytes = has_bytes or kind is bytes
        else:
            return None
    makers = tuple((name, _maker(value)) for name, value in containers.items())
    changing = pack_changing(containers, extra, None)
    return Message(type(message), own, makers, set(names), _maker(extra), changing, has_bytes)


def pack_changing(fields: dict[str, Any], extra: Any, private: Any) -> bytes:
    """What of a message can change, packed: given attributes, and what it has besides."""
    return pack_exactly([fields, extra, private])


def _maker(value: dict[str, Any] | list[Any] | None) -> _Make:
    """What makes a container, or nothing, again and again."""
    return partial(ormsgpack.unpackb, pack_exactly(value)) if value else type(value)


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
    cls, own, containers, names, make_extra, _, _ = message
    fields = own.copy()
    for name, make in containers:
        fields[name] = make()
    copy: Any = new(cls)
    set_fields(copy, fields)
    set_names(copy, names.copy())
    set_extra(copy, make_extra())
    set_private(copy, None)
    return copy
