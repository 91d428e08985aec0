"""Updates: merge patches (RFC 7396) of facts, computed anew from the fact that is current when they are committed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from langgraph_memstate.errors import NotFoundError
from langgraph_memstate.facts import Draft, Namespace, Origin, Record, encode_value, new_version
from langgraph_memstate.reading import Address, View, applied, item_of
from langgraph_memstate.schemas import SchemaRegistry
from langgraph_memstate.storage.base import Reader
from langgraph_memstate.storage.checks import address as named
from langgraph_memstate.storage.operations import Expect


def updated(
    view: View, schemas: SchemaRegistry, namespace: Namespace, key: str, patch: Mapping[str, Any], origin: Origin
) -> tuple[Record, Draft]:
    """The fact that a patch is for, and the write that applies it. Type, indexed fields and time to live stay.

    Raises:
        NotFoundError: it is not there.
        SchemaError, SerializationError: the patch, or what it makes of the fact, cannot be stored.
    """
    text = encode_value(patch)
    record = view.get(namespace, key)
    source = None if record is None else view.written(record.version)
    if record is None or source is None:
        raise _not_found(namespace, key)
    draft = Draft(
        new_version(), namespace, key, "put", record.value,
        index=source.index, ttl=source.ttl, origin=origin, patch=text,
    )  # fmt: skip
    return record, applied(schemas, draft, record)


def rebased(
    reader: Reader, schemas: SchemaRegistry, drafts: Sequence[Draft], *, in_step: bool
) -> tuple[list[Draft], Expect]:
    """The drafts with every patch applied to what is current now, and the versions that this relies on.

    A fact that was deleted since a step updated it stays deleted, as if the update had come first; the log then has
    another delete for it.

    Raises:
        NotFoundError: a fact was deleted since it was updated outside of a step.
        SchemaError: what a patch makes of the fact as it is now is rejected by its schema.
    """
    written: dict[Address, Draft] = {}
    relied_on: list[tuple[Namespace, str, str | None]] = []
    result: list[Draft] = []
    for draft in drafts:
        if draft.patch is not None:
            if (before := written.get(draft.address)) is not None:
                record = item_of(before)
            elif (record := reader.item(draft.namespace, draft.key, time.time())) is not None:
                relied_on.append((*draft.address, record.version))
            if record is not None:
                draft = applied(schemas, draft, schemas.present(record))
            elif in_step:
                draft = replace(draft, op="delete", value=None, patch=None)
            else:
                raise _not_found(draft.namespace, draft.key)
        written[draft.address] = draft
        result.append(draft)
    return result, Expect(tuple(relied_on))


def _not_found(namespace: Namespace, key: str) -> NotFoundError:
    return NotFoundError(f"{named(namespace, key)} is not there to be updated; commit it first")
