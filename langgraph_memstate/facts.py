"""Facts, drafts and log entries: frozen value types, and how a namespace becomes one sortable string."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from langgraph_memstate.errors import (
    CorruptRowError,
    KeyTypeError,
    NamespaceError,
    SerializationError,
)

Namespace = tuple[str, ...]
Operation = Literal["put", "delete"]
IndexPaths = Literal[False] | tuple[str, ...] | None
"""Which fields of a value are embedded: `None` the index's own, `False` none, or these paths."""

Pattern = str | Namespace
"""A fact type, or the labels of namespaces, in which ``*`` stands for any one label."""

SESSION = "@session"  # the first label of facts that belong to a session; its id is the second

_END = "\x1f"  # ends every label: a prefix is then a range that cannot confuse ("a",) with ("ab",)
_AFTER_END = "\x20"
_ESCAPE = "\x1b"
_LAST = "\U0010ffff"  # no label begins with it once encoded, so it ends the range of everything
_ESCAPES = {_ESCAPE: _ESCAPE + "e", _END: _ESCAPE + "u", _LAST: _ESCAPE + "l"}
_UNESCAPES = {"e": _ESCAPE, "u": _END, "l": _LAST}
_ENCODING = str.maketrans(_ESCAPES)
_ESCAPED = re.compile(_ESCAPE + "(.?)", re.DOTALL)

_LONGEST_TTL = 1e12  # minutes; what is longer is no time to live

# -- addresses ------------------------------------------------------------------------------------


def check_namespace(namespace: object) -> Namespace:
    """Return `namespace` as a tuple of non-empty strings; a plain string is one label.

    Raises:
        NamespaceError: it is neither, or a label is not valid Unicode.
    """
    labels = (namespace,) if isinstance(namespace, str) else namespace
    if not isinstance(labels, tuple | list) or not labels:
        raise NamespaceError(f"a namespace is a non-empty tuple of strings, not {namespace!r}")
    for label in labels:
        if not isinstance(label, str) or not label:
            raise NamespaceError(f"namespace {namespace!r}: label {label!r} is not a non-empty string")
        if not is_unicode(label):
            raise NamespaceError(f"namespace {namespace!r}: {label!r} is not valid Unicode")
    return tuple(labels)


def prefix_of(namespace: str | Namespace, session_id: str | None = None) -> Namespace:
    """The namespace prefix a caller means: nothing is every namespace, a string a fact type."""
    return in_session(() if namespace == () else check_namespace(namespace), session_id)


def check_key(key: object) -> str:
    """Return `key` if it can address an item.

    Raises:
        KeyTypeError: it is not a non-empty string of valid Unicode.
    """
    if not isinstance(key, str) or not key or not is_unicode(key):
        raise KeyTypeError(f"a key is a non-empty string, not {key!r}")
    return key


def check_text(name: str, text: object) -> str | None:
    """Return `text` if it is a string of valid Unicode, or None.

    Raises:
        KeyTypeError: it is anything else.
    """
    if text is None or (isinstance(text, str) and is_unicode(text)):
        return text
    raise KeyTypeError(f"{name}={text!r} is not a string of valid Unicode")


def check_ttl(ttl: object) -> float | None:
    """Return `ttl` if it is a time to live in minutes, or None.

    Raises:
        SerializationError: it is anything else.
    """
    if ttl is None:
        return None
    if isinstance(ttl, int | float) and not isinstance(ttl, bool) and 0 <= ttl <= _LONGEST_TTL:
        return float(ttl)
    raise SerializationError(f"ttl={ttl!r} is not a number of minutes")


def is_unicode(text: str) -> bool:
    """Whether a text can be stored: half a surrogate pair cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encode_namespace(namespace: Sequence[str]) -> str:
    """One string for a namespace, in which every prefix of labels is a prefix of characters."""
    return "".join(label.translate(_ENCODING) + _END for label in namespace)


def decode_namespace(encoded: str) -> Namespace:
    """The inverse of `encode_namespace`."""
    *labels, rest = encoded.split(_END)
    if rest:
        raise CorruptRowError(f"namespace {encoded!r} does not end with a terminator")
    return tuple(map(_unescape, labels) if _ESCAPE in encoded else labels)


def _unescape(label: str) -> str:
    try:
        return _ESCAPED.sub(lambda found: _UNESCAPES[found[1]], label)
    except KeyError as error:
        raise CorruptRowError(f"label {label!r} of a namespace has an unknown escape") from error


def namespace_range(prefix: Sequence[str]) -> tuple[str, str]:
    """The half-open range of encoded namespaces that start with the labels of `prefix`."""
    encoded = encode_namespace(prefix)
    return (encoded, encoded[:-1] + _AFTER_END) if encoded else ("", _LAST)


# -- sessions and patterns ------------------------------------------------------------------------


def in_session(namespace: Namespace, session_id: str | None) -> Namespace:
    """Where the facts of a namespace are that belong to a session; None: those that belong to none."""
    return namespace if session_id is None else check_namespace((SESSION, session_id, *namespace))


def split_session(namespace: Namespace) -> tuple[str | None, Namespace]:
    """The session that a namespace belongs to, if any, and the namespace without it."""
    if namespace[0] == SESSION and len(namespace) > 2:
        return namespace[1], namespace[2:]
    return None, namespace


def covers(pattern: Pattern, namespace: Namespace, type: str | None) -> bool:
    """Whether a pattern matches a fact; one in a session as if it were in none."""
    _, labels = split_session(namespace)
    if isinstance(pattern, str):
        return type == pattern or labels == (pattern,)
    return len(labels) == len(pattern) and all(
        wanted in ("*", label) for wanted, label in zip(pattern, labels, strict=True)
    )


# -- versions -------------------------------------------------------------------------------------

_version_lock = threading.Lock()
_last_tick = 0


def new_version() -> str:
    """A UUIDv7 (RFC 9562, method 3: sub-millisecond precision), increasing within this process.

    It exists before the commit, so a vector database can hold a version that SQL does not show yet.
    """
    global _last_tick
    with _version_lock:
        # 60 bits: milliseconds since 1970, then 12 bits of fraction.
        nanoseconds = time.time_ns()
        tick = (nanoseconds // 1_000_000) << 12 | (nanoseconds % 1_000_000 * 4096 // 1_000_000)
        _last_tick = max(tick, _last_tick + 1)
        tick = _last_tick
    random = int.from_bytes(os.urandom(8), "big") & ((1 << 62) - 1)
    bits = (tick >> 12) << 80 | 0x7 << 76 | (tick & 0xFFF) << 64 | 0b10 << 62 | random
    digits = f"{bits:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


# -- values ---------------------------------------------------------------------------------------


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=dict)


def encode_value(value: Mapping[str, Any]) -> str:
    """The value as JSON text, exactly: what comes back equals what went in (tuples become lists).

    Raises:
        SerializationError: something in it is not JSON; the message names the path.
    """
    if not isinstance(value, (dict, Mapping)):  # dict first: to ask an abstract class takes long
        raise SerializationError(f"a value is a dict with string keys, not {type(value).__name__}")
    if (fault := _not_json(value, 0)) is not None:
        path, problem = fault
        raise SerializationError(f"${path if len(path) <= 300 else path[:100] + '…'} {problem}")
    return _ENCODER.encode(value)


_MAX_DEPTH = 200
_MAX_INT_BITS = 14_000  # about 4,200 digits: Python refuses to read more than 4,300 back


def _not_json(value: object, depth: int) -> tuple[str, str] | None:
    """Where in `value` there is something that JSON would change or cannot hold, and what it is."""
    if isinstance(value, str):  # also of a class of its own, as the text of a message is
        return None if is_unicode(value) else ("", "is not valid Unicode")
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        bits = value.bit_length()
        return None if bits <= _MAX_INT_BITS else ("", f"is an integer of {bits} bits; {_MAX_INT_BITS} fit")
    if isinstance(value, float):
        return None if math.isfinite(value) else ("", f"is {value!r}, which JSON has no number for")
    if depth > _MAX_DEPTH:
        return "", f"is nested deeper than {_MAX_DEPTH} levels"
    if isinstance(value, (dict, Mapping)):
        for key, inner in value.items():
            if not isinstance(key, str) or not is_unicode(key):
                return "", f"has the key {key!r}; JSON keys are strings"
            if (fault := _not_json(inner, depth + 1)) is not None:
                return f".{key}{fault[0]}", fault[1]
        return None
    if isinstance(value, (list, tuple)):
        for position, inner in enumerate(value):
            if (fault := _not_json(inner, depth + 1)) is not None:
                return f"[{position}]{fault[0]}", fault[1]
        return None
    kind = type(value)
    return "", (
        f"is a {kind.__module__}.{kind.__qualname__}, which JSON cannot hold; "
        "store a string, number, list or dict (for a Pydantic model: model_dump(mode='json'))"
    )


_raw_decode = json.JSONDecoder().raw_decode


def decode_value(text: str) -> dict[str, Any]:
    """The inverse of `encode_value`."""
    try:
        value, end = _raw_decode(text)  # half of what `json.loads` takes, which looks for spaces around it
        if end != len(text):
            raise ValueError(f"something follows it from {end} on")
    except (TypeError, ValueError, RecursionError) as error:
        raise CorruptRowError(f"a stored value is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptRowError(f"a stored value is a {type(value).__name__}, not an object")
    return value


# -- facts ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a memory write came from; every field is None outside a graph step."""

    thread_id: str | None = None
    checkpoint_ns: str | None = None
    checkpoint_id: str | None = None
    task_id: str | None = None
    node: str | None = None
    run_id: str | None = None
    actor: str | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            check_text(name, getattr(self, name))


NOWHERE = Origin()


@dataclass(frozen=True, slots=True)
class Draft:
    """One memory write on its way to the log: complete but for its place in the sequence.

    `value` is JSON text (None for a delete), `ttl` minutes, times seconds since 1970. A draft that undoes says up to
    which sequence of the log (`undoes`), and since when the item that it brings back existed (`created_at`).

    `patch`: JSON text (RFC 7396); the value is then what it made of the fact as its writer saw it, and is made anew of
    the fact as the commit finds it. `overrides`: it may change an immutable fact. `derived`: it follows from the other
    writes of its step, and is derived from them anew when that lands. `on_conflict`: what becomes of an undo if others
    have changed the fact since it was at version `over`.
    """

    version: str
    namespace: Namespace
    key: str
    op: Operation
    value: str | None
    type: str | None = None
    index: IndexPaths = None
    ttl: float | None = None
    schema: str | None = None
    schema_version: int | None = None
    ts: float = field(default_factory=time.time)
    origin: Origin = NOWHERE
    undoes: int | None = None
    created_at: float | None = None
    patch: str | None = None
    overrides: bool = False
    derived: bool = False
    over: str | None = None
    on_conflict: Literal["raise", "keep"] | None = None

    @property
    def address(self) -> tuple[Namespace, str]:
        return self.namespace, self.key

    @property
    def is_free(self) -> bool:
        """Whether it may change what is immutable: it says so, or undoes."""
        return self.overrides or self.undoes is not None

    def dumps(self) -> str:
        """JSON text for the staging table; `loads` reads it back."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "origin"}
        record["origin"] = [getattr(self.origin, f.name) for f in fields(Origin)]
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def loads(cls, text: str) -> Draft:
        try:
            record = json.loads(text)
            record["namespace"] = check_namespace(record["namespace"])
            if isinstance(record["index"], list):
                record["index"] = tuple(record["index"])
            record["origin"] = Origin(*record["origin"])
            return cls(**record)
        except (TypeError, ValueError, KeyError) as error:
            raise CorruptRowError(f"a staged memory write cannot be read: {error}") from error


class Record(NamedTuple):
    """The current version of one (namespace, key), as the storage holds it. Times are seconds since 1970."""

    namespace: Namespace
    key: str
    version: str
    value: str
    created_at: float
    updated_at: float
    seq: int = 0
    expires_at: float | None = None
    ttl: float | None = None
    type: str | None = None
    schema: str | None = None
    schema_version: int | None = None


@dataclass(frozen=True, slots=True)
class Fact:
    """A typed, versioned record of memory.

    Without `namespace` it lives in `(type,)`; `id` is its key there (made when absent). With `session_id` it belongs to
    that session until it is promoted. The fields after `namespace` are provenance: `commit` reads `thread_id`, `actor`,
    `reason` and `session_id`, the rest is filled in by reads.
    """

    type: str
    payload: Mapping[str, Any]
    id: str = field(default_factory=new_version)
    namespace: Namespace | None = None
    thread_id: str | None = None
    actor: str | None = None
    reason: str | None = None
    version: str | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    score: float | None = None
    session_id: str | None = None

    @property
    def address(self) -> tuple[Namespace, str]:
        """The (namespace, key) of the store item this fact is."""
        namespace = (self.type,) if self.namespace is None else self.namespace
        return in_session(check_namespace(namespace), self.session_id), check_key(self.id)

    @classmethod
    def of(cls, record: Record, score: float | None = None) -> Fact:
        """The fact that a stored record is; one that LangGraph's store wrote has its last label as type."""
        session_id, namespace = split_session(record.namespace)
        return cls(
            type=record.type or namespace[-1],
            payload=decode_value(record.value),
            id=record.key,
            namespace=namespace,
            version=record.version,
            created_at=datetime.fromtimestamp(record.created_at, UTC),
            updated_at=datetime.fromtimestamp(record.updated_at, UTC),
            score=score,
            session_id=session_id,
        )

    def with_version(self, version: str) -> Fact:
        return replace(self, version=version)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry of the append-only log.

    `value` is None for a delete, and for a put whose content was forgotten. `commit_id` is the first sequence of its
    commit; `undoes`, for what a rollback wrote, the sequence it went back to. Times are aware UTC, `ttl` minutes.
    """

    seq: int
    version: str
    commit_id: int
    op: Operation
    namespace: Namespace
    key: str
    value: dict[str, Any] | None
    supersedes: str | None
    thread_id: str | None
    checkpoint_ns: str | None
    checkpoint_id: str | None
    task_id: str | None
    node: str | None
    run_id: str | None
    actor: str | None
    reason: str | None
    schema: str | None
    schema_version: int | None
    ts: datetime
    created_at: datetime | None
    type: str | None
    index: IndexPaths
    ttl: float | None
    undoes: int | None

    @property
    def address(self) -> tuple[Namespace, str]:
        return self.namespace, self.key

    @property
    def forgotten(self) -> bool:
        """Whether the content was erased on purpose."""
        return self.op == "put" and self.value is None
