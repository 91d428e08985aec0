"""Semantic search that tells the truth: SQL decides what is visible, the index only proposes.

Read SQL, then the index, then SQL again: what was pending at the first read, or is at the second, or was committed in
between, is considered whether or not the index had it. Scores are cosine similarity computed from the embeddings in
SQL, whatever the index says.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice

from langgraph_memstate.facts import Namespace, Record
from langgraph_memstate.hooks.base import Vector
from langgraph_memstate.index import VectorIndex, to_vector
from langgraph_memstate.storage.base import ScoredRow, Snapshots

EXACT_BELOW = 2_000  # candidates that are scanned faster than an index answers, and with recall 1
_FLOOR = 200  # the least to ask an index for: deletes it has not heard of yet crowd out results
_CEILING = 5_000  # the most: beyond, a scan is no slower
_MANY_PENDING = 1_000  # an index this far behind is not asked

Scored = tuple[float, Record]
Fits = Callable[[Record], bool]


def semantic(
    storage: Snapshots,
    index: VectorIndex,
    query: Vector,
    *,
    prefix: Sequence[str],
    matches: Fits | None,
    count: int,
    now: float,
) -> list[Scored]:
    """The `count` current items under `prefix` that match, nearest first; ties by the later version."""
    if count < 1:
        return []
    k = count
    with storage.snapshot() as reader:
        asked = index.follows and reader.vector_count(index.name, prefix, EXACT_BELOW + 1) > EXACT_BELOW
        if asked:
            before, pending = reader.last_seq(), set(reader.pending_upserts(index.name))
            asked = len(pending) <= _MANY_PENDING
            k = max(_FLOOR, count + 1 + reader.pending_deletes(index.name))
    while asked and k <= _CEILING and (proposed := index.propose(query, k, prefix)) is not None:
        if len(proposed) < k:
            break  # it holds less than SQL does
        with storage.snapshot() as reader:
            pending.update(reader.pending_upserts(index.name), reader.vector_ids(index.name, after=before))
            rows = reader.vectors_by_id(index.name, index.model, [*pending.union(proposed)], now)
        rows = [row for row in rows if _under(row.record.namespace, prefix)]
        found = best(query, rows, matches, count)
        if len(found) == count and found[-1][0] > _horizon(query, rows, set(proposed)):
            return found
        k *= 2
    return exact(storage, index, query, prefix=prefix, matches=matches, count=count, now=now)


def exact(
    storage: Snapshots,
    index: VectorIndex,
    query: Vector,
    *,
    prefix: Sequence[str],
    matches: Fits | None,
    count: int,
    now: float,
) -> list[Scored]:
    """The same by scanning every vector under `prefix`."""
    with storage.snapshot() as reader:
        return best(query, reader.vectors(index.name, index.model, prefix, now), matches, count)


def best(query: Vector, rows: Iterable[ScoredRow], matches: Fits | None, count: int) -> list[Scored]:
    """Score rows against a query; an item with several vectors counts once, by its nearest."""
    scored: dict[str, Scored] = {}
    for row in rows:
        if row.vector:
            score = _score(query, row)
            known = scored.get(row.record.version)
            if known is None or score > known[0]:
                scored[row.record.version] = (score, row.record)
    if matches is None:
        return heapq.nlargest(count, scored.values(), key=_rank)
    ordered = sorted(scored.values(), key=_rank, reverse=True)
    matching = (entry for entry in ordered if matches(entry[1]))
    return list(islice(matching, count))


def _rank(entry: Scored) -> tuple[float, int]:
    return entry[0], entry[1].seq


def _score(query: Vector, row: ScoredRow) -> float:
    return float(query @ to_vector(row.vector))


def _horizon(query: Vector, rows: Iterable[ScoredRow], proposed: Collection[str]) -> float:
    """How near the farthest proposal is that SQL knows: nothing the index left out is nearer."""
    return min((_score(query, row) for row in rows if row.vector_id in proposed), default=float("inf"))


def _under(namespace: Namespace, prefix: Sequence[str]) -> bool:
    return namespace[: len(prefix)] == tuple(prefix)
