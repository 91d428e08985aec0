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
import pathlib
import re
import sys
import types
import typing
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from pydantic_core import PydanticUndefined

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

# Extension codes: those of JsonPlusSerializer with the meaning they have there, then our own.
SINGLE, POSITIONAL, KEYWORDS, METHOD, PYDANTIC_V1, PYDANTIC_V2, NUMPY_ARRAY, DELTA_SNAPSHOT = range(8)
TUPLE = 32

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

# As the interpreter reads them: no `__getattribute__` of a module, class or metaclass can step in.
_module_names: Callable[[Any], dict[str, Any]] = vars(types.ModuleType)["__dict__"].__get__
_class_names: Callable[[Any], Mapping[str, Any]] = vars(type)["__dict__"].__get__
_mro: Callable[[Any], tuple[type, ...]] = vars(type)["__mro__"].__get__


def find(key: Key) -> Any:
    """What the application has loaded under that name, or None. Runs no code of what it walks through."""
    try:
        found: Any = sys.modules[key[0]]
        names: Mapping[str, Any] = _module_names(found)
        for name in key[1].split("."):
            found = names[name]
            names = _class_names(found)  # TypeError: not a class
    except (KeyError, TypeError):
        return None
    return found


def _is_subclass(cls: type, base: type) -> bool:
    return any(each is base for each in _mro(cls))


def _made_plainly(cls: Any) -> bool:
    return cls.__new__ is object.__new__


def _class_attribute(cls: type, name: str) -> Any:
    return next((names[name] for each in _mro(cls) if name in (names := _class_names(each))), None)


# --- Shapes: how the instances of one class are taken apart and put together ------------------------------


class Shape:
    """A data type. Rows hold `[module, qualified name, payload, *more]`; more is what upstream does not know."""

    code = KEYWORDS
    unproven = False  # whether the first row written must be read back, as the class may not allow it

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
        return SINGLE, [*self.key, obj._value_]

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
        self.restorable = _made_plainly(cls)
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
        state = object.__getstate__(obj)
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
        if others is None or not self.restorable:
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
            self.unproven = True
        fields = cls.model_fields
        self.excluded = {name: field for name, field in fields.items() if field.exclude}
        self.stored = {name: None for name in fields if name not in self.excluded}.keys()
        names_and_types = [(name, describe(field.annotation)) for name, field in fields.items()]
        self.stamp = zlib.crc32(repr(names_and_types).encode())
        self.restorable = _made_plainly(cls)

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
        return private and {name: value for name, value in private.items() if value is not PydanticUndefined}

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
        fields, stamp, names_set, extra, private, left_out, args = (row + _ABSENT)[2:9]
        if args:
            concrete: Any = self.home
            shape = shape_of(concrete[tuple(map(resolve, args))])
            if shape is None:
                raise TypeError("its type arguments do not make a model of it")
            return shape.load(code, row[:8])
        if stamp == self.stamp and self.restorable and fields.keys() <= self.stored:
            obj = object.__new__(self.model)
            for name, field in self.excluded.items():
                fields[name] = field.get_default(call_default_factory=True, validated_data=fields)
            _set(obj, "__dict__", fields)
            _set(obj, "__pydantic_fields_set__", set(names_set))
            _set(obj, "__pydantic_extra__", extra)
            if not left_out:
                _set(obj, "__pydantic_private__", private)
                return obj
            _set(obj, "__pydantic_private__", None)
            obj.model_post_init(None)
        else:
            obj = self._validated(fields, stamp, extra)
            if names_set is not None:
                _set(obj, "__pydantic_fields_set__", obj.__pydantic_fields_set__ & set(names_set))
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
            obj: BaseModel = cls.__pydantic_validator__.validate_python(data, by_alias=True, by_name=True)
            return obj
        except ValidationError as exc:
            faults = exc.errors(include_url=False, include_context=False, include_input=False)
            listed = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in faults)
            raise ValueError(f"the class no longer accepts the stored fields: {listed}") from exc

    def declared(self) -> Iterable[Any]:
        return [field.annotation for field in self.model.model_fields.values()]


_ABSENT = [None] * 6
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


def describe(annotation: Any) -> Any:
    """A type expression as nested lists of names that `resolve` turns back; what has no name gives its kind."""
    if annotation is Ellipsis:
        return "..."
    origin = get_origin(annotation)
    if origin is Literal:
        return ["typing", "Literal", list(get_args(annotation))]
    if origin is Union or origin is types.UnionType:
        return ["typing", "Union", [describe(arg) for arg in get_args(annotation)]]
    if origin is not None:
        alias = ("typing", getattr(annotation, "__name__", ""))  # typing.List[int] is not list[int]
        name = alias if annotation.__module__ == "typing" and alias in _TYPE_FORMS else describe(origin)[:2]
        args = get_args(annotation)
        return [*name, [describe(arg) for arg in args]] if args else [*name]
    if isinstance(annotation, type):
        generic = vars(annotation).get("__pydantic_generic_metadata__") or {}
        if generic.get("origin") is not None:
            return [*describe(generic["origin"])[:2], [describe(arg) for arg in generic["args"]]]
        return [annotation.__module__, annotation.__qualname__]
    return type(annotation).__name__


_OLD_ALIASES: tuple[Any, ...] = (typing.List, typing.Dict, typing.Set, typing.FrozenSet, typing.Tuple)  # noqa: UP006
_TYPE_FORMS: dict[Key, Any] = {
    ("typing", "Any"): Any,
    ("typing", "Union"): Union,
    **{("typing", form.__name__): form for form in _OLD_ALIASES},
    ("builtins", "NoneType"): types.NoneType,
    ("builtins", "bool"): bool,
}
_GENERIC_CONTAINERS = (list, dict, set, frozenset, tuple, deque)


def resolve(described: Any) -> Any:
    """The type that `describe` took apart. Only data types are found, only known generics are subscribed."""
    if described == "...":
        return Ellipsis
    if type(described) is not list or len(described) not in (2, 3):
        raise DeserializationError(f"A type argument cannot be named: {described!r}")
    key = (described[0], described[1])
    if key == ("typing", "Literal"):
        return Literal[tuple(described[2])]
    found: Any = _TYPE_FORMS.get(key) or loaded_shape(key).cls
    if len(described) == 2:
        return found
    generic = key in _TYPE_FORMS or any(found is each for each in _GENERIC_CONTAINERS)
    if not generic and not _is_subclass(found, BaseModel):
        raise DeserializationError(f"{_dotted(key)} takes no type arguments here.")
    return found[tuple(map(resolve, described[2]))]


# --- Values: types with a constructor that takes plain values ----------------------------------------------

Arguments = tuple[list[Any], dict[str, Any]]


class Value(NamedTuple):
    """How one value type is written, `(code, payload, *more)`, and which arguments a row may pass to it."""

    base: type
    write: Callable[[Any, Pack], tuple[Any, ...]]
    accept: Callable[[list[Any], dict[str, Any]], Arguments]


def _takes(*kinds: type | tuple[type, ...], at_least: int | None = None) -> Callable[..., Arguments]:
    """Positional arguments of exactly these types: a constructor fed with another type may do anything, such as
    looking up a codec, or materialising a huge range."""

    def accept(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
        least = len(kinds) if at_least is None else at_least
        pairs = zip(args, kinds, strict=False)
        fits = all(type(a) in (k if isinstance(k, tuple) else (k,)) for a, k in pairs)
        if kwargs or not fits or not least <= len(args) <= len(kinds):
            raise TypeError("its arguments have the wrong types")
        return args, kwargs

    return accept


def _names(*names: str) -> Callable[..., Arguments]:
    def accept(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
        if args or kwargs.keys() - set(names):
            raise TypeError("its arguments have the wrong names")
        return args, kwargs

    return accept


def _accept_int(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
    args, _ = _takes((int, str))(args, kwargs)
    return ([args[0], 16] if type(args[0]) is str else args), {}


def _accept_parts(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
    return _takes(*[str] * len(args))(args, kwargs)


_DATETIME = ("year", "month", "day", "hour", "minute", "second", "microsecond")


def _accept_send(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
    if len(args) == 3:  # as upstream stores a timeout
        return args[:2], {"timeout": args[2]}
    return args, kwargs


_FACTORIES: dict[str | None, Any] = {
    None: None,
    **{each.__name__: each for each in (list, dict, set, int, float, str, bool, tuple, bytes, deque)},
}


def _write_defaultdict(obj: defaultdict[Any, Any], pack: Pack) -> tuple[Any, ...]:
    name = next((n for n, each in _FACTORIES.items() if each is obj.default_factory), "")
    if name == "":
        raise SerializationError(
            f"a defaultdict whose default factory is {obj.default_factory!r} cannot be stored; "
            "use a built-in type such as list or int, or a plain dict"
        )
    return POSITIONAL, [name, dict.copy(obj)]


def _accept_defaultdict(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
    (name, items), kwargs = _takes((str, types.NoneType), (dict, list))(args, kwargs)
    return [_FACTORIES[name], items], kwargs


def _write_int(obj: int, pack: Pack) -> tuple[Any, ...]:
    plain = int.__index__(obj)
    return SINGLE, plain if -(2**63) <= plain < 2**64 else hex(plain)


def _write_set(obj: set[Any] | frozenset[Any], pack: Pack) -> tuple[Any, ...]:
    return SINGLE, [ormsgpack.Fragment(each) for each in sorted(map(pack, tuple(obj)))]


def _zone(obj: datetime | time) -> tzinfo | None:
    if obj.tzinfo is None or type(obj.tzinfo) in (timezone, ZoneInfo):
        return obj.tzinfo
    offset = obj.utcoffset()
    if offset is None:
        raise SerializationError(f"the time zone of {obj!r} has no offset and cannot be stored")
    return timezone(offset)


def _write_datetime(obj: datetime, pack: Pack) -> tuple[Any, ...]:
    if type(obj) is datetime and not obj.fold and type(obj.tzinfo) is not ZoneInfo:
        return METHOD, obj.isoformat(), "fromisoformat"
    clock = {name: getattr(obj, name) for name in _DATETIME}
    return KEYWORDS, {**clock, "tzinfo": _zone(obj), "fold": obj.fold}


def _write_time(obj: time, pack: Pack) -> tuple[Any, ...]:
    clock = {name: getattr(obj, name) for name in _DATETIME[3:]}
    return KEYWORDS, {**clock, "tzinfo": _zone(obj), "fold": obj.fold}


def _write_zone(obj: ZoneInfo, pack: Pack) -> tuple[Any, ...]:
    if obj.key is None:
        raise SerializationError("a ZoneInfo made from a file without a key cannot be stored")
    return SINGLE, obj.key


def _write_send(obj: Send, pack: Pack) -> tuple[Any, ...]:
    timeout = getattr(obj, "timeout", None)
    return POSITIONAL, [obj.node, obj.arg] if timeout is None else [obj.node, obj.arg, timeout]


def _write_slots(*slots: str) -> Callable[[Any, Pack], tuple[Any, ...]]:
    return lambda obj, pack: (KEYWORDS, {name: getattr(obj, name) for name in slots})


def _single(plain: Callable[[Any], Any]) -> Callable[[Any, Pack], tuple[Any, ...]]:
    return lambda obj, pack: (SINGLE, plain(obj))


def _positional(plain: Callable[[Any], Any]) -> Callable[[Any, Pack], tuple[Any, ...]]:
    return lambda obj, pack: (POSITIONAL, list(plain(obj)))


_ITEM = ("value", "key", "namespace", "created_at", "updated_at")
_ADDRESSES = (IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network)
_URLS = [c for c in vars(pydantic.networks).values() if isinstance(c, type) and issubclass(c, AnyUrl)]

# Ordered so that a class comes before its bases. A subclass is built with the __new__ and __init__ of its base.
_VALUES = [
    Value(OrderedDict, _single(lambda o: list(map(list, o.items()))), _takes((list, dict))),
    Value(defaultdict, _write_defaultdict, _accept_defaultdict),
    Value(dict, _single(dict.copy), _takes((dict, list))),
    Value(list, _single(list.copy), _takes(list)),
    Value(tuple, _single(lambda o: list(tuple.__iter__(o))), _takes(list)),
    Value(set, _write_set, _takes(list)),
    Value(frozenset, _write_set, _takes(list)),
    Value(deque, _positional(lambda o: (list(o), o.maxlen)), _takes(list, (int, types.NoneType), at_least=1)),
    Value(str, _single(str.__str__), _takes(str)),
    Value(bytes, _single(lambda o: memoryview(o).tobytes()), _takes(bytes)),
    Value(int, _write_int, _accept_int),
    Value(float, _single(float.__float__), _takes(float)),
    Value(complex, _positional(lambda o: (o.real, o.imag)), _takes(float, float)),
    Value(range, _positional(lambda o: (o.start, o.stop, o.step)), _takes(int, int, int)),
    Value(Decimal, _single(Decimal.__str__), _takes(str)),
    Value(Fraction, _positional(lambda o: (o.numerator, o.denominator)), _takes(int, int)),
    Value(datetime, _write_datetime, _names(*_DATETIME, "tzinfo", "fold")),
    Value(date, _positional(lambda o: (o.year, o.month, o.day)), _takes(int, int, int)),
    Value(time, _write_time, _names(*_DATETIME[3:], "tzinfo", "fold")),
    Value(timedelta, _positional(lambda o: (o.days, o.seconds, o.microseconds)), _takes(int, int, int)),
    Value(timezone, _positional(lambda o: o.__getinitargs__()), _takes(timedelta, str, at_least=1)),
    Value(ZoneInfo, _write_zone, _takes(str)),
    Value(UUID, _single(lambda o: o.hex), _takes(str)),
    Value(PurePath, _positional(lambda o: o.parts), _accept_parts),
    *(Value(each, _single(str), _takes(str)) for each in _ADDRESSES),
    *(Value(each, _single(str), _takes(str)) for each in _URLS),
    Value(SecretStr, _single(lambda o: o.get_secret_value()), _takes(str)),
    Value(SecretBytes, _single(lambda o: o.get_secret_value()), _takes(bytes)),
    Value(Secret, _single(lambda o: o.get_secret_value()), lambda args, kwargs: (args, {})),
    Value(Send, _write_send, _accept_send),
    Value(SearchItem, _write_slots(*_ITEM, "score"), _names(*_ITEM, "score")),
    Value(Item, _write_slots(*_ITEM), _names(*_ITEM)),
]


class ValueShape(Shape):
    """Row: what `Value.write` gave, and for an instance of a subclass its other attributes."""

    def __init__(self, cls: type, value: Value, *, known: bool = False) -> None:
        super().__init__(cls)
        self.value = value
        self.unproven = not known

    def dump(self, obj: Any, pack: Pack) -> tuple[int, list[Any]]:
        code, *payload = self.value.write(obj, pack)
        attributes = getattr(obj, "__dict__", None) if self.key not in _FIXED else None
        return code, [*self.key, *payload, *([attributes] if attributes else [])]

    def load(self, code: int, row: list[Any]) -> Any:
        payload = row[2]
        if code == METHOD and row[3:] == ["fromisoformat"] and self.cls is datetime and type(payload) is str:
            return datetime.fromisoformat(payload)
        if code == SINGLE:
            args, kwargs = self.value.accept([payload], {})
        elif code == POSITIONAL and type(payload) is list:
            args, kwargs = self.value.accept(payload, {})
        elif code == KEYWORDS and type(payload) is dict:
            args, kwargs = self.value.accept([], payload)
        else:
            raise TypeError(f"it is not stored that way (extension code {code})")
        base: Any = self.value.base
        if self.cls is base:
            return base(*args, **kwargs)
        obj: Any = (
            object.__new__(self.cls) if _made_plainly(base) else base.__new__(self.cls, *args, **kwargs)
        )
        if base.__init__ is not object.__init__:
            base.__init__(obj, *args, **kwargs)
        if len(row) > 3:
            object.__getattribute__(obj, "__dict__").update(row[3])
        return obj


class PatternShape(Shape):
    def dump(self, obj: Any, pack: Pack) -> tuple[int, list[Any]]:
        return POSITIONAL, ["re", "compile", [obj.pattern, obj.flags]]

    def load(self, code: int, row: list[Any]) -> Any:
        pattern, flags = row[2]
        if code != POSITIONAL or type(pattern) not in (str, bytes) or type(flags) is not int:
            raise TypeError("its arguments have the wrong types")
        return re.compile(pattern, flags & ~re.DEBUG)  # DEBUG prints


def _fixed_shapes() -> dict[Key, Shape]:
    by_base = {value.base: value for value in _VALUES}
    shapes: list[Shape] = [ValueShape(base, value, known=True) for base, value in by_base.items()]
    shapes.append(ValueShape(Counter, by_base[dict], known=True))
    paths = [each for each in vars(pathlib).values() if isinstance(each, type) and issubclass(each, PurePath)]
    shapes += [ValueShape(each, by_base[PurePath], known=True) for each in paths]
    fixed = {shape.key: shape for shape in shapes}
    here = fixed[(Path().__class__.__module__, Path().__class__.__qualname__)]
    for module in ("pathlib", "pathlib._local"):  # the name depends on the Python version that wrote the row
        fixed |= {(module, each.__name__): fixed[(each.__module__, each.__qualname__)] for each in paths}
        fixed[(module, "Path")] = here
    return {**fixed, ("re", "compile"): PatternShape(re.Pattern)}


_FIXED = _fixed_shapes()
_FIXED_CLASSES = {shape.cls: shape for shape in _FIXED.values()}
_BASES = {id(value.base): value for value in _VALUES}  # by identity: a metaclass may define __hash__
_ALWAYS_ALLOWED = SAFE_MSGPACK_TYPES | _FIXED.keys()

_shapes: dict[Key, Shape] = {}  # a shape is used only while its name still leads to its class
_MOST_SHAPES = 4096


def classify(cls: type) -> Shape | None:
    mro = _mro(cls)
    pydantic_v1, numpy = sys.modules.get("pydantic.v1.main"), sys.modules.get("numpy")
    if numpy is not None and _is_subclass(cls, numpy.generic):
        return None  # some derive from str or float, and cannot be built as such
    for base in mro:
        if base is enum.Enum:
            return EnumShape(cls)
        if base is BaseModel:
            return ModelShape(cls)
        if pydantic_v1 is not None and base is pydantic_v1.BaseModel:
            return ModelV1Shape(cls)
    if _is_subclass(cls, tuple) and type(_class_attribute(cls, "_fields")) is tuple:
        return NamedTupleShape(cls)
    for base in mro:
        if id(base) in _BASES:
            return ValueShape(cls, _BASES[id(base)])
        if any(type(each) is types.MemberDescriptorType for each in _class_names(base).values()):
            break  # a subclass with slots of its own: they would be lost
    if type(_class_attribute(cls, "__dataclass_fields__")) is dict:
        return DataclassShape(cls)
    return None


def _remember(key: Key, shape: Shape) -> Shape:
    if len(_shapes) >= _MOST_SHAPES:
        _shapes.clear()
    if getattr(shape.cls, "__pydantic_complete__", True):  # fields of an unfinished model are still to change
        _shapes[key] = shape
    return shape


def shape_of(cls: type) -> Shape | None:
    key = (cls.__module__, cls.__qualname__)
    known = _shapes.get(key)
    if known is not None and known.cls is cls:
        return known
    shape = classify(cls)
    return shape and _remember(key, shape)


def loaded_shape(key: Key) -> Shape:
    """The data type that a row names."""
    if (fixed := _FIXED.get(key)) is not None:
        return fixed
    found = find(key)
    known = _shapes.get(key)
    if known is not None and known.cls is found:
        return known
    if found is None:
        raise DeserializationError(_why_not_found(key))
    shape = classify(found)
    if shape is None:
        raise DeserializationError(
            f"Refused to load {_dotted(key)}: it is a class, but not a data type "
            "(Pydantic model, dataclass, enum, named tuple or known value type)."
        )
    return _remember(key, shape)


def _dotted(key: Iterable[str]) -> str:
    return ".".join(key)


def _why_not_found(key: Key) -> str:
    module, name = key
    if module not in sys.modules:
        return f"{_dotted(key)} cannot be loaded: import the module {module!r} before reading."
    return (
        f"Refused to load {_dotted(key)}: the loaded module {module!r} has no class {name!r}. If it was moved "
        "or renamed, keep the old name as an alias."
    )


# --- Writing -----------------------------------------------------------------------------------------------

_AS_TEXT = (
    ormsgpack.OPT_PASSTHROUGH_BIG_INT
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
    | ormsgpack.OPT_REPLACE_SURROGATES
)
_ANY_KEY = _AS_TEXT | ormsgpack.OPT_NON_STR_KEYS
_PLAIN_KEYS = {str, float, bool, types.NoneType, bytes}


class _OddKeys(Exception):
    """Some dictionary has keys other than text: the encoder would turn an enum, UUID or date into text."""


class _Writer:
    """Packs one value. The encoder hides what its hook raises, so the first error is kept here."""

    __slots__ = ("any_key", "culprit", "depth", "error", "shapes")

    def __init__(self, any_key: bool = False) -> None:
        self.any_key = any_key
        self.depth = 0
        self.error: BaseException | None = None
        self.culprit: Any = None
        self.shapes: dict[type, Shape] = {}  # each type is looked up once a value

    def pack(self, value: Any) -> bytes:
        try:
            if self.any_key:
                plain = value if _all_plain(value) else self._with_plain_keys(value)
                return ormsgpack.packb(plain, self.extension, _ANY_KEY)
            return ormsgpack.packb(value, self.extension, _AS_TEXT)
        except ormsgpack.MsgpackEncodeError as exc:
            if self.error is None:
                self.error = SerializationError(str(exc)) if self.any_key else _OddKeys()
            raise self.error from None

    def packs(self, value: Any) -> bool:
        try:
            self.pack(value)
        except SerializationError:
            self.error = None
            return False
        return True

    def extension(self, obj: Any) -> Any:
        self.depth += 1
        try:
            if self.depth > MAX_TYPED_DEPTH:
                raise SerializationError(f"typed values nest deeper than {MAX_TYPED_DEPTH} levels")
            cls = type(obj)
            if cls is tuple:
                return ormsgpack.Ext(TUPLE, self.pack(list(obj)))
            if cls is _DeltaSnapshot:
                return ormsgpack.Ext(DELTA_SNAPSHOT, self.pack(obj.value))
            shape = self.shapes.get(cls)
            if shape is None:
                shape = _FIXED_CLASSES.get(cls) or _writable_shape(cls)
                if shape is None:
                    return self._other(obj)
                self.shapes[cls] = shape
            return ormsgpack.Ext(*self._shaped(shape, obj))
        except BaseException as exc:
            if self.error is None:
                self.error, self.culprit = exc, obj
            raise
        finally:
            self.depth -= 1

    def _shaped(self, shape: Shape, obj: Any) -> tuple[int, bytes]:
        code = shape.code
        try:
            code, row = shape.dump(obj, self.pack)
            packed = self.pack(row)
        except SerializationError as exc:
            culprit = obj if self.error is None else self.culprit
            self.error = None
            other = shape.fallback(obj, self.packs)
            if other is None or not self.packs(other):
                self.error, self.culprit = exc, culprit
                raise
            packed = self.pack(other)
        if shape.unproven:
            _prove(shape, code, packed)
        return code, packed

    def _other(self, obj: Any) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(obj, (numpy.ndarray, numpy.generic)):
            return ormsgpack.Ext(NUMPY_ARRAY, self.pack(_array_row(obj)))
        if isinstance(obj, BaseException):
            return repr(obj)
        what = (
            f"the class {_dotted(_name(obj))} itself" if isinstance(obj, type) else _dotted(_name(type(obj)))
        )
        raise SerializationError(
            f"{what} is not a data type (Pydantic model, dataclass, enum, named tuple or known value type)"
        )

    def _with_plain_keys(self, value: Any) -> Any:
        """`value` with every dictionary that has other keys than plain ones made an extension of pairs."""
        if type(value) is list:
            return [self._with_plain_keys(each) for each in value]
        if type(value) is not dict:
            return value
        if _plain(value):
            return {key: self._with_plain_keys(each) for key, each in value.items()}
        pairs = [[key, each] for key, each in value.items()]
        return ormsgpack.Ext(SINGLE, self.pack(["builtins", "dict", pairs]))


def _plain(keys: Iterable[Any]) -> bool:
    """Whether the encoder keeps these dictionary keys as they are."""
    kinds = set(map(type, keys))
    if kinds <= _PLAIN_KEYS:
        return True
    if not kinds <= _PLAIN_KEYS | {int, tuple}:
        return False
    return all(
        _plain(key) if type(key) is tuple else type(key) is not int or -(2**63) <= key < 2**64 for key in keys
    )


def _all_plain(value: Any) -> bool:
    if type(value) is dict:
        return _plain(value) and all(map(_all_plain, value.values()))
    return type(value) is not list or all(map(_all_plain, value))


def _dumps(value: Any) -> bytes:
    writer = _Writer()
    try:
        try:
            return writer.pack(value)
        except _OddKeys:
            writer = _Writer(any_key=True)
            return writer.pack(value)
    except RecursionError as exc:
        raise SerializationError(
            "The value cannot be stored: it nests too deeply, or contains itself."
        ) from exc
    except Exception as exc:
        path = _path_to(value, writer.culprit) if writer.culprit is not None else ""
        where = f"The value at {path}" if path else "The value"
        raise SerializationError(f"{where} cannot be stored: {exc}.") from exc


def _name(cls: type) -> Key:
    return cls.__module__, cls.__qualname__


def _writable_shape(cls: type) -> Shape | None:
    """The shape of a class that a reader will find again under its name."""
    shape = shape_of(cls)
    if shape is None:
        return None
    found = find(shape.key)
    # A class of the same name and kind is taken for it: the cell of a notebook that defines it was run again.
    if found is shape.home or (found is not None and type(classify(found)) is type(shape)):
        return shape
    raise SerializationError(
        f"{_dotted(shape.key)} could not be found again by that name: define the class at the top level of a "
        "module, or inside such a class"
    )


def _prove(shape: Shape, code: int, packed: bytes) -> None:
    try:
        _Reader(lambda _: None).value(ormsgpack.packb(ormsgpack.Ext(code, packed)))
    except MemStateError as exc:
        raise SerializationError(f"{_dotted(shape.key)} could not be loaded again: {exc}") from exc
    shape.unproven = False


def _array_row(array: Any) -> list[Any]:
    dtype = array.dtype
    numpy = sys.modules["numpy"]
    if (
        dtype.hasobject
        or dtype.names
        or not (type(array) is numpy.ndarray or isinstance(array, numpy.generic))
    ):
        raise SerializationError(
            f"{_dotted(_name(type(array)))} of dtype {dtype} cannot be stored: only plain arrays of numbers, "
            "text, bytes, dates and booleans can"
        )
    scalar = type(array) is not numpy.ndarray
    fortran = not scalar and array.flags.f_contiguous and not array.flags.c_contiguous
    order = "F" if fortran else "C"
    return [dtype.str, None if scalar else list(array.shape), order, array.tobytes(order)]


def _path_to(value: Any, culprit: Any) -> str:
    """Where in `value` the culprit is, such as `['messages'][3].artifact`."""
    seen: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque([("", value)])
    while waiting:
        path, each = waiting.popleft()
        if each is culprit:
            return path
        if id(each) not in seen:
            seen.add(id(each))
            waiting.extend((path + step, child) for step, child in _children(each))
    return ""


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", child) for key, child in value.items())
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f"[{index}]", child) for index, child in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from (("{...}", child) for child in value)
    elif shape_of(type(value)) is not None:
        state = object.__getstate__(value)
        for part in state if type(state) is tuple else (state,):
            if isinstance(part, dict):
                names = {k: v for k, v in part.items() if not k.startswith("__")}
                nested = (v for k, v in part.items() if k.startswith("__") and isinstance(v, dict))
                for attributes in (names, *nested):
                    yield from ((f".{name}", child) for name, child in attributes.items())


# --- Reading -----------------------------------------------------------------------------------------------


class _Reader:
    """Unpacks one value. The decoder hides what its hook raises, so the first error is kept here."""

    __slots__ = ("allow", "depth", "error", "open", "shapes")

    def __init__(self, allow: Callable[[Key], None]) -> None:
        self.allow = allow
        self.depth = 0
        self.open = 0
        self.shapes: dict[Key, Shape] = {}  # each type is looked up once a value
        self.error: BaseException | None = None

    def value(self, data: bytes | bytearray | memoryview) -> Any:
        try:
            return ormsgpack.unpackb(data, ext_hook=self.extension, option=ormsgpack.OPT_NON_STR_KEYS)
        except Exception as exc:
            error = self.error or exc
            if isinstance(error, MemStateError) or not isinstance(error, Exception):
                raise error from error.__cause__
            if isinstance(error, RecursionError):
                raise DeserializationError("A row nests too deeply to be read from here.") from error
            raise CorruptRowError(f"A row is not what a writer of ours stores: {error}.") from error

    def extension(self, code: int, data: bytes) -> Any:
        self.depth += 1
        opened = 0
        try:
            if self.depth > FREE_TYPED_DEPTH:
                opened = _open_containers(data)
                self.open += opened
                if self.depth > MAX_TYPED_DEPTH or self.open > MAX_OPEN_CONTAINERS:
                    raise CorruptRowError("A row nests deeper than any value that is stored.")
            row = ormsgpack.unpackb(data, ext_hook=self.extension, option=ormsgpack.OPT_NON_STR_KEYS)
            return self._made(code, row)
        except BaseException as exc:
            if self.error is None:
                self.error = exc
            raise
        finally:
            self.depth -= 1
            self.open -= opened

    def _made(self, code: int, row: Any) -> Any:
        if code == TUPLE and type(row) is list:
            return tuple(row)
        if code == DELTA_SNAPSHOT:
            return _DeltaSnapshot(row)
        if code == NUMPY_ARRAY:
            return _array(row)
        named = type(row) is list and len(row) > 2 and type(row[0]) is str and type(row[1]) is str
        if not named or not SINGLE <= code <= PYDANTIC_V2:
            raise CorruptRowError(f"Extension code {code} of a row holds nothing that a writer of ours stores.")
        key = (row[0], row[1])
        shape = self.shapes.get(key)
        if shape is None:
            self.allow(key)
            shape = self.shapes[key] = loaded_shape(key)
        return _load(shape, key, code, row)


def _load(shape: Shape, key: Key, code: int, row: list[Any]) -> Any:
    try:
        return shape.load(code, row)
    except MemStateError:
        raise
    except Exception as exc:
        raise DeserializationError(
            f"{_dotted(key)} cannot be made from what is stored: {exc} ({type(exc).__name__})."
        ) from exc


def _open_containers(data: bytes) -> int:
    """How many containers are open at once while this is unpacked, what its extensions hold not counted."""
    if len(data) < 64:
        return len(data)  # cannot be more
    waiting = [(1, ormsgpack.unpackb(data, ext_hook=lambda *_: None, option=ormsgpack.OPT_NON_STR_KEYS))]
    deepest = 1
    while waiting:
        depth, value = waiting.pop()
        deepest = max(deepest, depth)
        if type(value) is dict:
            waiting.extend((depth + 1, each) for each in (*value, *value.values()))
        elif type(value) in (list, tuple):
            waiting.extend((depth + 1, each) for each in value)
    return deepest


_DTYPE = re.compile(r"[<>|=]?[biufcmMSUV]\d*(\[\w+\])?")


def _array(row: Any) -> Any:
    import numpy  # a dependency of this package: it is there whatever the row says

    try:
        dtype_name, shape, order, data = row
        if not _DTYPE.fullmatch(dtype_name) or order not in ("C", "F") or type(data) is not bytes:
            raise ValueError("not the description of an array")
        dtype = numpy.dtype(dtype_name)
        array = numpy.ndarray(tuple(shape or ()), dtype, data, order=order)
        if array.nbytes != len(data):
            raise ValueError("the buffer has another size")
        return array[()] if shape is None else array.copy("K")
    except Exception as exc:
        raise DeserializationError(f"numpy.ndarray cannot be made from what is stored: {exc}.") from exc


# --- The serializer ----------------------------------------------------------------------------------------

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
        given = (
            {} if allowed_msgpack_modules is _UNSET else {"allowed_msgpack_modules": allowed_msgpack_modules}
        )
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
        return "msgpack", _dumps(obj)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        kind, content = data
        if kind == "null":
            return None
        if not isinstance(content, (bytes, bytearray, memoryview)):
            raise CorruptRowError(f"A row of type {kind!r} holds {type(content).__name__} instead of bytes.")
        if kind == "msgpack":
            return _Reader(self._allow).value(content)
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
                f"Refused to load {_dotted(key)}: it is not in the allowlist (LANGGRAPH_STRICT_MSGPACK, or an "
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
        """Rows of the type "json": the format of LangGraph before msgpack."""
        try:
            return json.loads(data, object_hook=self._reviver)
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
        args, kwargs = value.get("args") or [], value.get("kwargs") or {}
        place = tuple(path)
        if version == 1:
            place = LC_REVIVER.import_mappings.get(place, place)
        key = (_dotted(place[:-1]), place[-1])
        if kind != "constructor" or (version == 1 and key not in SAFE_MSGPACK_TYPES):
            raise DeserializationError(
                f"Refused to load {_dotted(key)}: of LangChain's JSON only messages and documents are loaded."
            )
        if self._allowed_json_modules is not True and place not in (self._allowed_json_modules or ()):
            self._allow(key)
        shape = loaded_shape(key)
        if kwargs or not args:
            return _load(shape, key, shape.code, [*key, kwargs, "json"])
        if shape.cls is datetime:
            return _load(shape, key, METHOD, [*key, args[0], "fromisoformat"])
        if len(args) == 1:
            return _load(shape, key, SINGLE, [*key, args[0]])
        return _load(shape, key, POSITIONAL, [*key, args])


def _declared_by(allowed: Iterable[tuple[str, ...]]) -> frozenset[Key]:
    """The allowed types and all that their fields declare: upstream stores a model with its fields flattened
    into it, so that an allowlist for upstream names the outer model only."""
    listed = {(key[0], key[1].partition("[")[0]) for key in allowed if len(key) == 2}
    waiting = list(listed)
    while waiting:
        annotations: Iterable[Any] = ()
        with suppress(Exception):  # not loaded, or annotations that do not resolve: nothing is added
            annotations = list(loaded_shape(waiting.pop()).declared())
        found = {_name(cls) for each in annotations for cls in _classes_in(each)}
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
