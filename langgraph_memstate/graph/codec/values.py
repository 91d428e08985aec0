"""Value types: those with a constructor that takes plain values, such as `UUID`, `Decimal`, `set` or `Send`."""

from __future__ import annotations

import importlib.util
import os.path
import pathlib
import re
import sys
import types
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from pathlib import PurePath
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import ormsgpack
import pydantic.networks
from langgraph.store.base import Item, SearchItem
from langgraph.types import Send
from pydantic import AnyUrl, Secret, SecretBytes, SecretStr

from langgraph_memstate.errors import SerializationError
from langgraph_memstate.graph.codec.shapes import (
    KEYWORDS,
    METHOD,
    POSITIONAL,
    PYDANTIC_V1,
    SINGLE,
    Key,
    Pack,
    Row,
    Shape,
    exactly,
    find,
    has_plain_new,
)

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


def _is_named(zone: tzinfo | None) -> bool:
    """Whether a zone that can be stored is more than its offset."""
    if type(zone) is not timezone:
        return type(zone) is ZoneInfo
    return zone.tzname(None) != timezone(zone.utcoffset(None)).tzname(None)


def _write_datetime(obj: datetime, pack: Pack) -> tuple[Any, ...]:
    if type(obj) is datetime and not obj.fold and not _is_named(obj.tzinfo):
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


def _accept_zone(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
    """Of zones that exist only: for any other name `ZoneInfo` tries to import a module of the package tzdata."""
    args, kwargs = _takes(str)(args, kwargs)
    if not any(os.path.isfile(os.path.join(root, args[0])) for root in zoneinfo.TZPATH):
        tzdata = importlib.util.find_spec("tzdata")
        places = (tzdata and tzdata.submodule_search_locations) or ()
        if not any(os.path.isfile(os.path.join(root, "zoneinfo", args[0])) for root in places):
            raise ValueError(f"this system has no time zone {args[0]!r}")
    return args, kwargs


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
    Value(ZoneInfo, _write_zone, _accept_zone),
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
