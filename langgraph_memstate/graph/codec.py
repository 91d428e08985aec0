"""The serializer of the checkpointer: values of any data type to bytes and back, and nothing else.

A row names the types of what it holds, so whoever can write a row chooses what reading it touches. Upstream's
`JsonPlusSerializer` imports the named module and calls the named attribute. Here a name only *selects*:

* A module must already be loaded, and a class is looked up in the plain dictionaries of modules and classes.
* What is found must be a data type (it has a `Shape`): a Pydantic model, dataclass, enum or named tuple, one
  of a table of value types, or a subclass of one. Anything else is refused before it is called.
* An object gets back the state it had. Constructors and validators do not run, unless the class has changed
  since: then it validates what was stored.

A value that cannot be stored, or not be loaded again, raises an error that names its type and place; it never
turns into something else. Exceptions alone are stored as upstream stores them, as their `repr`. Two
differences are lost because the encoder does not show them: a `bytearray` *inside* a value comes back as
`bytes`, and a lone surrogate as `?`.

The bytes follow those of `JsonPlusSerializer`, and what it wrote can be read. Equal values give equal bytes
(sets are sorted), but for dictionaries, whose order is kept.
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
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import PurePath
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

# --- Shapes: how the instances of one data type are taken apart, and put together again ---------------------

Key = tuple[str, str]  # module, qualified name
Pack = Callable[[Any], bytes]
Row = list[Any]

# Extension codes: those of JsonPlusSerializer with the meaning they have there, then our own.
SINGLE, POSITIONAL, KEYWORDS, METHOD, PYDANTIC_V1, PYDANTIC_V2, NUMPY_ARRAY, DELTA_SNAPSHOT = range(8)
TUPLE = 32

# As the interpreter reads them: no `__getattribute__` of a module, class or metaclass can step in.
_module_names: Callable[[Any], dict[str, Any]] = vars(types.ModuleType)["__dict__"].__get__
class_names: Callable[[Any], Mapping[str, Any]] = vars(type)["__dict__"].__get__
mro: Callable[[Any], tuple[type, ...]] = vars(type)["__mro__"].__get__
put = object.__setattr__


def find(key: Key) -> Any:
    """The class that the application has loaded under that name, or None."""
    try:
        found: Any = sys.modules[key[0]]
        names: Mapping[str, Any] = _module_names(found)
        for name in [key[1]] if "[" in key[1] else key[1].split("."):  # a parameterised model is one name
            found = names[name]
            names = class_names(found)  # TypeError: not a class
    except (KeyError, TypeError):
        return None
    return found


def key_of(cls: type) -> Key:
    return cls.__module__, cls.__qualname__


def dotted(key: Iterable[str]) -> str:
    return ".".join(key)


def is_subclass(cls: type, base: type) -> bool:
    return any(each is base for each in mro(cls))


def class_attribute(cls: type, name: str) -> Any:
    return next((names[name] for each in mro(cls) if name in (names := class_names(each))), None)


def has_plain_new(cls: Any) -> bool:
    return cls.__new__ is object.__new__


def exactly(kind: type, value: Any) -> Any:
    """`value`, which must be exactly of that type: what else a row holds may be endless, as a network is."""
    if type(value) is not kind:
        raise TypeError(f"the row holds {type(value).__name__} instead of {kind.__name__}")
    return value


class Shape:
    """A data type. A row is `[module, qualified name, payload, *more]`; more is what upstream does not store."""

    code = KEYWORDS
    unproven = False  # True: the class may not allow what `load` does, so the first row is read back

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.home = cls  # the class that the stored name leads to
        self.key = key_of(cls)

    def dump(self, obj: Any, pack: Pack) -> tuple[int, Row]:
        raise NotImplementedError

    def fallback(self, obj: Any, packs: Callable[[Any], bool]) -> Row | None:
        """Another row, where `dump` gave one that cannot be packed."""
        return None

    def load(self, code: int, row: Row) -> Any:
        raise NotImplementedError

    def declared(self) -> Iterable[Any]:
        """The annotations of its fields."""
        return ()

    def payload(self, code: int, row: Row) -> dict[str, Any]:
        if code != self.code:
            raise TypeError(f"it is not stored that way (extension code {code})")
        fields: dict[str, Any] = exactly(dict, row[2])
        return fields


class EnumShape(Shape):
    code = SINGLE

    def dump(self, obj: Any, pack: Pack) -> tuple[int, Row]:
        return SINGLE, [*self.key, obj._value_]

    def load(self, code: int, row: Row) -> Any:
        if code != SINGLE or not self.cls._member_map_:  # type: ignore[attr-defined]
            raise TypeError("it is not an enum with members")
        return enum.EnumType.__call__(self.cls, row[2])


class NamedTupleShape(Shape):
    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.fields: tuple[str, ...] = class_attribute(cls, "_fields")
        self.defaults: dict[str, Any] = class_attribute(cls, "_field_defaults") or {}

    def dump(self, obj: Any, pack: Pack) -> tuple[int, Row]:
        fields = dict(zip(self.fields, tuple.__iter__(obj), strict=True))
        attributes = getattr(obj, "__dict__", None)  # of a subclass
        return KEYWORDS, [*self.key, fields, *([attributes] if attributes else [])]

    def load(self, code: int, row: Row) -> Any:
        fields = {**self.defaults, **self.payload(code, row)}
        if new := [name for name in self.fields if name not in fields]:
            raise ValueError(f"its field {new[0]!r} is new and has no default")
        obj: Any = tuple.__new__(self.cls, [fields[name] for name in self.fields])
        if len(row) > 3:
            object.__getattribute__(obj, "__dict__").update(exactly(dict, row[3]))
        return obj

    def declared(self) -> Iterable[Any]:
        return get_type_hints(self.cls).values()


class DataclassShape(Shape):
    """Row: `{field: value}, {other attribute: value} | None`. None: only the constructor can make the others."""

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.fields = {field.name: field for field in dataclasses.fields(cls)}
        self.slots = {
            name: slot
            for each in reversed(mro(cls))
            for name, slot in class_names(each).items()
            if type(slot) is types.MemberDescriptorType
        }

    def dump(self, obj: Any, pack: Pack) -> tuple[int, Row]:
        return KEYWORDS, [*self.key, *self._state(obj)]

    def fallback(self, obj: Any, packs: Callable[[Any], bool]) -> Row | None:
        fields, others = self._state(obj)
        return None if packs(others) else [*self.key, fields, None]

    def _state(self, obj: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        state = object.__getstate__(obj)
        own, slots = state if type(state) is tuple else (state, None)
        fields, others = {}, {}
        for name, value in {**(slots or {}), **(own or {})}.items():
            if name in self.fields:
                fields[name] = value
            elif type(class_attribute(self.cls, name)) is not cached_property:
                others[name] = value
        return fields, others

    def load(self, code: int, row: Row) -> Any:
        fields = {name: value for name, value in self.payload(code, row).items() if name in self.fields}
        others = row[3] if len(row) > 3 else None
        if others is None or not has_plain_new(self.cls):
            obj = self.cls(**{name: value for name, value in fields.items() if self.fields[name].init})
            if len(row) == 3:  # upstream's: what its constructor made of them counts
                fields = {name: value for name, value in fields.items() if not self.fields[name].init}
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


# --- Value types: those with a constructor that takes plain values ------------------------------------------

Write = Callable[[Any, Pack], tuple[Any, ...]]
Arguments = tuple[list[Any], dict[str, Any]]
Accept = Callable[[list[Any], dict[str, Any]], Arguments]


class Value(NamedTuple):
    """How one value type is written, as `(code, payload, *more)`, and which arguments of a row it accepts."""

    base: type
    write: Write
    accept: Accept


def _single(plain: Callable[[Any], Any]) -> Write:
    return lambda obj, pack: (SINGLE, plain(obj))


def _positional(plain: Callable[[Any], Any]) -> Write:
    return lambda obj, pack: (POSITIONAL, list(plain(obj)))


def _attributes(*names: str) -> Write:
    return lambda obj, pack: (KEYWORDS, {name: getattr(obj, name) for name in names})


def _takes(*kinds: type | tuple[type, ...], at_least: int | None = None) -> Accept:
    """Positional arguments of exactly these types: given another one, a constructor may look up a codec, or
    unroll a network."""
    least = len(kinds) if at_least is None else at_least
    allowed = [kind if isinstance(kind, tuple) else (kind,) for kind in kinds]

    def accept(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
        fits = all(type(arg) in kind for arg, kind in zip(args, allowed, strict=False))
        if kwargs or not fits or not least <= len(args) <= len(kinds):
            raise TypeError("its arguments have the wrong types")
        return args, kwargs

    return accept


def _takes_named(*names: str) -> Accept:
    def accept(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
        if args or kwargs.keys() - set(names):
            raise TypeError("its arguments have the wrong names")
        return args, kwargs

    return accept


def _write_int(obj: int, pack: Pack) -> tuple[Any, ...]:
    plain = int.__index__(obj)
    return SINGLE, plain if -(2**63) <= plain < 2**64 else hex(plain)


def _accept_int(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
    args, kwargs = _takes((int, str))(args, kwargs)
    return [args[0], 16] if type(args[0]) is str else args, kwargs


def _write_set(obj: set[Any] | frozenset[Any], pack: Pack) -> tuple[Any, ...]:
    return SINGLE, [ormsgpack.Fragment(each) for each in sorted(map(pack, tuple(obj)))]


_FACTORIES: dict[str | None, Any] = {
    None: None,
    **{each.__name__: each for each in (list, dict, set, int, float, str, bool, tuple, bytes, deque)},
}


def _write_defaultdict(obj: defaultdict[Any, Any], pack: Pack) -> tuple[Any, ...]:
    names = [name for name, factory in _FACTORIES.items() if factory is obj.default_factory]
    if not names:
        raise SerializationError(
            f"a defaultdict whose default factory is {obj.default_factory!r} cannot be stored; "
            "use a built-in type such as list or int, or a plain dict"
        )
    return POSITIONAL, [names[0], dict.copy(obj)]


def _accept_defaultdict(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
    (name, items), kwargs = _takes((str, types.NoneType), (dict, list))(args, kwargs)
    return [_FACTORIES[name], items], kwargs


_DATE_AND_TIME = ("year", "month", "day", "hour", "minute", "second", "microsecond")


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
    clock = {name: getattr(obj, name) for name in _DATE_AND_TIME}
    return KEYWORDS, {**clock, "tzinfo": _zone(obj), "fold": obj.fold}


def _write_time(obj: time, pack: Pack) -> tuple[Any, ...]:
    clock = {name: getattr(obj, name) for name in _DATE_AND_TIME[3:]}
    return KEYWORDS, {**clock, "tzinfo": _zone(obj), "fold": obj.fold}


def _write_zone(obj: ZoneInfo, pack: Pack) -> tuple[Any, ...]:
    if obj.key is None:
        raise SerializationError("a ZoneInfo made from a file without a key cannot be stored")
    return SINGLE, obj.key


def _accept_parts(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
    return _takes(*[str] * len(args))(args, kwargs)


def _write_send(obj: Send, pack: Pack) -> tuple[Any, ...]:
    timeout = getattr(obj, "timeout", None)
    return POSITIONAL, [obj.node, obj.arg] if timeout is None else [obj.node, obj.arg, timeout]


def _accept_send(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
    return (args[:2], {"timeout": args[2]}) if len(args) == 3 else (args, kwargs)


_ITEM = ("value", "key", "namespace", "created_at", "updated_at")


def _accept_item(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
    if type(kwargs.get("namespace")) not in (tuple, list):
        raise TypeError("its namespace has the wrong type")
    return _takes_named(*_ITEM, "score")(args, kwargs)


def _get_secret(obj: Any) -> Any:
    return obj.get_secret_value()


_ADDRESSES = (IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network)
_URLS = [each for each in vars(pydantic.networks).values() if isinstance(each, type) and issubclass(each, AnyUrl)]
_VALUES = [
    Value(dict, _single(dict.copy), _takes((dict, list))),
    Value(OrderedDict, _single(lambda o: list(map(list, o.items()))), _takes((list, dict))),
    Value(defaultdict, _write_defaultdict, _accept_defaultdict),
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
    Value(Decimal, _single(Decimal.__str__), _takes(str)),
    Value(Fraction, _positional(lambda o: (o.numerator, o.denominator)), _takes(int, int)),
    Value(datetime, _write_datetime, _takes_named(*_DATE_AND_TIME, "tzinfo", "fold")),
    Value(date, _positional(lambda o: (o.year, o.month, o.day)), _takes(int, int, int)),
    Value(time, _write_time, _takes_named(*_DATE_AND_TIME[3:], "tzinfo", "fold")),
    Value(timedelta, _positional(lambda o: (o.days, o.seconds, o.microseconds)), _takes(int, int, int)),
    Value(timezone, _positional(lambda o: o.__getinitargs__()), _takes(timedelta, str, at_least=1)),
    Value(ZoneInfo, _write_zone, _takes(str)),
    Value(UUID, _single(lambda o: o.hex), _takes(str)),
    Value(PurePath, _positional(lambda o: o.parts), _accept_parts),
    *(Value(each, _single(str), _takes(str)) for each in _ADDRESSES),
    *(Value(each, _single(str), _takes(str)) for each in _URLS),
    Value(SecretStr, _single(_get_secret), _takes(str)),
    Value(SecretBytes, _single(_get_secret), _takes(bytes)),
    Value(Secret, _single(_get_secret), lambda args, kwargs: (args, {})),
    Value(Send, _write_send, _accept_send),
    Value(Item, _attributes(*_ITEM), _accept_item),
    Value(SearchItem, _attributes(*_ITEM, "score"), _accept_item),
]
if _v1 := sys.modules.get("pydantic.v1.types"):  # langchain-core imports it where it works
    _VALUES += [
        Value(_v1.SecretStr, _single(_get_secret), _takes(str)),
        Value(_v1.SecretBytes, _single(_get_secret), _takes(bytes)),
    ]


class ValueShape(Shape):
    """Row: what `Value.write` gave, and the attributes that an instance of a subclass has besides."""

    def __init__(self, cls: type, value: Value, *, known: bool = False) -> None:
        super().__init__(cls)
        self.value = value
        self.known = known
        self.unproven = not known

    def dump(self, obj: Any, pack: Pack) -> tuple[int, Row]:
        code, *payload = self.value.write(obj, pack)
        attributes = None if self.known else getattr(obj, "__dict__", None)
        return code, [*self.key, *payload, *([attributes] if attributes else [])]

    def load(self, code: int, row: Row) -> Any:
        payload = row[2]
        if code == METHOD and self.cls is datetime:
            return datetime.fromisoformat(payload)
        if code == SINGLE:
            args, kwargs = self.value.accept([payload], {})
        elif code == POSITIONAL and type(payload) is list:
            args, kwargs = self.value.accept(payload, {})
        elif code in (KEYWORDS, PYDANTIC_V1) and type(payload) is dict:  # upstream takes an Item for a model
            args, kwargs = self.value.accept([], payload)
        else:
            raise TypeError(f"it is not stored that way (extension code {code})")
        base: Any = self.value.base
        if self.cls is base:
            return base(*args, **kwargs)
        # Only the base's own __new__ and __init__ run, not those of the subclass.
        obj: Any = object.__new__(self.cls) if has_plain_new(base) else base.__new__(self.cls, *args, **kwargs)
        if base.__init__ is not object.__init__:
            base.__init__(obj, *args, **kwargs)
        if len(row) > 3:
            object.__getattribute__(obj, "__dict__").update(exactly(dict, row[3]))
        return obj


class PatternShape(Shape):
    def dump(self, obj: Any, pack: Pack) -> tuple[int, Row]:
        return POSITIONAL, ["re", "compile", [obj.pattern, obj.flags]]

    def load(self, code: int, row: Row) -> Any:
        pattern, flags = row[2]
        if code != POSITIONAL or type(pattern) not in (str, bytes) or type(flags) is not int:
            raise TypeError("its arguments have the wrong types")
        return re.compile(pattern, flags & ~re.DEBUG)  # DEBUG prints


# Subclasses that LangChain itself puts into state: the text of a message, the output of a streamed chain.
_LANGCHAIN = [("langchain_core.messages.base", "TextAccessor"), ("langchain_core.runnables.utils", "AddableDict")]


def _fixed_shapes() -> dict[Key, Shape]:
    by_base = {value.base: value for value in _VALUES}
    shapes = [ValueShape(base, value, known=True) for base, value in by_base.items()]
    for cls in (Counter, *filter(None, map(find, _LANGCHAIN))):
        base = next(base for base in cls.__mro__ if base in by_base)
        shapes.append(ValueShape(cls, by_base[base], known=True))
    fixed: dict[Key, Shape] = {shape.key: shape for shape in shapes}
    paths = [each for each in vars(pathlib).values() if isinstance(each, type) and issubclass(each, PurePath)]
    for each in paths:
        shape = ValueShape(each if each is not pathlib.Path else type(pathlib.Path()), by_base[PurePath], known=True)
        # The module depends on the Python version that wrote the row.
        fixed |= {("pathlib", each.__name__): shape, ("pathlib._local", each.__name__): shape}
    return {**fixed, ("re", "compile"): PatternShape(re.Pattern)}


FIXED = _fixed_shapes()
FIXED_CLASSES = {shape.cls: shape for shape in FIXED.values()}
BASES = {id(value.base): value for value in _VALUES}  # by identity: a metaclass may define __hash__


# --- Pydantic models, and which shape a class has -----------------------------------------------------------

_ABSENT: Row = [None] * 6


class ModelShape(Shape):
    """Row: `{field: value}, stamp, [fields set], extra, private, [private left out], [type arguments]`.

    The stamp is a checksum of the fields' names and types. Where it is the class's own, the state is put back
    as it was. Otherwise the class validates it: the class has changed, or (a stamp of None) it must compute
    what it excludes, or (a text, as in rows of upstream) the payload is what `model_dump` gave.
    """

    code = PYDANTIC_V2

    def __init__(self, cls: type[BaseModel]) -> None:
        super().__init__(cls)
        self.model = cls
        self.root = cls.__pydantic_root_model__
        self.args: list[Any] = []
        generic = cls.__pydantic_generic_metadata__
        if generic["origin"] is not None:
            args = [describe(arg) for arg in generic["args"]]
            if _resolvable(args) or find(self.key) is not cls:  # it is if made at the top level of its module
                self.args, self.home, self.unproven = args, generic["origin"], True
                self.key = key_of(self.home)
        fields = cls.model_fields
        self.excluded = {name: field for name, field in fields.items() if field.exclude}
        self.stored = {name: None for name in fields if name not in self.excluded}.keys()
        names_and_types = [(name, describe(field.annotation)) for name, field in fields.items()]
        self.stamp = zlib.crc32(repr(names_and_types).encode())

    def dump(self, obj: Any, pack: Pack) -> tuple[int, Row]:
        return PYDANTIC_V2, self._row(obj, self._private(obj), [])

    def _row(self, obj: Any, private: dict[str, Any] | None, left_out: list[str]) -> Row:
        state = obj.__dict__
        stamp = None if self.excluded and self._must_compute(state) else self.stamp
        if state.keys() != self.stored:  # cached properties, excluded fields
            state = {name: state[name] for name in self.stored if name in state}
        row = [*self.key, state, stamp, sorted(obj.__pydantic_fields_set__), obj.__pydantic_extra__, private]
        return [*row, left_out, self.args] if left_out or self.args else row

    def _must_compute(self, state: dict[str, Any]) -> bool:
        """Whether an excluded field has another value than the default it would be loaded with."""
        for name, field in self.excluded.items():
            if field.is_required():
                raise SerializationError(
                    f"field {name!r} of {dotted(self.key)} is required and excluded from serialization, "
                    "so it could not be loaded again: give it a default"
                )
            value, default = state.get(name), field.get_default()
            if value is not default and (type(value) is not type(default) or (value == default) is not True):
                return True
        return False

    @staticmethod
    def _private(obj: Any) -> dict[str, Any] | None:
        private = obj.__pydantic_private__
        return private and {name: value for name, value in private.items() if value is not PydanticUndefined}

    def fallback(self, obj: Any, packs: Callable[[Any], bool]) -> Row | None:
        """Without the private attributes that cannot be stored, which the class makes anew; or as the author's
        field serializers write it, if its validators can read that."""
        private = self._private(obj) or {}
        kept = {name: value for name, value in private.items() if packs(value)}
        row = self._row(obj, kept, sorted(private.keys() - kept.keys()))
        if packs(row):
            return row
        row[2:4] = BaseModel.model_dump(obj, warnings=False), "model_dump"
        try:
            again = self.load(PYDANTIC_V2, row)
        except (MemStateError, ValueError, TypeError):
            return None
        fields = ((again.__dict__.get(name), obj.__dict__.get(name)) for name in self.stored)
        return row if all(type(new) is type(old) for new, old in fields) else None

    def load(self, code: int, row: Row) -> Any:
        fields, stamp, names_set, extra, private, left_out, args = (row + _ABSENT)[2:9]
        if code != PYDANTIC_V2 or not (extra is None or type(extra) is dict):
            raise TypeError(f"it is not stored that way (extension code {code})")
        if args:
            concrete: Any = self.home
            shape = shape_of(concrete[tuple(map(resolve, args))])
            if shape is None:
                raise TypeError("its type arguments do not make a model of it")
            return shape.load(code, row[:8])
        if stamp == self.stamp and has_plain_new(self.model) and fields.keys() <= self.stored:
            obj = object.__new__(self.model)
            for name, field in self.excluded.items():
                fields[name] = field.get_default(call_default_factory=True, validated_data=fields)
            put(obj, "__dict__", fields)
            put(obj, "__pydantic_fields_set__", set(exactly(list, names_set)))
            if not self.root:  # a root model has these two as attributes of the class
                put(obj, "__pydantic_extra__", extra)
                put(obj, "__pydantic_private__", None if left_out else private)
            if not left_out and not (self.root and private):
                return obj
            obj.model_post_init(None)
        else:
            obj = self._validated(fields, stamp, extra)
            if names_set is not None:
                known = obj.__pydantic_fields_set__ & set(exactly(list, names_set))
                put(obj, "__pydantic_fields_set__", known)
        if private and obj.__pydantic_private__ is not None:
            names = obj.__private_attributes__.keys() & private.keys()
            obj.__pydantic_private__.update({name: private[name] for name in names})
        return obj

    def _validated(self, fields: Any, stamp: Any, extra: dict[str, Any] | None) -> Any:
        dumped = type(stamp) is str
        if self.root:
            data = fields if dumped else fields["root"]
        else:
            computed = self.model.model_computed_fields if dumped else ()
            data = {k: v for k, v in {**(extra or {}), **fields}.items() if k not in computed}
        if not has_plain_new(self.model):
            return self.model(**data)
        try:
            return self.model.__pydantic_validator__.validate_python(data, by_alias=True, by_name=True)
        except ValidationError as exc:
            faults = exc.errors(include_url=False, include_context=False, include_input=False)
            listed = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults)
            raise ValueError(f"the class does not accept the stored fields: {listed}") from exc

    def declared(self) -> Iterable[Any]:
        return [field.annotation for field in self.model.model_fields.values()]


class ModelV1Shape(Shape):
    """Row: `{attribute: value}, [fields set], private`. Rows of upstream have the first of them only."""

    code = PYDANTIC_V1

    def dump(self, obj: Any, pack: Pack) -> tuple[int, Row]:
        return PYDANTIC_V1, self._row(obj, lambda _: True)

    def fallback(self, obj: Any, packs: Callable[[Any], bool]) -> Row | None:
        return self._row(obj, packs)

    def _row(self, obj: Any, keep: Callable[[Any], bool]) -> Row:
        values = ((name, getattr(obj, name, PydanticUndefined)) for name in obj.__private_attributes__)
        private = {name: value for name, value in values if value is not PydanticUndefined and keep(value)}
        return [*self.key, obj.__dict__, sorted(obj.__fields_set__), private]

    def load(self, code: int, row: Row) -> Any:
        stored = self.payload(code, row)
        cls: Any = self.cls
        fields = cls.__fields__
        unknown = stored.keys() - fields.keys()
        if len(row) < 5 or fields.keys() - stored.keys() or (unknown and cls.__config__.extra != "allow"):
            return cls(**{fields[k].alias if k in fields else k: v for k, v in stored.items()})
        obj = object.__new__(cls)
        put(obj, "__dict__", stored)
        put(obj, "__fields_set__", set(exactly(list, row[3])))
        obj._init_private_attributes()
        for name in cls.__private_attributes__.keys() & row[4].keys():
            put(obj, name, row[4][name])
        return obj

    def declared(self) -> Iterable[Any]:
        cls: Any = self.cls
        return [field.outer_type_ for field in cls.__fields__.values()]


# Type arguments of generic models.

_OLD_ALIASES: tuple[Any, ...] = (typing.List, typing.Dict, typing.Set, typing.FrozenSet, typing.Tuple)  # noqa: UP006
_TYPE_FORMS: dict[Key, Any] = {
    ("typing", "Any"): Any,
    ("typing", "Union"): Union,
    **{("typing", form.__name__): form for form in _OLD_ALIASES},
    ("builtins", "NoneType"): types.NoneType,
    ("builtins", "bool"): bool,
}
_GENERIC_CONTAINERS = (list, dict, set, frozenset, tuple, deque)


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
        is_alias = getattr(annotation, "__module__", "") == "typing" and alias in _TYPE_FORMS
        name = alias if is_alias else describe(origin)[:2]
        args = get_args(annotation)
        return [*name, [describe(arg) for arg in args]] if args else [*name]
    if isinstance(annotation, type):
        generic = vars(annotation).get("__pydantic_generic_metadata__") or {}
        if generic.get("origin") is not None:
            return [*key_of(generic["origin"]), [describe(arg) for arg in generic["args"]]]
        return [*key_of(annotation)]
    return type(annotation).__name__


def resolve(described: Any) -> Any:
    """The type that `describe` took apart. Only data types are found, and only known generics take arguments."""
    if described == "...":
        return Ellipsis
    if type(described) is not list or len(described) not in (2, 3):
        raise DeserializationError(f"A type argument has no name: {described!r}.")
    key = (described[0], described[1])
    if key == ("typing", "Literal"):
        return Literal[tuple(exactly(list, described[2]))]
    found: Any = _TYPE_FORMS.get(key) or loaded_shape(key).cls
    if len(described) == 2:
        return found
    generic = key in _TYPE_FORMS or any(found is each for each in _GENERIC_CONTAINERS)
    if not generic and not is_subclass(found, BaseModel):
        raise DeserializationError(f"{dotted(key)} takes no type arguments here.")
    return found[tuple(map(resolve, described[2]))]


def _resolvable(described: list[Any]) -> bool:
    try:
        return bool(list(map(resolve, described)))
    except Exception:
        return False


# Classes and their shapes.

_shapes: dict[Key, Shape] = {}  # a shape is used only while its name still leads to its class
_MOST_SHAPES = 4096


def classify(cls: type) -> Shape | None:
    """The shape of a data type; None if the class is something else."""
    pydantic_v1, numpy = sys.modules.get("pydantic.v1.main"), sys.modules.get("numpy")
    if numpy is not None and is_subclass(cls, numpy.generic):
        return None  # some derive from str or float, and cannot be built as such
    for base in mro(cls):
        if base is enum.Enum:
            return EnumShape(cls)
        if base is BaseModel:
            return ModelShape(cls)
        if pydantic_v1 is not None and base is pydantic_v1.BaseModel:
            return ModelV1Shape(cls)
    if is_subclass(cls, tuple) and type(class_attribute(cls, "_fields")) is tuple:
        return NamedTupleShape(cls)
    for base in mro(cls):
        if id(base) in BASES:
            return ValueShape(cls, BASES[id(base)])
        if any(type(each) is types.MemberDescriptorType for each in class_names(base).values()):
            break  # a subclass with slots of its own, which would be lost
    if type(class_attribute(cls, "__dataclass_fields__")) is dict:
        return DataclassShape(cls)
    return None


def _remember(key: Key, shape: Shape) -> Shape:
    if len(_shapes) >= _MOST_SHAPES:
        _shapes.clear()
    if getattr(shape.cls, "__pydantic_complete__", True):  # the fields of an unfinished model are still to change
        _shapes[key] = shape
    return shape


def shape_of(cls: type) -> Shape | None:
    """The shape of a class of the application's own objects."""
    key = key_of(cls)
    known = _shapes.get(key)
    if known is not None and known.cls is cls:
        return known
    shape = classify(cls)
    return shape and _remember(key, shape)


def writable_shape(cls: type) -> Shape | None:
    """The same, for a class that a reader will find again under its name."""
    shape = shape_of(cls)
    if shape is None:
        return None
    found = find(shape.key)
    # A class of the same name and kind is taken for it: the cell of a notebook that defines it was run again.
    if found is shape.home or (found is not None and type(classify(found)) is type(shape)):
        return shape
    raise SerializationError(
        f"{dotted(shape.key)} could not be found again by that name: define the class at the top level of a "
        "module, or inside such a class"
    )


def loaded_shape(key: Key) -> Shape:
    """The data type that a row names."""
    if (fixed := FIXED.get(key)) is not None:
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
            f"Refused to load {dotted(key)}: it is a class, but not a data type "
            "(Pydantic model, dataclass, enum, named tuple or known value type)."
        )
    return _remember(key, shape)


def _why_not_found(key: Key) -> str:
    module, name = key
    if module not in sys.modules:
        return f"{dotted(key)} cannot be loaded: import the module {module!r} before reading."
    return (
        f"Refused to load {dotted(key)}: the loaded module {module!r} has no class {name!r}. "
        "If it was moved or renamed, keep the old name as an alias."
    )


# --- Values to msgpack and back -----------------------------------------------------------------------------

# How deep typed values may nest. The decoder takes about 550 bytes of stack for each open container and a few
# kilobytes for each typed value, and does not limit their sum: 20 kB of a hostile row would end the process.
MAX_TYPED_DEPTH = 200
FREE_TYPED_DEPTH = 4  # up to here the decoder's own limit of 1,024 containers a level is enough
MAX_OPEN_CONTAINERS = 2_000
CONTAINERS_A_LEVEL = 255  # what the encoder allows

# Writing.

_TEXT_KEYS = (
    ormsgpack.OPT_PASSTHROUGH_BIG_INT
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
    | ormsgpack.OPT_REPLACE_SURROGATES
)
_ANY_KEYS = _TEXT_KEYS | ormsgpack.OPT_NON_STR_KEYS
_PLAIN_KEYS = {str, float, bool, types.NoneType, bytes}


class _OtherKeys(Exception):
    """Some dictionary has other keys than text: left alone, the encoder turns an enum, UUID or date into text."""


def dumps(value: Any) -> bytes:
    writer = _Writer()
    try:
        try:
            data = writer.pack(value)
        except _OtherKeys:
            writer = _Writer(any_keys=True)
            data = writer.pack(value)
        if (writer.deepest - FREE_TYPED_DEPTH) * CONTAINERS_A_LEVEL > MAX_OPEN_CONTAINERS:
            _Measure().value(data)
        return data
    except RecursionError as exc:
        raise SerializationError("The value cannot be stored: it nests too deeply, or contains itself.") from exc
    except Exception as exc:
        path = "" if writer.culprit is None else _path_to(value, writer.culprit)
        where = f"The value at {path}" if path else "The value"
        raise SerializationError(f"{where} cannot be stored: {str(exc).rstrip('.')}.") from exc


class _Writer:
    __slots__ = ("any_keys", "culprit", "deepest", "depth", "error", "shapes")

    def __init__(self, any_keys: bool = False) -> None:
        self.any_keys = any_keys
        self.depth = self.deepest = 0
        self.error: BaseException | None = None
        self.culprit: Any = None
        self.shapes: dict[type, Shape] = {}  # each type is looked up once a value

    def pack(self, value: Any) -> bytes:
        try:
            if not self.any_keys:
                return ormsgpack.packb(value, self.extension, _TEXT_KEYS)
            plain = value if _all_plain(value) else self._with_plain_keys(value)
            return ormsgpack.packb(plain, self.extension, _ANY_KEYS)
        except ormsgpack.MsgpackEncodeError as exc:
            if self.error is None:
                self.error = SerializationError(str(exc)) if self.any_keys else _OtherKeys()
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
        self.deepest = max(self.deepest, self.depth)
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
                shape = FIXED_CLASSES.get(cls) or writable_shape(cls)
                if shape is None:
                    return self._without_shape(obj)
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
            try:
                Reader(lambda _: None).value(ormsgpack.packb(ormsgpack.Ext(code, packed)))
            except MemStateError as exc:
                raise SerializationError(f"{dotted(shape.key)} could not be loaded again: {exc}") from exc
            shape.unproven = False
        return code, packed

    def _without_shape(self, obj: Any) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(obj, (numpy.ndarray, numpy.generic)):
            return ormsgpack.Ext(NUMPY_ARRAY, self.pack(_array_row(numpy, obj)))
        if isinstance(obj, BaseException):
            return repr(obj)
        is_class = isinstance(obj, type)
        what = f"the class {dotted(key_of(obj))} itself" if is_class else dotted(key_of(type(obj)))
        raise SerializationError(
            f"{what} is not a data type (Pydantic model, dataclass, enum, named tuple or known value type)"
        )

    def _with_plain_keys(self, value: Any) -> Any:
        """`value` with each dictionary that has other keys than plain ones made an extension of pairs."""
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
    integers = (key for key in keys if type(key) is int)
    tuples = (key for key in keys if type(key) is tuple)
    return all(-(2**63) <= key < 2**64 for key in integers) and all(map(_plain, tuples))


def _all_plain(value: Any) -> bool:
    if type(value) is dict:
        return _plain(value) and all(map(_all_plain, value.values()))
    return type(value) is not list or all(map(_all_plain, value))


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
            for name, child in (part or {}).items():
                if name.startswith("__") and isinstance(child, dict):  # extra and private attributes of a model
                    yield from ((f".{each}", attribute) for each, attribute in child.items())
                else:
                    yield f".{name}", child


# Reading.

_METHOD = ("datetime", "datetime", "fromisoformat")  # the only one a row may name


class Reader:
    """Unpacks one value. `allow` is asked once for each type, and raises."""

    __slots__ = ("allow", "depth", "error", "open", "shapes")

    def __init__(self, allow: Callable[[Key], None]) -> None:
        self.allow = allow
        self.depth = 0
        self.open = 0
        self.error: BaseException | None = None
        self.shapes: dict[Key, Shape] = {}  # each type is looked up once a value

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
            return self.made(code, row)
        except BaseException as exc:
            if self.error is None:
                self.error = exc
            raise
        finally:
            self.depth -= 1
            self.open -= opened

    def made(self, code: int, row: Any) -> Any:
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
        if code == METHOD and (*key, *row[3:]) != _METHOD:
            method = str(row[3]) if len(row) > 3 else ""
            emit_serde_event({"kind": "msgpack_method_blocked", "module": key[0], "name": key[1], "method": method})
            raise DeserializationError(f"Refused to call the method {method!r} of {dotted(key)}.")
        shape = self.shapes.get(key)
        if shape is None:
            self.allow(key)
            shape = self.shapes[key] = loaded_shape(key)
        return load(shape, key, code, row)


class _Measure(Reader):
    """Nests as reading would, and makes nothing."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(lambda _: None)

    def made(self, code: int, row: Any) -> Any:
        return None


def load(shape: Shape, key: Key, code: int, row: Row) -> Any:
    try:
        return shape.load(code, row)
    except MemStateError:
        raise
    except Exception as exc:
        raise DeserializationError(
            f"{dotted(key)} cannot be made from what is stored: {type(exc).__name__}: {exc}."
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


# Arrays.

_DTYPE = re.compile(r"[<>|=]?[biufcmMSUV]\d*(\[\w+\])?")


def _array_row(numpy: Any, array: Any) -> Row:
    dtype = array.dtype
    scalar = isinstance(array, numpy.generic)
    if dtype.hasobject or dtype.names or not (scalar or type(array) is numpy.ndarray):
        raise SerializationError(
            f"{dotted(key_of(type(array)))} of dtype {dtype} cannot be stored: only plain arrays of numbers, "
            "text, bytes, dates and booleans can"
        )
    if scalar:
        array = numpy.asarray(array)
        return [array.dtype.str, None, "C", array.tobytes()]
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    return [dtype.str, list(array.shape), order, array.tobytes(order)]


def _array(row: Any) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        raise DeserializationError("numpy.ndarray cannot be loaded: import the module 'numpy' before reading.")
    try:
        dtype_name, shape, order, data = row
        if not _DTYPE.fullmatch(dtype_name) or order not in ("C", "F") or type(data) is not bytes:
            raise ValueError("not the description of an array")
        sizes = tuple(exactly(list, shape or []))
        array = numpy.ndarray(sizes, numpy.dtype(dtype_name), data, order=order)
        if min(sizes, default=0) < 0 or array.nbytes != len(data) or array.size > max(len(data), 1):
            raise ValueError("the buffer has another size")
        return array[()] if shape is None else array.copy("K")
    except Exception as exc:
        raise DeserializationError(f"numpy.ndarray cannot be made from what is stored: {exc}.") from exc


# --- The serializer -----------------------------------------------------------------------------------------

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
