"""Msgpack cut into its parts without being decoded (https://github.com/msgpack/msgpack/blob/master/spec.md).

What LangGraph has serialised can so be stored part by part, byte for byte: no type that it names is looked at, whether
this process knows it or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ormsgpack

from langgraph_memstate.errors import CorruptRowError

# first byte -> bytes of payload that follow it, or how many bytes say how many follow, and how many come on top
_FIXED = {
    0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
    0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17, 0xC0: 0, 0xC2: 0, 0xC3: 0,
}  # fmt: skip
_COUNTED = {
    0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1),
    0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0),
}  # fmt: skip
_CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # bytes of the count, values an entry


def entries(content: bytes) -> dict[str, bytes]:
    """The values of a map with texts for keys, each still packed.

    Raises:
        CorruptRowError: it is something else, or damaged.
    """
    count, size, place = _header(content, 0)
    if size != 2:
        raise CorruptRowError("a row holds no map where one should be")
    found: dict[str, bytes] = {}
    for _ in range(count):
        end = _end(content, place)
        key = _unpacked(content[place:end])
        if not isinstance(key, str):
            raise CorruptRowError(f"a map has the key {key!r}, which is no text")
        place, end = end, _end(content, end)
        found[key] = content[place:end]
        place = end
    _check_whole(content, place)
    return found


def items(content: bytes, known: Sequence[bytes] = ()) -> list[bytes] | None:
    """The items of an array, each still packed; None for any other value.

    `known`: what it probably begins with, an earlier answer. So far as it does, these very objects are in the answer.
    """
    count, size, place = _header(content, 0)
    if size != 1:
        return None
    found: list[bytes] = []
    for item in known[:count]:
        if not content.startswith(item, place):
            break
        found.append(item)
        place += len(item)
    for _ in range(count - len(found)):
        end = _end(content, place)
        found.append(content[place:end])
        place = end
    _check_whole(content, place)
    return found


def packed_map(values: Mapping[str, bytes]) -> bytes:
    """The inverse of `entries`."""
    parts = [part for key, value in values.items() for part in (ormsgpack.packb(key), value)]
    return b"\xdf" + len(values).to_bytes(4, "big") + b"".join(parts)


def packed_array(values: Sequence[bytes]) -> bytes:
    """The inverse of `items`."""
    size = len(values)
    header = bytes((0x90 | size,)) if size < 16 else b"\xdd" + size.to_bytes(4, "big")
    return header + b"".join(values)


def is_atom(value: bytes) -> bool:
    """Whether a packed value is neither a container nor of a type of its own."""
    first = value[0]
    is_container = 0x80 <= first <= 0x9F or first in _CONTAINERS
    return not is_container and not 0xC7 <= first <= 0xC9 and not 0xD4 <= first <= 0xD8


def text_of(value: bytes) -> str:
    """A packed text."""
    text = _unpacked(value)
    if not isinstance(text, str):
        raise CorruptRowError(f"a row holds {text!r} where a text should be")
    return text


def _unpacked(value: bytes) -> object:
    try:
        unpacked: object = ormsgpack.unpackb(value)
    except ValueError as error:
        raise CorruptRowError(f"a packed value is damaged: {error}") from error
    return unpacked


def _header(content: bytes, place: int) -> tuple[int, int, int]:
    """Of a container: entries, values an entry, and where they begin. No values an entry: it is none."""
    if not content:
        raise CorruptRowError("a row is empty where a value should be")
    first = content[place]
    if 0x80 <= first <= 0x8F:
        return first & 15, 2, place + 1
    if 0x90 <= first <= 0x9F:
        return first & 15, 1, place + 1
    if first in _CONTAINERS:
        width, size = _CONTAINERS[first]
        return int.from_bytes(content[place + 1 : place + 1 + width], "big"), size, place + 1 + width
    return 0, 0, place


def _end(content: bytes, place: int) -> int:
    """Where the value ends that begins at a place."""
    waiting = 1
    try:
        while waiting:
            waiting -= 1
            first = content[place]
            if first <= 0x7F or first >= 0xE0:
                place += 1
            elif 0xA0 <= first <= 0xBF:
                place += 1 + (first & 31)
            elif first in _FIXED:
                place += 1 + _FIXED[first]
            elif first in _COUNTED:
                width, more = _COUNTED[first]
                place += 1 + width + more + int.from_bytes(content[place + 1 : place + 1 + width], "big")
            elif first == 0xC1:
                raise CorruptRowError("a packed value has a byte that msgpack does not use")
            else:
                count, size, place = _header(content, place)
                waiting += count * size
    except IndexError:
        raise CorruptRowError("a packed value is cut off") from None
    if place > len(content):
        raise CorruptRowError("a packed value is cut off")
    return place


def _check_whole(content: bytes, place: int) -> None:
    if place != len(content):
        raise CorruptRowError("a packed value is cut off, or followed by something else")
