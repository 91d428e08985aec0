"""What changed in memory between two moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from langgraph_memstate.facts import Namespace, Record, decode_value
from langgraph_memstate.moments import Moment
from langgraph_memstate.storage.base import Reader


@dataclass(frozen=True, slots=True)
class Change:
    """One fact that differs: its value at either moment, None where it was not there."""

    namespace: Namespace
    key: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None

    @property
    def kind(self) -> Literal["added", "removed", "changed"]:
        if self.before is None:
            return "added"
        return "removed" if self.after is None else "changed"


def diff_moments(reader: Reader, a: Moment, b: Moment, prefix: Namespace = ()) -> list[Change]:
    """Facts under a prefix whose value at `b` is not the one at `a`, by namespace and key."""
    first, last = sorted((a, b))
    touched = {entry.address for entry in reader.log(prefix=prefix, after=first.seq, until=last.seq)}
    for record in reader.as_of(first.seq).items(prefix, first.at):
        if record.expires_at is not None and record.expires_at <= last.at:  # the log may not have heard of it yet
            touched.add((record.namespace, record.key))
    at_a, at_b = reader.as_of(a.seq), reader.as_of(b.seq)
    changes = []
    for namespace, key in sorted(touched):
        before = _value(at_a.item(namespace, key, a.at))
        after = _value(at_b.item(namespace, key, b.at))
        if before != after:
            changes.append(Change(namespace, key, before, after))
    return changes


def _value(record: Record | None) -> dict[str, Any] | None:
    return None if record is None else decode_value(record.value)
