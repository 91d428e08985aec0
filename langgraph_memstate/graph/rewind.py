"""Time travel that takes memory along: what a thread wrote on a branch it leaves is undone by the branch it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from langgraph_memstate.facts import LogEntry, Origin
from langgraph_memstate.storage.base import Reader
from langgraph_memstate.storage.values import StepKey, StoredHead
from langgraph_memstate.undo import ClaimsOf, Undo, plan_undo

TimeTravel = Literal["keep", "rewind"]
HeadOf = Callable[[StoredHead], Mapping[str, Any]]


def rewind(reader: Reader, base: StoredHead, step: StepKey, claims: ClaimsOf) -> Undo:
    """What takes memory back to `base` as far as its thread wrote it; what others have changed since stays theirs."""
    thread_id = base.step.thread_id

    def is_undone(entry: LogEntry) -> bool:
        return entry.seq > base.seq and entry.thread_id == thread_id

    return plan_undo(
        reader, reader.log(origin={"thread_id": thread_id}, after=base.seq), is_undone,
        claims=claims, thread_id=thread_id, on_conflict="keep",
        origin=Origin(
            thread_id=thread_id, checkpoint_ns=step.checkpoint_ns, checkpoint_id=step.checkpoint_id, reason="rewind"
        ),
    )  # fmt: skip


def left_behind(reader: Reader, base: StepKey) -> StoredHead | None:
    """The checkpoint, if its thread has gone on from it already: who starts from it now starts a branch."""
    if base.checkpoint_ns:
        return None  # a subgraph follows the graph it is part of
    latest = next(reader.ancestors(base.thread_id, base.checkpoint_ns, None), None)
    if latest is None or latest.step == base:
        return None
    return next(reader.ancestors(*base), None)


def copied(
    reader: Reader, head_of: HeadOf, step: StepKey, parent_id: str | None, versions: Mapping[str, Any]
) -> StepKey | None:
    """What ``update_state(…, as_node="__copy__")`` copies: the child of the copy's parent with the same versions."""
    for row in reader.heads(step.thread_id, step.checkpoint_ns):
        if row.parent_id == parent_id and head_of(row)["channel_versions"] == versions:
            return row.step
    return None
