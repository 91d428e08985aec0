"""Constraints of schemas: what a commit has to check, and what it replaces.

The storage checks them in the transaction that writes, which alone sees every other writer. Before that, a write of a
graph step is checked against what its task sees, so that the node fails at its write and not the step at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from langgraph_memstate.errors import ConstraintError
from langgraph_memstate.facts import Draft, Pattern, decode_value, new_version
from langgraph_memstate.patches import rebased
from langgraph_memstate.reading import Address, View
from langgraph_memstate.schemas import SchemaRegistry
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.checks import Old, address, is_same, refuse_change, refuse_claim
from langgraph_memstate.storage.operations import CheckUnchanged, CheckUnique, Commit, Op
from langgraph_memstate.storage.values import Claim
from langgraph_memstate.undo import unrivalled


@dataclass(frozen=True, slots=True)
class Guarded:
    """Drafts with the checks that go into their commit before and after them."""

    drafts: Sequence[Draft]
    before: Commit = ()
    after: Commit = ()


def needs_guard(schemas: SchemaRegistry, drafts: Iterable[Draft]) -> bool:
    return schemas.constrained or any(draft.patch is not None or draft.on_conflict is not None for draft in drafts)


def guarded(
    storage: Storage, committed: View, schemas: SchemaRegistry, drafts: Sequence[Draft], *, in_step: bool
) -> Guarded:
    """Drafts as they are to be committed now: patches applied, replaced facts deleted, and the checks on all of it.

    Raises:
        NotFoundError, SchemaError, ConstraintError: they cannot be.
    """
    with storage.snapshot() as reader:
        landed = {draft.version for draft in drafts if reader.draft(draft.version) is not None}
        kept = [draft for draft in drafts if draft.version not in landed and not (draft.derived and in_step)]
        kept, current = rebased(reader, schemas, kept, in_step=in_step)
    kept += replaced(schemas, committed, kept)
    before: list[Op] = [current] if current.versions else []
    if patterns := _immutable(schemas):
        before.append(CheckUnchanged(tuple(kept), patterns))
    final = _final(kept).values()
    after = [CheckUnique(draft, claim, replaces) for draft in final for claim, replaces in _claims(schemas, draft)]
    after += unrivalled((draft for draft in final if draft.undoes is not None), partial(claims_of, schemas))
    return Guarded(kept, tuple(before), tuple(after))


def claims_of(schemas: SchemaRegistry, undo: Draft) -> list[Claim]:
    """What a fact must have for itself once it is back. What cannot be compared claims nothing: an undo is no error."""
    try:
        return [claim for claim, _ in _claims(schemas, replace(undo, undoes=None))]
    except ConstraintError:
        return []


def admitted(schemas: SchemaRegistry, view: View, drafts: Sequence[Draft]) -> list[Draft]:
    """Drafts as a step stages them, if they hold against what its task sees.

    Raises:
        ConstraintError: they do not.
    """
    drafts = [*drafts, *replaced(schemas, view, drafts)]
    if patterns := _immutable(schemas):
        _refuse_changes(patterns, view, drafts)
    seen = view.over(drafts)
    for draft in _final(drafts).values():
        for claim, replaces in _claims(schemas, draft):
            if not replaces:
                for holder in seen.holders(claim):
                    if not is_same(holder.namespace, holder.key, draft):
                        refuse_claim(claim, draft, holder.namespace, holder.key)
    return drafts


def adopted(schemas: SchemaRegistry, view: View, draft: Draft) -> Draft:
    """The draft as a new version of the fact that it replaces, where there is one."""
    for claim, replaces in _claims(schemas, draft):
        if replaces and (holders := view.holders(claim)):
            return replace(draft, key=holders[0].key)
    return draft


def replaced(schemas: SchemaRegistry, view: View, drafts: Sequence[Draft]) -> list[Draft]:
    """Deletes of the facts that drafts replace under another key; of two drafts that replace each other the last stays.

    They are derived anew when a step lands, since others may have written meanwhile.
    """
    if not schemas.constrained:
        return []
    final = _final(drafts)
    seen = view.over(drafts)
    deletes: dict[Address, Draft] = {}
    for draft in reversed(final.values()):
        if draft.address in deletes:
            continue
        for claim, replaces in _claims(schemas, draft):
            for holder in seen.holders(claim) if replaces else ():
                where = holder.namespace, holder.key
                if where != draft.address and where not in deletes:
                    origin = replace(draft.origin, reason=draft.origin.reason or f"replaced by {draft.key}")
                    deletes[where] = Draft(new_version(), *where, "delete", None, origin=origin, derived=True)
    return list(deletes.values())


def _final(drafts: Sequence[Draft]) -> dict[Address, Draft]:
    """The last draft of each address, in the order they were written."""
    final: dict[Address, Draft] = {}
    for draft in drafts:
        final.pop(draft.address, None)
        final[draft.address] = draft
    return final


def _immutable(schemas: SchemaRegistry) -> tuple[Pattern, ...]:
    return tuple(schema.pattern for schema in schemas.all() if schema.constraint.immutable)


def _claims(schemas: SchemaRegistry, draft: Draft) -> Iterator[tuple[Claim, bool]]:
    """The claims that a draft makes, and whether it replaces who else makes them."""
    if draft.value is None or draft.undoes is not None or not schemas.constrained:
        return  # an undo replaces nothing: what it may bring back, it has been planned for
    value = decode_value(draft.value)
    for schema in schemas.all():
        if not schema.governs(draft.namespace, draft.type):
            continue
        for fields, replaces in ((schema.constraint.singleton_key, True), (schema.constraint.unique, False)):
            values = tuple((field, _compared(draft, field, value[field])) for field in fields or () if field in value)
            if values and len(values) == len(fields or ()) and all(one is not None for _, one in values):
                yield Claim(schema.pattern, values, draft.namespace if replaces else None), replaces


def _compared(draft: Draft, field: str, value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    where = address(*draft.address)
    raise ConstraintError(
        f"{where}: {field} is a {type(value).__name__}; its constraint compares strings, numbers and booleans",
        where=where,
    )


def _refuse_changes(patterns: Sequence[Pattern], view: View, drafts: Sequence[Draft]) -> None:
    before: dict[Address, Old | None] = {}
    for draft in drafts:
        if draft.address not in before:
            record = view.stored(*draft.address)
            before[draft.address] = None if record is None else (record.type, record.value, record.ttl)
        old = before[draft.address]
        if old is not None and not draft.is_free:
            refuse_change(patterns, old, draft)
        before[draft.address] = None if draft.value is None else (draft.type, draft.value, draft.ttl)
