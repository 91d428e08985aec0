"""How PostgreSQL checks what schemas demand, inside the transaction that writes, and which items a filter may match.

JSONB compares as Python does where it compares at all: numbers by value, whatever their length, strings by code point
once the collation says so. What it cannot hold (a value with a NUL character in it) is never left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from langgraph_memstate.errors import FactRaced
from langgraph_memstate.facts import Namespace, decode_namespace, encode_namespace
from langgraph_memstate.filters import Condition
from langgraph_memstate.storage.checks import Old, address, held_by, is_same, makes_claim, refuse_change, refuse_claim
from langgraph_memstate.storage.operations import CheckUnchanged, CheckUnique
from langgraph_memstate.storage.postgres_link import Connection, marked, run, run_rows
from langgraph_memstate.storage.values import Claim

_EXACT = 2**53  # below, a number has one spelling as far as JSONB is concerned
_SLACK = 10**12
AT = "SELECT items.ns, items.key, {} FROM {{rows}} AS wanted (ns, key) JOIN items USING (ns, key)"


def check_unchanged(conn: Connection, op: CheckUnchanged) -> None:
    landed = run(
        conn, "SELECT version FROM facts WHERE version = ANY(%s::text[])", [draft.version for draft in op.drafts]
    )
    addresses = list({(encode_namespace(draft.namespace), draft.key) for draft in op.drafts})
    found = run_rows(conn, AT.format("type, value, ttl, expires_at"), "text text", addresses)
    if found is None:
        return
    known = {version for (version,) in landed}
    current = {(decode_namespace(ns), key): (*old, expires_at) for ns, key, *old, expires_at in found}
    before: dict[tuple[Namespace, str], Old | None] = {}
    for draft in op.drafts:
        if draft.version in known:
            continue  # it has landed already
        if draft.address not in before:
            row = current.get(draft.address)
            is_there = row is not None and (row[3] is None or row[3] > draft.ts)
            before[draft.address] = (row[0], row[1], row[2]) if row is not None and is_there else None
        old = before[draft.address]
        if old is not None and not draft.is_free:
            refuse_change(op.patterns, old, draft)
        before[draft.address] = None if draft.value is None else (draft.type, draft.value, draft.ttl)


def check_unique(conn: Connection, op: CheckUnique) -> None:
    draft = op.draft
    where, bound = sought(op.claim, draft.ts)
    is_current = "EXISTS (SELECT 1 FROM items AS written WHERE written.version = :version)"  # or it was superseded
    query = f"SELECT ns, key, type, value FROM items WHERE {is_current} AND {where}"
    rows = run(conn, marked(query), version=draft.version, **bound)
    for ns, key, type_, value in rows.fetchall():
        namespace = decode_namespace(ns)
        if not is_same(namespace, key, draft) and makes_claim(op.claim, namespace, type_, value):
            if op.replaces:
                raise FactRaced(f"{address(namespace, key)} was written meanwhile")
            refuse_claim(op.claim, draft, namespace, key)


def sought(claim: Claim, now: float) -> tuple[str, dict[str, Any]]:
    """A condition on items that those which make a claim meet, and few others, and what is bound to it."""
    where, bound = held_by(claim, now)
    for number, (field, value) in enumerate(claim.values):
        if isinstance(value, str) and "\0" in value:
            where.append("items.doc IS NULL")
        elif "\0" not in field:
            where.append(_holds(number, (field,), value, bound))
    return " AND ".join(where), bound


def _holds(number: int, path: Sequence[str], value: str | int | float | bool, bound: dict[str, Any]) -> str:
    """That a document has a value at a path, or is none."""
    if isinstance(value, bool | str) or abs(value) < _EXACT:
        bound[f"part{number}"] = _part(path, value)
        return f"(items.doc IS NULL OR items.doc @> :part{number}::jsonb)"
    whole = int(value)  # a float as large as this is an integer, and may be spelled with fewer digits
    slack = abs(whole) // _SLACK
    bound[f"path{number}"] = list(path)
    bound[f"least{number}"], bound[f"most{number}"] = str(whole - slack), str(whole + slack)
    there = f"(items.doc #> :path{number}::text[])"
    return f"(items.doc IS NULL OR {there} >= :least{number}::jsonb AND {there} <= :most{number}::jsonb)"


def _part(path: Sequence[str], value: object) -> str:
    for field in reversed(path):
        value = {field: value}
    return json.dumps(value)


def narrowed(conditions: Sequence[Condition]) -> tuple[str, dict[str, Any]]:
    """The conditions in SQL, in which neither a path nor an operand is part of the text, and what is bound to it."""
    clauses: list[str] = []
    bound: dict[str, Any] = {}
    for number, (path, operator, operand) in enumerate(conditions):
        bound[f"part{number}"] = _part(path, operand) if operator == "=" else json.dumps(operand)
        also = ""
        if operator != "=":
            bound[f"path{number}"] = list(path)
        if not isinstance(operand, str) and operand in (0, 1):  # a condition does not tell them from booleans
            bound[f"truth{number}"] = _part(path, bool(operand))
            also = f" OR items.doc @> :truth{number}::jsonb"
            if operator != "=":
                also = f" OR jsonb_typeof(items.doc #> :path{number}::text[]) = 'boolean'"
                del bound[f"truth{number}"]
        clauses.append(f"AND (items.doc IS NULL OR {_compared(number, operator, operand)}{also})")
    return " ".join(clauses), bound


def _compared(number: int, operator: str, operand: str | int | float) -> str:
    if operator == "=":
        return f"items.doc @> :part{number}::jsonb"
    if isinstance(operand, str):
        text = f'(items.doc #>> :path{number}::text[]) COLLATE "C"'
        return f"{text} {operator} (:part{number}::jsonb #>> '{{}}')"
    return f"(items.doc #> :path{number}::text[]) {operator} :part{number}::jsonb"
