"""Merge patches (RFC 7396), and the writes of facts that are one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from langgraph_memstate.facts import Draft, Record, decode_value, encode_value
from langgraph_memstate.schemas import SchemaRegistry


def merge_patch(target: Any, patch: Any) -> Any:
    """What a patch makes of a JSON value: None removes a field, an object is merged, anything else replaces."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def applied(schemas: SchemaRegistry, draft: Draft, record: Record) -> Draft:
    """An update, made anew of the fact that it finds.

    Raises:
        SchemaError: what the patch makes of it is rejected by its schema.
    """
    assert draft.patch is not None
    merged = merge_patch(decode_value(record.value), decode_value(draft.patch))
    value, schema = schemas.validate(record.namespace, record.type, merged)
    return replace(
        draft,
        value=encode_value(value),
        type=record.type,
        schema=None if schema is None else schema.name,
        schema_version=None if schema is None else schema.version,
    )
