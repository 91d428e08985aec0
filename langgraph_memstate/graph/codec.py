"""The serializer of the checkpointer: values of any data type to bytes and back, and nothing else.

A row names the types of what it holds, so whoever can write a row chooses what reading it touches. Upstream's
`JsonPlusSerializer` imports the named module and calls the named attribute. Here a name only *selects*:

* A module must already be loaded, and a class is looked up in the plain dictionaries of modules and
  classes: no import, module `__getattr__`, descriptor or metaclass runs.
* What is found must be a data type (it has a `Shape`): a Pydantic model, dataclass, enum or named tuple, one
  of a table of value types, or a subclass of one. Anything else is refused before it is called.
* An object gets back the state it had. Constructors and validators do not run, unless the class has changed
  since: then it validates what was stored.

A value that cannot be stored, or not be loaded again, raises an error that names its type and place; it never
turns into something else. Exceptions alone are stored as upstream stores them, as their `repr`. Two
differences are lost because the encoder does not show them: a `bytearray` *inside* a value comes back as
`bytes`, and a lone surrogate as `?`.

The bytes are those of `JsonPlusSerializer` where it keeps the value, and what it wrote can be read. Equal
values give equal bytes (sets are sorted), but for dictionaries, whose order is kept.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import re
import sys
import types
import zlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints
from uuid import UUID
from zoneinfo import ZoneInfo

import ormsgpack
import pydantic.networks
from langgraph.checkpoint.serde.event_hooks import emit_serde_event
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.store.base import Item, SearchItem
from langgraph.types import Send
from pydantic import AnyUrl, BaseModel, Secret, SecretBytes, SecretStr, ValidationError

from langgraph_memstate.errors import (
    CorruptRowError,
    DeserializationError,
    MemStateError,
    SerializationError,
    StagingError,
)

try:  # every private name of upstream that this module relies on
    from langgraph.checkpoint.serde._msgpack import SAFE_MSGPACK_TYPES
    from langgraph.checkpoint.serde.jsonplus import LC_REVIVER
    from langgraph.checkpoint.serde.types import _DeltaSnapshot
except ImportError as exc:
    raise StagingError(
        f"This release of langgraph-checkpoint keeps its serializer elsewhere ({exc}); "
        "install one that this release of langgraph-memstate supports."
    ) from exc

Key = tuple[str, str]  # module, qualified name
Pack = Callable[[Any], bytes]

# Extension codes, with the meaning they have in JsonPlusSerializer.
SINGLE, POSITIONAL, KEYWORDS, METHOD, PYDANTIC_V1, PYDANTIC_V2, NUMPY_ARRAY, DELTA_SNAPSHOT = range(8)

# How deep typed values may nest. The decoder takes about 550 bytes of stack for each open container and a few
# kilobytes for each typed value, and does not limit their sum: 20 kB of a hostile row would end the process.
MAX_TYPED_DEPTH = 200
FREE_TYPED_DEPTH = 4  # up to here the decoder's own limit of 1,024 containers a level is enough
MAX_OPEN_CONTAINERS = 2_000

# The types upstream always allows are always loaded, so that a row of messages can be read by a process that
# has not seen a message yet.
for _module, _ in sorted(SAFE_MSGPACK_TYPES):
    with suppress(ModuleNotFoundError):  # pathlib._local: a name of some Python versions only
        importlib.import_module(_module)


# --- Names -----------------------------------------------------------------------------------------------

_module_names = types.ModuleType.__dict__["__dict__"].__get__
_class_names = type.__dict__["__dict__"].__get__
_mro: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__


def find(key: Key) -> Any:
    """What the application has loaded under that name, or None. Runs no code of what it walks through."""
    try:
        found: Any = sys.modules[key[0]]
        names = _module_names(found)
        for name in key[1].split("."):
            found = names[name]
            names = _class_names(found)  # TypeError: not a class
    except (KeyError, TypeError):
        return None
    return found


def _is_subclass(cls: type, base: type) -> bool:
    return any(each is base for each in _mro(cls))


def _class_attribute(cls: type, name: str) -> Any:
    return next((names[name] for each in _mro(cls) if name in (names := _class_names(each))), None)


# --- Shapes: how the instances of one class are taken apart and put together ------------------------------


class Shape:
    """A data type. Rows hold `[module, qualified name, payload, *more]`; more is what upstream does not know."""

    code = KEYWORDS

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.home = cls  # the class that the stored name leads to
        self.key: Key = (cls.__module__, cls.__qualname__)

    def dump(self, obj: Any, pack: Pack) -> tuple[int, list[Any]]:
        raise NotImplementedError

    def fallback(self, obj: Any, packs: Callable[[Any], bool]) -> list[Any] | None:
        """Another row for an object of which `dump` gave something that cannot be packed, if there is one."""
        return None

    def load(self, code: int, row: list[Any]) -> Any:
        raise NotImplementedError

    def declared(self) -> Iterable[Any]:
        """The annotations of its fields."""
        return ()

    def _payload(self, code: int, row: list[Any], kind: type) -> Any:
        if code != self.code or type(row[2]) is not kind:
            raise TypeError(f"it is not stored that way (extension code {code})")
        return row[2]


class EnumShape(Shape):
    code = SINGLE

    def dump(self, obj: Any, pack: Pack) -> tuple[int, list[Any]]:
        return SINGLE, [*self.key, obj.value]

    def load(self, code: int, row: list[Any]) -> Any:
        if code != SINGLE or not self.cls._member_map_:  # type: ignore[attr-defined]
            raise TypeError("it is not an enum with members")
        return enum.EnumType.__call__(self.cls, row[2])


class NamedTupleShape(Shape):
    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.fields: tuple[str, ...] = _class_attribute(cls, "_fields")
        self.defaults: dict[str, Any] = _class_attribute(cls, "_field_defaults") or {}

    def dump(self, obj: Any, pack: Pack) -> tuple[int, list[Any]]:
        return KEYWORDS, [*self.key, dict(zip(self.fields, tuple.__iter__(obj), strict=True))]

    def load(self, code: int, row: list[Any]) -> Any:
        payload = self._payload(code, row, dict)
        if new := [name for name in self.fields if name not in payload and name not in self.defaults]:
            raise ValueError(f"its field {new[0]!r} is new and has no default")
        values = (payload[name] if name in payload else self.defaults[name] for name in self.fields)
        return tuple.__new__(self.cls, values)

    def declared(self) -> Iterable[Any]:
        return get_type_hints(self.cls).values()


class DataclassShape(Shape):
    """Row: `{field: value}, {other attribute: value} | None`. None: only the constructor can make the others."""

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.fields = {field.name: field for field in dataclasses.fields(cls)}
        self.slots = {
            name: slot
            for each in reversed(_mro(cls))
            for name, slot in _class_names(each).items()
            if type(slot) is types.MemberDescriptorType
        }

    def dump(self, obj: Any, pack: Pack) -> tuple[int, list[Any]]:
        return KEYWORDS, [*self.key, *self._state(obj)]

    def fallback(self, obj: Any, packs: Callable[[Any], bool]) -> list[Any] | None:
        fields, others = self._state(obj)
        return None if packs(others) else [*self.key, fields, None]

    def _state(self, obj: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        state = object.__getstate__(obj)  # type: ignore[attr-defined]  # typeshed: only since 3.11
        own, slots = state if type(state) is tuple else (state, None)
        fields, others = {}, {}
        for name, value in {**(slots or {}), **(own or {})}.items():
            if name in self.fields:
                fields[name] = value
            elif type(_class_attribute(self.cls, name)) is not cached_property:
                others[name] = value
        return fields, others

    def load(self, code: int, row: list[Any]) -> Any:
        payload = self._payload(code, row, dict)
        fields = {name: value for name, value in payload.items() if name in self.fields}
        others = row[3] if len(row) > 3 else None
        if others is None or self.cls.__new__ is not object.__new__:
            obj = self.cls(**{name: value for name, value in fields.items() if self.fields[name].init})
        else:
            obj = object.__new__(self.cls)
            self._add_new_fields(fields)
        for name, value in {**fields, **(others or {})}.items():
            if name in self.slots:
                self.slots[name].__set__(obj, value)
            else:
                object.__getattribute__(obj, "__dict__")[name] = value
        return obj

    def _add_new_fields(self, stored: dict[str, Any]) -> None:
        for name, field in self.fields.items():
            if name in stored:
                continue
            if field.default is not dataclasses.MISSING:
                stored[name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                stored[name] = field.default_factory()
            elif field.init:
                raise ValueError(f"its field {name!r} is new and has no default")

    def declared(self) -> Iterable[Any]:
        return get_type_hints(self.cls).values()


class ModelShape(Shape):
    """Row: `{field: value}, stamp, [fields set], extra, private, [private left out], [type arguments]`.

    The stamp is a checksum of the fields' names and types. Where it is the class's own, the state is put back
    as it was. Otherwise the class validates it: the class has changed, or (a stamp of None) the class must
    compute what it excludes, or (a text, as in rows of upstream) the payload is what `model_dump` gave.
    """

    code = PYDANTIC_V2

    def __init__(self, cls: type[BaseModel]) -> None:
        super().__init__(cls)
        self.model = cls
        generic = cls.__pydantic_generic_metadata__
        self.args: list[Any] = []
        if generic["origin"] is not None:
            self.home = generic["origin"]
            self.key = (self.home.__module__, self.home.__qualname__)
            self.args = [describe(arg) for arg in generic["args"]]
        fields = cls.model_fields
        self.excluded = {name: field for name, field in fields.items() if field.exclude}
        self.stored = {name: None for name in fields if name not in self.excluded}.keys()
        names_and_types = [(name, describe(field.annotation)) for name, field in fields.items()]
        self.stamp = zlib.crc32(repr(names_and_types).encode())
        self.restorable = cls.__new__ is object.__new__

    def dump(self, obj: Any, pack: Pack) -> tuple[int, list[Any]]:
        return PYDANTIC_V2, self._row(obj, self._private(obj), ())

    def _row(self, obj: Any, private: dict[str, Any] | None, left_out: Iterable[str]) -> list[Any]:
        state = obj.__dict__
        stamp = None if self.excluded and self._must_validate(state) else self.stamp
        if state.keys() != self.stored:  # cached properties, excluded fields
            state = {name: state[name] for name in self.stored if name in state}
        row = [*self.key, state, stamp, sorted(obj.__pydantic_fields_set__), obj.__pydantic_extra__, private]
        return [*row, [*left_out], self.args] if left_out or self.args else row

    def _must_validate(self, state: dict[str, Any]) -> bool:
        for name, field in self.excluded.items():
            if field.is_required():
                raise SerializationError(
                    f"field {name!r} of {_dotted(self.key)} is required and excluded from serialization, "
                    "so it could not be loaded again: give it a default"
                )
            default = field.get_default()
            if type(state.get(name)) is not type(default) or state.get(name) != default:
                return True
        return False

    @staticmethod
    def _private(obj: Any) -> dict[str, Any] | None:
        private = obj.__pydantic_private__
        return private and {name: value for name, value in private.items() if value is not _UNDEFINED}

    def fallback(self, obj: Any, packs: Callable[[Any], bool]) -> list[Any] | None:
        """Without the private attributes that cannot be stored, which the class makes anew; or as the author's
        field serializers write it, if its validators read that."""
        private = self._private(obj) or {}
        kept = {name: value for name, value in private.items() if packs(value)}
        if packs(row := self._row(obj, kept, private.keys() - kept.keys())):
            return row
        row[2:4] = BaseModel.model_dump(obj, warnings=False), "model_dump"
        try:
            again = self.load(PYDANTIC_V2, row)
        except (MemStateError, ValueError, TypeError):
            return None
        fields = ((again.__dict__.get(name), obj.__dict__.get(name)) for name in self.stored)
        return row if all(type(new) is type(old) for new, old in fields) else None

    def load(self, code: int, row: list[Any]) -> Any:
        if code != PYDANTIC_V2:
            raise TypeError(f"it is not stored that way (extension code {code})")
        fields, stamp, names_set, extra, private, left_out, args = [*row[2:9], *_ABSENT[len(row) - 2 :]][:7]
        if args:
            shape = shape_of(self.model[tuple(map(resolve, args))])
            return shape.load(code, [*row[:8], None])
        if stamp == self.stamp and self.restorable and fields.keys() <= self.stored:
            obj = object.__new__(self.model)
            for name, field in self.excluded.items():
                fields[name] = field.get_default(call_default_factory=True, validated_data=fields)
            _set(obj, "__dict__", fields)
            _set(obj, "__pydantic_fields_set__", set(names_set))
            _set(obj, "__pydantic_extra__", extra)
            _set(obj, "__pydantic_private__", private)
            if not left_out:
                return obj
            obj.model_post_init(None)
        else:
            obj = self._validated(fields, stamp, extra)
        if private and obj.__pydantic_private__ is not None:
            known = obj.__private_attributes__
            obj.__pydantic_private__.update({k: v for k, v in private.items() if k in known})
        return obj

    def _validated(self, fields: Any, stamp: Any, extra: dict[str, Any] | None) -> BaseModel:
        cls = self.model
        dumped = type(stamp) is str
        if cls.__pydantic_root_model__:
            data = fields if dumped else fields["root"]
        else:
            computed = cls.model_computed_fields if dumped else ()
            data = {k: v for k, v in {**(extra or {}), **fields}.items() if k not in computed}
        if not self.restorable:
            return cls(**data)
        try:
            return cls.__pydantic_validator__.validate_python(data, by_alias=True, by_name=True)
        except ValidationError as exc:
            faults = exc.errors(include_url=False, include_context=False, include_input=False)
            listed = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in faults)
            raise ValueError(f"the class no longer accepts the stored fields: {listed}") from exc

    def declared(self) -> Iterable[Any]:
        return [field.annotation for field in self.model.model_fields.values()]


_ABSENT = [None] * 7
_UNDEFINED = pydantic.fields.PydanticUndefined
_set = object.__setattr__


class ModelV1Shape(Shape):
    """Row: `{attribute: value}, [fields set], private`. Rows of upstream have the first of them only."""

    code = PYDANTIC_V1

    def dump(self, obj: Any, pack: Pack) -> tuple[int, list[Any]]:
        return PYDANTIC_V1, [*self.key, obj.__dict__, sorted(obj.__fields_set__), self._private(obj)]

    def fallback(self, obj: Any, packs: Callable[[Any], bool]) -> list[Any] | None:
        private = {name: value for name, value in self._private(obj).items() if packs(value)}
        return [*self.key, obj.__dict__, sorted(obj.__fields_set__), private]

    @staticmethod
    def _private(obj: Any) -> dict[str, Any]:
        missing = object()
        values = ((name, getattr(obj, name, missing)) for name in obj.__private_attributes__)
        return {name: value for name, value in values if value is not missing}

    def load(self, code: int, row: list[Any]) -> Any:
        payload = self._payload(code, row, dict)
        cls: Any = self.cls
        fields = cls.__fields__
        unknown = payload.keys() - fields.keys()
        if len(row) < 5 or fields.keys() - payload.keys() or (unknown and cls.__config__.extra != "allow"):
            return cls(**{fields[k].alias if k in fields else k: v for k, v in payload.items()})
        obj = object.__new__(cls)
        _set(obj, "__dict__", payload)
        _set(obj, "__fields_set__", set(row[3]))
        obj._init_private_attributes()
        for name in cls.__private_attributes__.keys() & row[4].keys():
            _set(obj, name, row[4][name])
        return obj

    def declared(self) -> Iterable[Any]:
        cls: Any = self.cls
        return [field.outer_type_ for field in cls.__fields__.values()]
