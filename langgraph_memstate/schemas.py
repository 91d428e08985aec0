"""Pydantic models bound to fact types and namespaces: what they reject is never written."""

from __future__ import annotations

import reprlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from langgraph_memstate.errors import NamespaceError, SchemaError, SerializationError
from langgraph_memstate.facts import Namespace

Pattern = str | Sequence[str]
_CUT = 400  # characters of an offending output that an error shows
_FAULTS = 10  # faults that an error lists


@dataclass(frozen=True, slots=True)
class Schema:
    """A model and what it governs: a fact type, or namespaces in which ``*`` stands for any one label."""

    pattern: str | Namespace
    model: type[BaseModel]

    @property
    def name(self) -> str:
        return self.model.__name__

    def governs(self, namespace: Namespace, type: str | None) -> bool:
        if isinstance(self.pattern, str):
            return type == self.pattern or namespace == (self.pattern,)
        return len(namespace) == len(self.pattern) and all(
            wanted in ("*", label) for wanted, label in zip(self.pattern, namespace, strict=True)
        )


class SchemaRegistry:
    """The schemas of one memory. Where several govern a value, the one registered last decides."""

    def __init__(self) -> None:
        self._schemas: list[Schema] = []
        self._lock = threading.Lock()

    def register(self, pattern: Pattern, model: type[BaseModel]) -> None:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise SchemaError(f"a schema is a Pydantic model class, not {model!r}", where=str(pattern))
        labels: str | Namespace = pattern if isinstance(pattern, str) else tuple(pattern)
        if not labels or not all(isinstance(label, str) and label for label in labels):
            raise NamespaceError(f"{pattern!r} is neither a fact type nor a namespace pattern")
        with self._lock:
            self._schemas.append(Schema(labels, model))

    def find(self, namespace: Namespace, type: str | None) -> Schema | None:
        with self._lock:
            schemas = list(self._schemas)
        return next((schema for schema in reversed(schemas) if schema.governs(namespace, type)), None)

    def validate(
        self, namespace: Namespace, type: str | None, value: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], str | None]:
        """The value as its schema dumps it (JSON mode, defaults filled in), and the schema's name.

        Raises:
            SchemaError: naming the namespace, each field at fault, and the offending output, cut.
        """
        schema = self.find(namespace, type)
        if schema is None:
            return value, None
        where = "/".join(namespace)
        try:
            validated = schema.model.model_validate(value)
        except ValidationError as error:
            output = shown(value)
            raise SchemaError(
                f"{where}: {schema.name} rejects the value: {'; '.join(faults(error))}. Output was: {output}",
                where=where,
                output=output,
                fields=fields_at_fault(error),
            ) from error
        try:
            return validated.model_dump(mode="json"), schema.name
        except ValueError as error:
            raise SerializationError(f"{where}: {schema.name} cannot be dumped as JSON: {error}") from error


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
