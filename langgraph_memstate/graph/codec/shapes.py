"""Shapes: how the instances of one data type are taken apart, and put together again without running its code.

Names lead to types without an import, a module `__getattr__`, a descriptor or a metaclass taking part.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, get_type_hints

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
