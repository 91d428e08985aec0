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
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc'])) or '(whole value)'}: {fault['msg']}" for fault in error.errors()
            )
            output = _shown(value)
            output = output if len(output) <= _CUT else f"{output[:_CUT]}… ({len(output)} characters)"
            raise SchemaError(
                f"{where}: {schema.name} rejects the value: {faults}. Output was: {output}", where=where, output=output
            ) from error
        try:
            return validated.model_dump(mode="json"), schema.name
        except ValueError as error:
            raise SerializationError(f"{where}: {schema.name} cannot be dumped as JSON: {error}") from error


def _shown(value: object) -> str:
    try:
        return repr(value)
    except RecursionError:
        return reprlib.repr(value)
