"""Serialised values as PostgreSQL holds them: with their type, and the same bytes once where a thread repeats them."""

from __future__ import annotations

from collections.abc import Callable

from langgraph_memstate.errors import CorruptRowError
from langgraph_memstate.storage.packing import packed, packed_head, unpacked
from langgraph_memstate.storage.rows import escaped, unescaped
from langgraph_memstate.storage.values import Blob, digest_of

_USUAL = "msgpack"  # the type that goes without saying
_TYPED = b"\xff"  # followed by the length of the type's name, the name and the packed value
_SHARED = 128  # bytes; a smaller value is repeated, which takes less than a row of its own would


def with_type(blob: Blob, pack: Callable[[bytes], bytes] = packed) -> bytes:
    """How a value is stored."""
    if blob.type == _USUAL:
        return pack(blob.data)
    name = blob.type.encode()
    return _TYPED + len(name).to_bytes(4, "big") + name + pack(blob.data)


def value_of(stored: object) -> Blob:
    """What `with_type` was given.

    Raises:
        CorruptRowError: these bytes are not of our making, or damaged where that shows.
    """
    if not isinstance(stored, bytes) or stored[:1] != _TYPED:
        return Blob(_USUAL, unpacked(stored))
    end = 5 + int.from_bytes(stored[1:5], "big")
    try:
        return Blob(stored[5:end].decode(), unpacked(stored[end:]))
    except UnicodeDecodeError as error:
        raise CorruptRowError(f"the type of a value is damaged: {error}") from error


def with_time(ts: str, metadata: str, head: Blob) -> bytes:
    """How a checkpoint is stored: its time and metadata, which are much the same in all of them, compress with it."""
    before = f"{escaped(ts)}\0{escaped(metadata)}\0".encode()
    return with_type(Blob(head.type, before + head.data), packed_head)


def head_of(stored: object) -> tuple[str, str, Blob]:
    """What `with_time` was given.

    Raises:
        CorruptRowError: these bytes are not of our making, or damaged where that shows.
    """
    type_, content = value_of(stored)
    try:
        ts, metadata, head = content.split(b"\0", 2)
        return unescaped(ts.decode()), unescaped(metadata.decode()), Blob(type_, head)
    except ValueError as error:
        raise CorruptRowError(f"a checkpoint's time and metadata are damaged: {error}") from error


def write_of(idx: int, value: Blob) -> tuple[bytes, bytes]:
    """The value of a task's write as it is stored, and its digest if it is to be an element."""
    stored = with_type(value)
    return stored, digest_of(value) if idx >= 0 and len(stored) >= _SHARED else b""
