"""Which checkpoints of a thread may go when the latest ones are kept."""

from __future__ import annotations

from collections.abc import Sequence

from langgraph_memstate.graph.rewind import HeadOf
from langgraph_memstate.storage.base import Reader
from langgraph_memstate.storage.values import StepKey, StoredHead
from langgraph_memstate.timeline import metadata_of


def prunable(reader: Reader, head_of: HeadOf, thread_id: str) -> tuple[StepKey, ...]:
    """All but the latest of each namespace, and what a `DeltaChannel` of that one is rebuilt from."""
    doomed: list[StepKey] = []
    for ns in reader.checkpoint_namespaces(thread_id):
        newest_first = list(reader.heads(thread_id, ns))
        kept = {newest_first[0].step.checkpoint_id, *_delta_ancestors(newest_first, head_of)}
        doomed += [head.step for head in newest_first if head.step.checkpoint_id not in kept]
    return tuple(doomed)


def _delta_ancestors(newest_first: Sequence[StoredHead], head_of: HeadOf) -> set[str]:
    """The ancestors of the latest up to the nearest stored value of every delta channel that has none in it.

    A channel without a version was never written: it is empty, and counted all the same.
    """
    by_id = {head.step.checkpoint_id: head for head in newest_first}
    cursor: StoredHead | None = newest_first[0]
    counted = set(metadata_of(newest_first[0]).get("counters_since_delta_snapshot") or ())
    rebuilt = (counted & head_of(newest_first[0])["channel_versions"].keys()) - newest_first[0].manifest.keys()
    needed: set[str] = set()
    while rebuilt and cursor is not None and cursor.parent_id is not None:
        cursor = by_id.get(cursor.parent_id)
        if cursor is not None:
            needed.add(cursor.step.checkpoint_id)
            rebuilt -= cursor.manifest.keys()
    return needed
