"""How SQLite checks what schemas demand, inside the transaction that writes. Paths and values are bound."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from langgraph_memstate.errors import FactRaced
from langgraph_memstate.facts import (
    SESSION,
    Namespace,
    decode_namespace,
    encode_namespace,
    namespace_range,
)
from langgraph_memstate.storage.base import CheckUnchanged, CheckUnique, Claim
from langgraph_memstate.storage.checks import Old, address, is_same, makes_claim, refuse_change, refuse_claim

_LIVE = "(items.expires_at IS NULL OR items.expires_at > ?)"
_LARGEST = 2**63 - 1


def check_unchanged(conn: sqlite3.Connection, op: CheckUnchanged) -> None:
    before: dict[tuple[Namespace, str], Old | None] = {}
    for draft in op.drafts:
        if conn.execute("SELECT 1 FROM facts WHERE version = ?", (draft.version,)).fetchone():
            continue  # it has landed already
        if draft.address not in before:
            before[draft.address] = conn.execute(
                f"SELECT type, value, ttl FROM items WHERE ns = ? AND key = ? AND {_LIVE}",
                (encode_namespace(draft.namespace), draft.key, draft.ts),
            ).fetchone()
        old = before[draft.address]
        if old is not None and not draft.is_free:
            refuse_change(op.patterns, old, draft)
        before[draft.address] = None if draft.value is None else (draft.type, draft.value, draft.ttl)


def check_unique(conn: sqlite3.Connection, op: CheckUnique) -> None:
    draft = op.draft
    if not conn.execute("SELECT 1 FROM items WHERE version = ?", (draft.version,)).fetchone():
        return  # superseded in the same commit, or since it landed
    where, parameters = sought(op.claim, draft.ts)
    # All at once: a statement that an error left unfinished would keep its snapshot and bar the next commit.
    rows = conn.execute(f"SELECT ns, key, type, value FROM items WHERE {where}", parameters).fetchall()
    for ns, key, type_, value in rows:
        namespace = decode_namespace(ns)
        if not is_same(namespace, key, draft) and makes_claim(op.claim, namespace, type_, value):
            if op.replaces:
                raise FactRaced(f"{address(namespace, key)} was written meanwhile")
            refuse_claim(op.claim, draft, namespace, key)


def sought(claim: Claim, now: float) -> tuple[str, list[Any]]:
    """A condition on items that those which make a claim meet, and few others."""
    where, parameters = [_LIVE], [now]  # type: tuple[list[str], list[Any]]
    if claim.namespace is not None:
        where.append("items.ns = ?")
        parameters.append(encode_namespace(claim.namespace))
    else:
        sessions = namespace_range((SESSION,))
        if isinstance(claim.pattern, str):
            where.append("(items.type = ? OR items.ns = ? OR (items.ns >= ? AND items.ns < ?))")
            parameters += (claim.pattern, encode_namespace((claim.pattern,)), *sessions)
        else:
            where.append("((items.ns >= ? AND items.ns < ?) OR (items.ns >= ? AND items.ns < ?))")
            parameters += (*namespace_range(_fixed(claim.pattern)), *sessions)
    for field, value in claim.values:
        if isinstance(value, str):  # as it is written: SQLite's own reading of JSON stops at a NUL
            where.append("instr(items.value, ?) > 0")
            parameters.append(json.dumps(value, ensure_ascii=False))
        else:
            where.append("json_extract(items.value, ?) = ?")
            parameters += (f'$."{field}"', _number(value))
    return " AND ".join(where), parameters


def _fixed(pattern: Namespace) -> Namespace:
    return pattern[: pattern.index("*")] if "*" in pattern else pattern


def _number(value: int | float) -> int | float:
    """A number as SQLite reads it from JSON: an integer beyond 64 bits is a float there."""
    if isinstance(value, float) or abs(value) <= _LARGEST:
        return value
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
