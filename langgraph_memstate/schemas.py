"""Pydantic models bound to fact types and namespaces: what they reject is never written.

A model may change over time. Each row of the log says which version of its schema it was written under, and is never
rewritten: it is brought to the present shape when it is read, by the functions that the schema was registered with.
"""

from __future__ import annotations

import logging
import re
import reprlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from langgraph_memstate.errors import MemStateError, SchemaError, SerializationError
from langgraph_memstate.facts import (
    Namespace,
    Pattern,
    Record,
    check_namespace,
    covers,
    decode_value,
    encode_value,
)

logger = logging.getLogger("langgraph_memstate")

_CUT = 400  # characters of an offending output that an error shows
_FAULTS = 10  # faults that an error lists
_MAX_VERSION = 2**31 - 1
_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # between two words of a CamelCase name

Upcaster = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Brings a value from one version of a schema to the next."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What must hold between the facts that a schema governs. It is checked in the transaction that writes.

    Args:
        singleton_key: a field, or several. Of the facts of one namespace with the same value there, one is current: a
            later one replaces it. A fact that is committed becomes a new version of that one, under its key; an item
            that is stored under a key of its own deletes it.
        immutable: a fact that was written is neither changed nor deleted. Writing the same value again is no change.
            Expiry, an undo, `forget` and the end of a session are not held back.
        unique: a field, or several. No two current facts that the schema's pattern covers have the same values there.

    A field that is missing or None is not compared, and the ones named here hold a string, a number or a boolean. They
    are compared as stored. A process enforces the constraints that it has registered. Where an undo would bring back
    what another fact has taken since, that is a conflict, for `on_conflict` to decide (see `MemoryStore.rollback`).
    """

    singleton_key: str | Sequence[str] | None = None
    immutable: bool = False
    unique: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("singleton_key", "unique"):
            given = getattr(self, name)
            fields = () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)
            if not all(isinstance(label, str) and label.isidentifier() for label in fields):
                raise SchemaError(f"{name}={getattr(self, name)!r} is not a field or several")
            # A tuple from here on.
            object.__setattr__(self, name, fields)

    @property
    def fields(self) -> frozenset[str]:
        return frozenset((*(self.singleton_key or ()), *(self.unique or ())))


@dataclass(frozen=True, slots=True)
class Schema:
    """A model and what it governs: a fact type, or namespaces in which ``*`` stands for any one label."""

    pattern: Pattern
    model: type[BaseModel]
    constraint: Constraint = Constraint()
    version: int = 1
    upcast: Mapping[int, Upcaster] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.model.__name__

    def governs(self, namespace: Namespace, type: str | None) -> bool:
        return covers(self.pattern, namespace, type)

    def written_under(self, record: Record) -> int:
        """The version a row was written under: 0 for one that no schema governed."""
        return record.schema_version or (0 if record.schema is None else 1)

    def is_old(self, record: Record) -> bool:
        """Whether a row has to be brought to the present shape; one without a schema only where `upcast` knows how."""
        written = self.written_under(record)
        return written < self.version and (written > 0 or 0 in self.upcast)

    def read(self, value: Mapping[str, Any]) -> BaseModel:
        """The value as the model, by the names of fields or their aliases: what was stored has names.

        What is refused as Python objects may be right as JSON, in which a date is a text to a strict model too.
        Computed fields, which are stored as well, are computed anew.

        Raises:
            ValidationError: the model rejects it.
        """
        if self.model.model_computed_fields and isinstance(value, Mapping):
            value = {name: one for name, one in value.items() if name not in self.model.model_computed_fields}
        try:
            return self.model.model_validate(value, by_alias=True, by_name=True)
        except ValidationError:
            with suppress(SerializationError):
                return self.model.model_validate_json(encode_value(value), by_alias=True, by_name=True)
            raise

    def upcasted(self, record: Record) -> str:
        """The value of an old row in the present shape, as JSON text.

        Raises:
            Exception: what an upcaster raised, or why the model rejects the result.
        """
        value: Mapping[str, Any] = decode_value(record.value)
        for version in range(self.written_under(record), self.version):
            if version in self.upcast:
                value = self.upcast[version](dict(value))
        return encode_value(self.read(value).model_dump(mode="json"))


@dataclass(frozen=True, slots=True)
class SchemaFault:
    """A current fact that its schema does not accept as it is stored. It is read as it was written."""

    namespace: Namespace
    key: str
    version: str
    schema: str
    problem: str


class SchemaRegistry:
    """The schemas of one memory.

    Where several govern a value, the one registered last says what it must look like; the constraints of all hold.
    """

    def __init__(self) -> None:
        self._schemas: dict[Pattern, Schema] = {}
        self._lock = threading.Lock()
        self._told: set[Pattern] = set()
        self.constrained = False
        """whether any schema has a constraint"""
        self.types = False
        """whether any schema governs a fact type"""
        self.versioned = False
        """whether any schema has older versions"""

    def register(
        self,
        pattern: str | Sequence[str],
        model: type[BaseModel],
        constraint: Constraint | None = None,
        *,
        version: int = 1,
        upcast: Mapping[int, Upcaster] | None = None,
    ) -> None:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise SchemaError(f"a schema is a Pydantic model class, not {model!r}", where=str(pattern))
        namespace = check_namespace(pattern)
        labels: Pattern = pattern if isinstance(pattern, str) else namespace
        schema = Schema(labels, model, _checked(constraint, model), version, _checked_upcast(version, upcast))
        with self._lock:
            self._schemas.pop(labels, None)
            self._told.discard(labels)
            self._schemas[labels] = schema
            schemas = self._schemas.values()
            self.constrained = any(schema.constraint != Constraint() for schema in schemas)
            self.types = any(isinstance(schema.pattern, str) for schema in schemas)
            self.versioned = any(schema.version > 1 or schema.upcast for schema in schemas)

    def all(self) -> list[Schema]:
        """Every schema; the one registered last comes first."""
        with self._lock:
            return [*reversed(self._schemas.values())]

    def find(self, namespace: Namespace, type: str | None) -> Schema | None:
        if not self._schemas:
            return None
        return next((schema for schema in self.all() if schema.governs(namespace, type)), None)

    def type_of(self, model: type[BaseModel]) -> str | None:
        """The fact type that a model class was registered for last."""
        found = (schema.pattern for schema in self.all() if schema.model is model)
        return next((pattern for pattern in found if isinstance(pattern, str)), None)

    def validate(
        self, namespace: Namespace, type: str | None, value: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Schema | None]:
        """The value as its schema dumps it (JSON mode, defaults filled in), and the schema.

        Raises:
            SchemaError: naming the namespace, each field at fault, and the offending output, cut.
        """
        schema = self.find(namespace, type)
        if schema is None:
            return value, None
        where = "/".join(namespace)
        try:
            validated = schema.read(value)
        except ValidationError as error:
            output = shown(value)
            raise SchemaError(
                f"{where}: {schema.name} rejects the value: {'; '.join(faults(error))}. Output was: {output}",
                where=where,
                output=output,
                fields=fields_at_fault(error),
            ) from error
        try:
            return validated.model_dump(mode="json"), schema
        except ValueError as error:
            raise SerializationError(f"{where}: {schema.name} cannot be dumped as JSON: {error}") from error

    # -- rows of the past ---------------------------------------------------------------------------

    def present(self, record: Record) -> Record:
        """A record in the present shape of its schema; as it was written where that cannot be, which is told once."""
        if not self.versioned:
            return record
        schema = self.find(record.namespace, record.type)
        if schema is None or not schema.is_old(record):
            return record
        try:
            value = schema.upcasted(record)
        except Exception as error:  # an upcaster is the application's code
            self._tell(schema, record, error)
            return record
        return record._replace(value=value, schema=schema.name, schema_version=schema.version)

    def fault(self, record: Record) -> SchemaFault | None:
        """Why a current record is not what its schema says, if it is not."""
        schema = self.find(record.namespace, record.type)
        if schema is None:
            return None
        try:
            written = schema.written_under(record)
            if written > schema.version:
                raise SchemaError(f"written under version {written}; version {schema.version} is registered here")
            schema.upcasted(record)
        except Exception as error:  # an upcaster is the application's code
            return SchemaFault(record.namespace, record.key, record.version, schema.name, _problem(error))
        return None

    def _tell(self, schema: Schema, record: Record, error: Exception) -> None:
        with self._lock:
            if schema.pattern in self._told:
                return
            self._told.add(schema.pattern)
        logger.warning(
            "%s/%s cannot be read as version %d of %s and is read as it was written (%s); "
            "memory.check_schemas() lists all such facts",
            "/".join(record.namespace), record.key, schema.version, schema.name, _problem(error),
        )  # fmt: skip


def dumped(model: object) -> dict[str, Any]:
    """A model's fields as JSON values.

    Raises:
        SchemaError, SerializationError: it is no Pydantic model, or cannot be dumped.
    """
    if not isinstance(model, BaseModel):
        raise SchemaError(f"a Pydantic model is needed, not {type(model).__name__}")
    try:
        return model.model_dump(mode="json")
    except ValueError as error:
        raise SerializationError(f"{type(model).__name__} cannot be dumped as JSON: {error}") from error


def type_name(model: type[BaseModel]) -> str:
    """The fact type of a class that was registered for none: its name in snake_case."""
    return _WORD.sub("_", model.__name__).lower()


def _checked(constraint: Constraint | None, model: type[BaseModel]) -> Constraint:
    if constraint is None:
        return Constraint()
    if not isinstance(constraint, Constraint):
        raise SchemaError(f"a constraint is a Constraint, not {constraint!r}")
    known = {*model.model_fields, *model.model_computed_fields}
    known |= {field.serialization_alias for field in model.model_fields.values() if field.serialization_alias}
    unknown = sorted(constraint.fields - known)
    if unknown and model.model_config.get("extra") != "allow":
        raise SchemaError(f"{model.__name__} has no field {unknown[0]!r}, which its constraint names")
    return constraint


def _checked_upcast(version: object, upcast: Mapping[int, Upcaster] | None) -> Mapping[int, Upcaster]:
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= _MAX_VERSION:
        raise SchemaError(f"version={version!r} is not a positive number")
    steps = dict(upcast or {})
    for start, step in steps.items():
        if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < version or not callable(step):
            raise SchemaError(f"upcast: {start!r} is no version before {version} with a function to the next")
    return steps


def _problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(faults(error))
    return str(error) if isinstance(error, MemStateError) else repr(error)


def faults(error: ValidationError) -> list[str]:
    """Each fault as ``field: what is wrong``; of many, the first."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    told = [f"{_place(fault['loc'])}: {fault['msg']}" for fault in details[:_FAULTS]]
    return told if len(details) <= _FAULTS else [*told, f"and {len(details) - _FAULTS} more"]


def fields_at_fault(error: ValidationError) -> tuple[str, ...]:
    """Where each fault is, as a dotted path."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    return tuple(dict.fromkeys(_place(fault["loc"]) for fault in details))


def _place(loc: tuple[int | str, ...]) -> str:
    return ".".join(map(str, loc)) or "(whole value)"


def shown(value: object) -> str:
    """A value as an error shows it: a text as it is, anything else as its repr, cut to a readable length."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except Exception:  # whatever a foreign repr raises, the error that shows it must get through
        text = reprlib.repr(value) if isinstance(value, dict | list | tuple) else f"<{type(value).__name__}>"
    return text if len(text) <= _CUT else f"{text[:_CUT]}… ({len(text)} characters)"
