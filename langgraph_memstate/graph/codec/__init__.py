"""The serializer of the checkpointer: values of any data type to bytes and back, and nothing else.

A row names the types of what it holds, so whoever can write a row chooses what reading it touches. Upstream's
`JsonPlusSerializer` imports the named module and calls the named attribute. Here a name only *selects*:

* A module must already be loaded, and a class is looked up in the plain dictionaries of modules and classes.
* What is found must be a data type (it has a `Shape`): a Pydantic model, dataclass, enum or named tuple, one
  of a table of value types, or a subclass of one. Anything else is refused before it is called.
* An object gets back the state it had. Constructors and validators do not run, unless the class has changed
  since: then it validates what was stored.

A value that cannot be stored, or not be loaded again, raises an error that names its type and place; it never
turns into something else. Exceptions alone are stored as upstream stores them, as their `repr`, and of a time
zone that is neither a `timezone` nor a `ZoneInfo` the offset is. Two differences are lost because the encoder
does not show them: a `bytearray` *inside* a value comes back as `bytes`, and a lone surrogate as `?`.

The bytes follow those of `JsonPlusSerializer`, and what it wrote can be read. Equal values give equal bytes
(sets are sorted), but for dictionaries, whose order is kept.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Literal, get_args

from langgraph.checkpoint.serde.event_hooks import emit_serde_event
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from langgraph_memstate.errors import (
    CorruptRowError,
    DeserializationError,
    MemStateError,
    SerializationError,
    StagingError,
)
from langgraph_memstate.graph.codec.models import loaded_shape
from langgraph_memstate.graph.codec.shapes import METHOD, POSITIONAL, PYDANTIC_V2, SINGLE, Key, dotted, key_of
from langgraph_memstate.graph.codec.values import FIXED
from langgraph_memstate.graph.codec.wire import AsStored, Reader, dumps, load

try:  # with `_DeltaSnapshot`, every private name of upstream that the serializer relies on
    from langgraph.checkpoint.serde._msgpack import SAFE_MSGPACK_TYPES
    from langgraph.checkpoint.serde.jsonplus import LC_REVIVER
except ImportError as exc:
    raise StagingError(
        f"This release of langgraph-checkpoint keeps its serializer elsewhere ({exc}); "
        "install one that this release of langgraph-memstate supports."
    ) from exc

# The types upstream always allows are always loaded, so that a row of messages can be read by a process that
# has not seen a message yet.
for _module, _ in sorted(SAFE_MSGPACK_TYPES):
    with suppress(ModuleNotFoundError):  # pathlib._local: a name of some Python versions only
        importlib.import_module(_module)

_ALWAYS_ALLOWED = SAFE_MSGPACK_TYPES | FIXED.keys()
_UNSET: Any = object()


class MemStateSerializer(JsonPlusSerializer):
    """Serializer of the checkpointer; takes the place of `JsonPlusSerializer` without configuration.

    `allowed_msgpack_modules` is upstream's allowlist. True allows every data type that is loaded. A collection
    of `(module, name)` pairs or classes allows those, what their fields declare, and upstream's safe list; None
    the safe list only, and is the default if `LANGGRAPH_STRICT_MSGPACK` is set. A type that it does not allow
    raises `DeserializationError`. There is no pickle.
    """

    def __init__(
        self,
        *,
        pickle_fallback: bool = False,
        allowed_json_modules: Iterable[tuple[str, ...]] | Literal[True] | None = None,
        allowed_msgpack_modules: Iterable[tuple[str, ...] | type] | Literal[True] | None = _UNSET,
    ) -> None:
        if pickle_fallback:
            raise SerializationError(
                "pickle_fallback=True is refused: reading a pickle runs whatever the row says. "
                "Make the value a Pydantic model or a dataclass instead."
            )
        given = {} if allowed_msgpack_modules is _UNSET else {"allowed_msgpack_modules": allowed_msgpack_modules}
        super().__init__(allowed_json_modules=allowed_json_modules, **given)  # type: ignore[arg-type]
        if not hasattr(self, "_allowed_msgpack_modules") or not hasattr(self, "_allowed_json_modules"):
            raise StagingError(
                "This release of langgraph-checkpoint keeps its allowlist elsewhere; "
                "install one that this release of langgraph-memstate supports."
            )
        self._declared: tuple[Any, frozenset[Key]] = (None, frozenset())

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        if obj is None:
            return "null", b""
        if type(obj) in (bytes, bytearray):
            return type(obj).__name__, bytes(obj)
        return "msgpack", dumps(obj)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        kind, content = data
        if kind == "null":
            return None
        if not isinstance(content, (bytes, bytearray, memoryview)):
            raise CorruptRowError(f"A row of type {kind!r} holds {type(content).__name__} instead of bytes.")
        if kind == "msgpack":
            return Reader(self._allow).value(content)
        if kind == "bytes":
            return bytes(content)
        if kind == "bytearray":
            return bytearray(content)
        if kind == "json":
            return self._parsed(bytes(content))
        if kind == "pickle":
            raise DeserializationError("Refused to load a pickle: reading one runs whatever the row says.")
        raise DeserializationError(
            f"A row of type {kind!r} was written by another serializer, or is encrypted (as 'msgpack+aes' is): "
            "read it with that one."
        )

    def loads_all(self, contents: Sequence[bytes]) -> list[Any]:
        """Many values of the type "msgpack", loaded faster than one by one."""
        return Reader(self._allow).values(contents)

    def loads_as_stored(self, data: tuple[str, bytes]) -> Any:
        """The same, but a model that its class does not accept any more comes unvalidated, with the fields it had."""
        kind, content = data
        return AsStored(self._allow).value(content) if kind == "msgpack" else self.loads_typed(data)

    def _allow(self, key: Key) -> None:
        if key in _ALWAYS_ALLOWED:
            return
        module, name = key
        allowed = self._allowed_msgpack_modules
        if allowed is True:
            emit_serde_event({"kind": "msgpack_unregistered_allowed", "module": module, "name": name})
        elif not allowed or not self._lists(allowed, key):
            emit_serde_event({"kind": "msgpack_blocked", "module": module, "name": name})
            raise DeserializationError(
                f"Refused to load {dotted(key)}: it is not in the allowlist (LANGGRAPH_STRICT_MSGPACK, or an "
                f"allowlist of its own, makes the serializer strict). Add ({module!r}, {name!r}) to "
                "allowed_msgpack_modules."
            )

    def _lists(self, allowed: set[tuple[str, ...]], key: Key) -> bool:
        if key in allowed or (key[0], key[1].rpartition(".")[2]) in allowed:
            return True
        of, declared = self._declared
        if of is not allowed or key not in declared:  # computed again when asked for more: types load late
            declared = _declared_by(allowed)
            self._declared = (allowed, declared)
        return key in declared

    def _parsed(self, data: bytes) -> Any:
        """Rows of the type "json", the format of LangGraph before msgpack."""
        try:
            # Given bytes, json searches them for an encoding, and imports its codec.
            return json.loads(data.decode(), object_hook=self._reviver)
        except MemStateError:
            raise
        except (ValueError, RecursionError) as exc:
            raise CorruptRowError(f"A row is not valid JSON: {exc}.") from exc

    def _reviver(self, value: dict[str, Any]) -> Any:
        version, kind, path = value.get("lc"), value.get("type"), value.get("id")
        if version not in (1, 2) or kind not in ("constructor", "secret", "not_implemented") or path is None:
            return value
        if type(path) is not list or len(path) < 2 or not all(type(each) is str for each in path):
            raise CorruptRowError(f"A row names a type as {path!r}.")
        place = tuple(path)
        if version == 1:
            place = LC_REVIVER.import_mappings.get(place, place)
        key = (dotted(place[:-1]), place[-1])
        if kind != "constructor" or (version == 1 and key not in SAFE_MSGPACK_TYPES):
            raise DeserializationError(
                f"Refused to load {dotted(key)}: of LangChain's JSON only messages and documents are loaded."
            )
        if self._allowed_json_modules is not True and place not in (self._allowed_json_modules or ()):
            self._allow(key)
        shape = loaded_shape(key)
        args, kwargs = value.get("args") or [], value.get("kwargs") or {}
        if kwargs or not args:
            more = ["json"] if shape.code == PYDANTIC_V2 else []
            return load(shape, key, shape.code, [*key, kwargs, *more])
        if shape.cls is datetime:
            return load(shape, key, METHOD, [*key, args[0], "fromisoformat"])
        if len(args) == 1:
            return load(shape, key, SINGLE, [*key, args[0]])
        return load(shape, key, POSITIONAL, [*key, args])


def _declared_by(allowed: Iterable[tuple[str, ...]]) -> frozenset[Key]:
    """The allowed types and all that their fields declare: upstream stores a model with its fields flattened
    into it, so that an allowlist for upstream names the outer model only."""
    listed = {(key[0], key[1].partition("[")[0]) for key in allowed if len(key) == 2}
    waiting = list(listed)
    while waiting:
        annotations: Iterable[Any] = ()
        with suppress(Exception):  # not loaded, or annotations that do not resolve: nothing is added
            annotations = list(loaded_shape(waiting.pop()).declared())
        found = {key_of(cls) for each in annotations for cls in _classes_in(each)}
        waiting.extend(found - listed)
        listed |= found
    return frozenset(listed)


def _classes_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        generic = vars(annotation).get("__pydantic_generic_metadata__") or {}
        yield generic.get("origin") or annotation
        for arg in generic.get("args", ()):
            yield from _classes_in(arg)
    for arg in get_args(annotation):
        yield from _classes_in(arg)
