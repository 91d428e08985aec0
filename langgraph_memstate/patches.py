"""Writes that depend on the fact that is current when they are committed: merge patches (RFC 7396), undos of a step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from langgraph_memstate.errors import Conflict, NotFoundError, RollbackConflict
from langgraph_memstate.facts import Draft, Namespace, Origin, Record, encode_value, new_version
from langgraph_memstate.merging import applied
from langgraph_memstate.reading import Address, View, item_of
from langgraph_memstate.schemas import SchemaRegistry
from langgraph_memstate.standing import is_expiry
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

    An undo that was prepared before others changed the fact is left out, if it is to keep their version.

    A fact that was deleted since a step updated it stays deleted, as if the update had come first; the log then has
    another delete for it.

    Raises:
        NotFoundError: a fact was deleted since it was updated outside of a step.
        RollbackConflict: a fact was changed by others since its undo was prepared.
        SchemaError: what a patch makes of the fact as it is now is rejected by its schema.
    """
    written: dict[Address, Draft] = {}
    relied_on: list[tuple[Namespace, str, str | None]] = []
    result: list[Draft] = []
    for draft in drafts:
        if draft.on_conflict is not None and draft.address not in written:
            record = reader.item(*draft.address, now=0.0)
            version = None if record is None else record.version
            relied_on.append((*draft.address, version))
            if version != draft.over and _stays(reader, draft):
                continue
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


def _stays(reader: Reader, draft: Draft) -> bool:
    """Whether what has replaced the version that an undo is for stays.

    Raises:
        RollbackConflict: the undo is not to decide that.
    """
    theirs = next(iter(reader.versions(*draft.address)), None)
    if theirs is None or is_expiry(theirs):
        return False
    if draft.on_conflict == "keep" or theirs.thread_id == draft.origin.thread_id:
        return True
    where = named(*draft.address)
    raise RollbackConflict(
        f"{where} was changed by others after its undo was prepared, and before the step that undoes it ended: nothing "
        "of that step has landed. New input drops the step; on_conflict='keep' leaves their version, 'overwrite' "
        "takes it back too",
        [Conflict(*draft.address, draft.over or "", theirs.version)],
    )


def _not_found(namespace: Namespace, key: str) -> NotFoundError:
    return NotFoundError(f"{named(namespace, key)} is not there to be updated; commit it first")
