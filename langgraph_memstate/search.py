"""Semantic search that tells the truth: SQL decides what is visible, the index only proposes.

Read SQL, then the index, then SQL again: work that is applied between the reads is seen on one side or the other.
Scores are cosine similarity computed from the embeddings in SQL, whatever the index says.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterable, Sequence

from langgraph_memstate.facts import Namespace, Record, decode_value
from langgraph_memstate.filters import Predicate
from langgraph_memstate.hooks.base import Vector
from langgraph_memstate.index import VectorIndex, to_vector
from langgraph_memstate.storage.base import ScoredRow, Storage

logger = logging.getLogger("langgraph_memstate")

EXACT_BELOW = 2_000  # candidates that are scanned faster than an index answers, and with recall 1
_FLOOR = 200  # the least to ask an index for: deletes it has not heard of yet crowd out results
_MANY_PENDING = 1_000  # an index this far behind is not asked

Scored = tuple[float, Record]


def semantic(
    storage: Storage,
    index: VectorIndex,
    query: Vector,
    *,
    prefix: Sequence[str],
    matches: Predicate | None,
    count: int,
    now: float,
) -> list[Scored]:
    """The `count` current items under `prefix` that match, nearest first; ties by the later version."""
    with storage.snapshot() as reader:
        small = reader.vector_count(index.name, prefix, EXACT_BELOW + 1) <= EXACT_BELOW
        pending = len(reader.pending_upserts(index.name)) if not small and index.follows else 0
        ceiling = reader.pending_deletes(index.name) + count
    if small or not index.follows or pending > _MANY_PENDING:
        return exact(storage, index, query, prefix=prefix, matches=matches, count=count, now=now)
    k = max(ceiling, _FLOOR)
    while True:
        try:
            ids = index.candidates(query, k, prefix)
        except Exception as error:
            logger.warning("index %s does not answer (%r); searching SQL exactly", index.name, error)
            break
        with storage.snapshot() as reader:
            known = {*ids, *reader.pending_upserts(index.name)}
            rows = reader.vectors_by_id(index.name, index.model, list(known), now)
        found = best(query, (row for row in rows if _under(row.record.namespace, prefix)), matches, count)
        if len(found) >= count:
            return found
        if len(ids) < k:
            break  # the index has no more, so what is missing can only be in SQL
        k *= 2
    return exact(storage, index, query, prefix=prefix, matches=matches, count=count, now=now)


def exact(
    storage: Storage,
    index: VectorIndex,
    query: Vector,
    *,
    prefix: Sequence[str],
    matches: Predicate | None,
    count: int,
    now: float,
) -> list[Scored]:
    """The same by scanning every vector under `prefix`."""
    with storage.snapshot() as reader:
        return best(query, reader.vectors(index.name, index.model, prefix, now), matches, count)


def best(
    query: Vector, rows: Iterable[ScoredRow], matches: Predicate | None, count: int
) -> list[Scored]:
    """Score rows against a query; an item with several vectors counts once, by its nearest."""
    scored: dict[str, Scored] = {}
    for row in rows:
        if row.vector:
            score = float(query @ to_vector(row.vector))
            known = scored.get(row.record.version)
            if known is None or score > known[0]:
                scored[row.record.version] = (score, row.record)
    candidates: Iterable[Scored] = scored.values()
    if matches is not None:
        candidates = (entry for entry in candidates if matches(decode_value(entry[1].value)))
    return heapq.nlargest(count, candidates, key=lambda entry: (entry[0], entry[1].seq))


def _under(namespace: Namespace, prefix: Sequence[str]) -> bool:
    return namespace[: len(prefix)] == tuple(prefix)
