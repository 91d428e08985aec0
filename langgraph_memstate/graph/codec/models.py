"""Pydantic models, and which shape a class has.

A model gets back the state it had. Its validators run only if the class has changed since.
"""

from __future__ import annotations

import enum
import sys
import types
import typing
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from langgraph_memstate.errors import DeserializationError, MemStateError, SerializationError
from langgraph_memstate.graph.codec.shapes import (
    PYDANTIC_V1,
    PYDANTIC_V2,
    DataclassShape,
    EnumShape,
    Key,
    NamedTupleShape,
    Pack,
    Row,
    Shape,
    class_attribute,
    class_names,
    dotted,
    exactly,
    find,
    has_plain_new,
    is_subclass,
    key_of,
    mro,
    put,
)
from langgraph_memstate.graph.codec.values import BASES, FIXED, ValueShape

_ABSENT: Row = [None] * 6

# What every model keeps its state in. Set directly: nothing that a class defines can step in, and it is fastest.
new = object.__new__
_slots = class_names(BaseModel)
set_fields: Callable[[Any, Any], None] = _slots["__dict__"].__set__
set_names: Callable[[Any, Any], None] = _slots["__pydantic_fields_set__"].__set__
set_extra: Callable[[Any, Any], None] = _slots["__pydantic_extra__"].__set__
set_private: Callable[[Any, Any], None] = _slots["__pydantic_private__"].__set__


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
        self.is_usual = not self.root and not self.excluded
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
        if code != PYDANTIC_V2 or len(row) != 7 or not self.is_usual or not has_plain_new(self.model):
            return self._loaded(code, row)
        _, _, fields, stamp, names_set, extra, private = row
        if stamp != self.stamp or type(names_set) is not list or not fields.keys() <= self.stored:
            return self._loaded(code, row)
        if extra is not None:
            exactly(dict, extra)
        obj: Any = new(self.model)
        set_fields(obj, fields)
        set_names(obj, set(names_set))
        set_extra(obj, extra)
        set_private(obj, private)
        return obj

    def _loaded(self, code: int, row: Row) -> Any:
        """The same for a row or a model that is out of the ordinary."""
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

    def as_stored(self, row: Row) -> Any:
        """The model with the fields that are stored, whatever its class says of them now."""
        fields = exactly(dict, row[2])
        return self.model.model_construct(_fields_set=set(fields), **fields)

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


# --- Type arguments of generic models -----------------------------------------------------------------------

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


# --- Classes and their shapes -------------------------------------------------------------------------------

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
