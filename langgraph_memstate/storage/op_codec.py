"""Commits as bytes, for a storage that keeps them in a log and runs them again elsewhere.

An operation is MessagePack: its name, then its fields in order, each written and read as its type says. Nothing else is
read: a name or a value that no operation has is refused, so bytes from elsewhere never become an object of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import ormsgpack

from langgraph_memstate.errors import CorruptRowError, NewerSchemaError
from langgraph_memstate.storage.operations import Commit, Op

_BIG_INTEGER = 1  # MessagePack's own integers have 64 bits


class _Codec(NamedTuple):
    """Both raise TypeError for what is not of the type."""

    dump: Callable[[Any], Any]
    load: Callable[[Any], Any]


def dump_commit(commit: Commit) -> bytes:
    """A commit as bytes.

    Raises:
        TypeError, ValueError: an operation holds what its type does not allow.
    """
    return ormsgpack.packb([[type(op).__name__, *_OPS[type(op)].dump(op)] for op in commit])


def pack(numbers: Sequence[int | float], dumped: Sequence[bytes]) -> bytes:
    """Some numbers and what `dump_commit` made, as bytes."""
    return ormsgpack.packb([*numbers, list(dumped)])


def unpack(content: bytes, numbers: int) -> tuple[list[int | float], list[Commit]]:
    """What `pack` was given: so many numbers, and the commits.

    Raises:
        NewerSchemaError: there is an operation that this release does not know.
        CorruptRowError: these bytes are not of our making.
    """
    try:
        *before, dumped = ormsgpack.unpackb(content)
        if len(before) != numbers or not all(type(number) in (int, float) for number in before):
            raise TypeError(f"{numbers} numbers and a list of commits were expected")
        if pack(before, dumped) != content:
            raise ValueError("something follows it")
        return before, [_load_commit(commit) for commit in dumped]
    except (TypeError, ValueError, RecursionError) as error:
        raise CorruptRowError(f"a logged commit cannot be read: {error}") from error


def _load_commit(dumped: bytes) -> Commit:
    return tuple(map(_load_op, _list(ormsgpack.unpackb(dumped, ext_hook=_big_integer))))


def _load_op(dumped: Any) -> Op:
    name, *values = _list(dumped)
    if name not in _NAMES:
        raise NewerSchemaError(
            f"a logged commit has the operation {name!r}, which this release does not know; upgrade langgraph-memstate"
        )
    op: Op = _OPS[_NAMES[name]].load(values)
    return op


# -- one codec for each type ------------------------------------------------------------------------


def _codec_of(hint: Any) -> _Codec:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _LEAVES:
        return _LEAVES[hint]
    if origin in (Union, UnionType):
        return _any_of([_codec_of(member) for member in arguments])
    if origin is Literal:
        return _one_of(arguments)
    if origin in (tuple, frozenset) or origin is Sequence:
        if origin is tuple and arguments[-1] is not Ellipsis:
            return _fixed([_codec_of(member) for member in arguments], tuple)
        return _many(_codec_of(arguments[0]), frozenset if origin is frozenset else tuple)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(_codec_of(arguments[0]), _codec_of(arguments[1]))
    hints, made = get_type_hints(hint), hint
    if is_dataclass(hint):
        names = [each.name for each in fields(hint)]
        inner = _fixed([_codec_of(hints[name]) for name in names], tuple)
        return _Codec(
            lambda value: inner.dump([getattr(value, name) for name in names]),
            lambda dumped: made(*inner.load(dumped)),
        )
    return _fixed([_codec_of(hints[name]) for name in hint._fields], lambda values: hint(*values))


def _exactly(kind: type, *kinds: type) -> _Codec:
    """`kind`, or a class derived from it, which is read as `kind`."""

    def dump(value: Any) -> Any:
        if isinstance(value, kinds or kind) and (kind is bool or not isinstance(value, bool)):
            return value if type(value) in _PLAIN else kind(value)
        raise TypeError(f"{value!r:.100} is no {kind.__name__}")

    return _Codec(dump, dump)


def _dump_integer(value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r:.100} is no int")
    if -(1 << 63) <= value < 1 << 64:
        return int(value)
    return ormsgpack.Ext(_BIG_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def _big_integer(tag: int, content: bytes) -> int:
    if tag != _BIG_INTEGER:
        raise ValueError(f"an extension {tag} that no writer of ours uses")
    return int.from_bytes(content, "big", signed=True)


def _one_of(values: Sequence[Any]) -> _Codec:
    def same(value: Any) -> Any:
        for each in values:
            if type(each) is type(value) and each == value:
                return each
        raise TypeError(f"{value!r:.100} is none of {values}")

    return _Codec(same, same)


def _any_of(members: Sequence[_Codec]) -> _Codec:
    def first(calls: Sequence[Callable[[Any], Any]], value: Any) -> Any:
        for call in calls:
            try:
                return call(value)
            except TypeError:
                continue
        raise TypeError(f"{value!r:.100} is of no type that fits")

    dumps_, loads = [member.dump for member in members], [member.load for member in members]
    return _Codec(lambda value: first(dumps_, value), lambda dumped: first(loads, dumped))


def _many(member: _Codec, kind: type[tuple[Any, ...]] | type[frozenset[Any]]) -> _Codec:
    def dump(values: Any) -> list[Any]:
        if isinstance(values, kind):
            return [member.dump(value) for value in (sorted(values) if kind is frozenset else values)]
        raise TypeError(f"{values!r:.100} is no {kind.__name__}")

    return _Codec(dump, lambda dumped: kind(member.load(value) for value in _list(dumped)))


def _fixed(members: Sequence[_Codec], made: Callable[[Sequence[Any]], Any]) -> _Codec:
    def dump(values: Any) -> list[Any]:
        if isinstance(values, tuple | list) and len(values) == len(members):
            return [member.dump(value) for member, value in zip(members, values, strict=True)]
        raise TypeError(f"{values!r:.100} has not {len(members)} parts")

    def load(dumped: Any) -> Any:
        if len(_list(dumped)) != len(members):
            raise TypeError(f"{dumped!r:.100} has not {len(members)} parts")
        return made(tuple(member.load(value) for member, value in zip(members, dumped, strict=True)))

    return _Codec(dump, load)


def _mapping(key: _Codec, value: _Codec) -> _Codec:
    """In its own order, which decides in what order rows are written."""

    def dump(mapping: Any) -> list[Any]:
        if isinstance(mapping, Mapping):
            return [[key.dump(name), value.dump(held)] for name, held in mapping.items()]
        raise TypeError(f"{mapping!r:.100} is no mapping")

    return _Codec(dump, lambda dumped: {key.load(name): value.load(held) for name, held in map(_list, _list(dumped))})


def _list(dumped: Any) -> list[Any]:
    if isinstance(dumped, list):
        return dumped
    raise TypeError(f"{dumped!r:.100} is no list")


_PLAIN = (str, bytes, int, float, bool)
_LEAVES: dict[Any, _Codec] = {
    NoneType: _one_of((None,)),
    str: _exactly(str),
    bytes: _exactly(bytes, bytes, bytearray, memoryview),
    bool: _exactly(bool),
    int: _Codec(_dump_integer, _exactly(int).load),
    float: _exactly(float, float, int),
}
_OPS: dict[type, _Codec] = {op: _codec_of(op) for op in get_args(Op)}
_NAMES: dict[str, type] = {op.__name__: op for op in _OPS}
