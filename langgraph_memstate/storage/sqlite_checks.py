"""How SQLite checks what schemas demand, inside the transaction that writes. Paths and values are bound."""

from __future__ import annotations

import json
import math
import sqlite3
from typing import Any

from langgraph_memstate.errors import FactRaced
from langgraph_memstate.facts import (
    Namespace,
    decode_namespace,
    encode_namespace,
)
from langgraph_memstate.storage.checks import Old, address, held_by, is_same, makes_claim, refuse_change, refuse_claim
from langgraph_memstate.storage.operations import CheckUnchanged, CheckUnique
from langgraph_memstate.storage.values import Claim

_SLACK = 1e-12
_LARGE = 1e308


def check_unchanged(conn: sqlite3.Connection, op: CheckUnchanged) -> None:
    before: dict[tuple[Namespace, str], Old | None] = {}
    for draft in op.drafts:
        if conn.execute("SELECT 1 FROM facts WHERE version = ?", (draft.version,)).fetchone():
            continue  # it has landed already
        if draft.address not in before:
            before[draft.address] = conn.execute(
                "SELECT type, value, ttl FROM items WHERE ns = ? AND key = ? AND coalesce(expires_at > ?, 1)",
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
    where, bound = sought(op.claim, draft.ts)
    # All at once: a statement that an error left unfinished would keep its snapshot and bar the next commit.
    rows = conn.execute(f"SELECT ns, key, type, value FROM items WHERE {where}", bound).fetchall()
    for ns, key, type_, value in rows:
        namespace = decode_namespace(ns)
        if not is_same(namespace, key, draft) and makes_claim(op.claim, namespace, type_, value):
            if op.replaces:
                raise FactRaced(f"{address(namespace, key)} was written meanwhile")
            refuse_claim(op.claim, draft, namespace, key)


def sought(claim: Claim, now: float) -> tuple[str, dict[str, Any]]:
    """A condition on items that those which make a claim meet, and few others, and what is bound to it."""
    where, bound = held_by(claim, now)
    for number, (field, value) in enumerate(claim.values):
        if isinstance(value, str):  # as it is written: SQLite's own reading of JSON stops at a NUL
            where.append(f"instr(items.value, :text{number}) > 0")
            bound[f"text{number}"] = json.dumps(value, ensure_ascii=False)
        else:
            where.append(f"json_extract(items.value, :path{number}) BETWEEN :least{number} AND :most{number}")
            bound[f"path{number}"] = f'$."{field}"'
            bound[f"least{number}"], bound[f"most{number}"] = _around(value)
    return " AND ".join(where), bound


def _around(value: int | float) -> tuple[float, float]:
    """The numbers that SQLite may take a JSON number for: a fraction or a long integer is read with less precision."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if math.isinf(number):
        return (_LARGE, number) if number > 0 else (number, -_LARGE)
    return number - abs(number) * _SLACK, number + abs(number) * _SLACK
