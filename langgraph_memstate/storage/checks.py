"""What schemas demand of a write, for every storage: whether a fact is changed, and whether a claim is made twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langgraph_memstate.errors import ConstraintError
from langgraph_memstate.facts import (
    SESSION,
    Draft,
    Namespace,
    Pattern,
    covers,
    decode_value,
    encode_namespace,
    namespace_range,
    split_session,
)
from langgraph_memstate.filters import equal
from langgraph_memstate.storage.values import Claim

Old = tuple[str | None, str, float | None]
"""A current fact as far as it can be changed: type, value (JSON text), time to live."""


def refuse_change(patterns: Sequence[Pattern], old: Old, draft: Draft) -> None:
    """Raises: ConstraintError: the draft changes a fact (its type, value and time to live) that is immutable."""
    type_, value, ttl = old
    if not any(covers(pattern, draft.namespace, type_) for pattern in patterns):
        return
    where = address(draft.namespace, draft.key)
    if draft.value is None:
        raise ConstraintError(f"{where} is immutable and cannot be deleted", where=where)
    same = draft.ttl == ttl and (type_ is None or draft.type == type_)
    if not (same and equal(decode_value(value), decode_value(draft.value))):
        raise ConstraintError(f"{where} is immutable: write a new fact, or the same value", where=where)


def refuse_claim(claim: Claim, draft: Draft, namespace: Namespace, key: str) -> None:
    """Raises: ConstraintError: that fact has the values which the draft claims."""
    where = address(draft.namespace, draft.key)
    values = ", ".join(f"{field}={_cut(value)}" for field, value in claim.values)
    raise ConstraintError(f"{where}: {values} must be unique and is that of {address(namespace, key)}", where=where)


def is_same(namespace: Namespace, key: str, draft: Draft) -> bool:
    """Whether an address is that of the fact which a draft writes, be it in a session or long-term."""
    return key == draft.key and split_session(namespace)[1] == split_session(draft.namespace)[1]


def makes_claim(claim: Claim, namespace: Namespace, type: str | None, value: str) -> bool:
    return covers(claim.pattern, namespace, type) and claim.made_by(decode_value(value))


def held_by(claim: Claim, now: float) -> tuple[list[str], dict[str, Any]]:
    """Conditions on items in SQL, and what is bound to them by name: those of them that a claim is about, unexpired."""
    where = ["(items.expires_at IS NULL OR items.expires_at > :now)"]
    bound: dict[str, Any] = {"now": now}
    if claim.namespace is not None:
        where.append("items.ns = :ns")
        bound["ns"] = encode_namespace(claim.namespace)
        return where, bound
    bound["session_low"], bound["session_high"] = namespace_range((SESSION,))
    in_a_session = "(items.ns >= :session_low AND items.ns < :session_high)"
    if isinstance(claim.pattern, str):
        where.append(f"(items.type = :type OR items.ns = :ns OR {in_a_session})")
        bound |= {"type": claim.pattern, "ns": encode_namespace((claim.pattern,))}
    else:
        where.append(f"((items.ns >= :low AND items.ns < :high) OR {in_a_session})")
        fixed = claim.pattern[: claim.pattern.index("*")] if "*" in claim.pattern else claim.pattern
        bound["low"], bound["high"] = namespace_range(fixed)
    return where, bound


def address(namespace: Namespace, key: str) -> str:
    """An address as errors name it."""
    return "/".join((*namespace, key))


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
