"""Semantic search that tells the truth: SQL decides what is visible, the index only proposes.

Few candidates are compared with the query one by one, in memory. For many the index is asked: read SQL, then the
index, then SQL again, so that what was pending at the first read, or is at the second, or was committed in between, is
considered whether or not the index had it. An index that the database keeps itself is asked alone, in one statement.
Scores are cosine similarity, computed from the embeddings in SQL.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from langgraph_memstate.facts import Namespace, Record
from langgraph_memstate.filters import Condition
from langgraph_memstate.hooks.base import Vector
from langgraph_memstate.index import VectorIndex, to_bytes, to_vector
from langgraph_memstate.matrix import VectorMatrix
from langgraph_memstate.storage.base import Reader, Snapshots
from langgraph_memstate.storage.values import Nearest, ScoredRow

EXACT_BELOW = 20_000  # candidates in memory that are compared faster than an index answers, and with recall 1
SCAN_BELOW = 2_000  # the same where they have to be read from SQL
_FLOOR = 200  # the least to ask an index for: deletes it has not heard of yet crowd out results
_CEILING = 5_000  # the most: beyond, a scan is no slower
_MANY_PENDING = 1_000  # an index this far behind is not asked
_SPARE = 10  # how many more than wanted a database is asked for: some may be vectors of one item, or not match
_TRIES = 2  # an index that the database keeps may be built anew while it is asked
_WIDEN = 16  # times as many are looked at if none of the nearest will do; if some do, as many as it may take, twice
_SCANNED = 10  # items that a database compares with a filter while one is read

Scored = tuple[float, Record]
Fits = Callable[[Record], bool]


@dataclass(frozen=True, slots=True)
class Query:
    """The `count` items under `prefix` that match, nearest to `vector` first; ties by the later version."""

    vector: Vector
    prefix: Sequence[str]
    matches: Fits | None
    count: int
    now: float
    conditions: Sequence[Condition] = ()
    """what every matching value fulfils, as it is stored"""


def semantic(storage: Snapshots, index: VectorIndex, query: Query) -> list[Scored]:
    """What is nearest among current items."""
    if query.count < 1:
        return []
    for _ in range(_TRIES if index.is_kept else 0):
        if (answer := _ask_database(storage, index, query)) is not None:
            return answer
    with index.matrix.following(storage) as (reader, matrix):
        before = reader.last_seq()
        if not (index.follows and _are_many(reader, matrix, index, query.prefix) and index.is_current(reader)):
            return _compare(reader, matrix, index, query)
        pending, deletes = set(reader.pending_upserts(index.name)), reader.pending_deletes(index.name)
    found = None if len(pending) > _MANY_PENDING else _ask(storage, index, query, before, pending, deletes)
    if found is None:
        with index.matrix.following(storage) as (reader, matrix):
            return _compare(reader, matrix, index, query)
    return found


def scan(storage: Snapshots, index: VectorIndex, query: Query) -> list[Scored]:
    """What is nearest among the items of a snapshot, whichever moment it is of."""
    with storage.snapshot() as reader:
        return _scan(reader, index, query)


def _scan(reader: Reader, index: VectorIndex, query: Query) -> list[Scored]:
    rows = reader.vectors(index.name, index.model, query.prefix, query.now)
    return best(query.vector, rows, query.matches, query.count)


def _are_many(reader: Reader, matrix: VectorMatrix | None, index: VectorIndex, prefix: Sequence[str]) -> bool:
    if matrix is not None:
        return matrix.count(prefix) > EXACT_BELOW
    return reader.vector_count(index.name, prefix, SCAN_BELOW + 1) > SCAN_BELOW


def _compare(reader: Reader, matrix: VectorMatrix | None, index: VectorIndex, query: Query) -> list[Scored]:
    """Compare every candidate with the query; records are read for those that may be among the nearest alone."""
    if matrix is None:
        return _scan(reader, index, query)
    wanted, found, seen = query.count, list[Scored](), set[str]()
    while True:
        scores, are_all = matrix.nearest(query.vector, query.prefix, wanted)
        fresh = reader.records([version for version in scores if version not in seen], query.now)
        found += [(scores[one.version], one) for one in fresh if query.matches is None or query.matches(one)]
        if len(found) >= query.count or are_all:
            return heapq.nlargest(query.count, found, key=_rank)
        seen.update(scores)
        wanted *= _WIDEN if not found else max(2, 2 * query.count // len(found))
        if query.matches is not None and wanted * _SCANNED > matrix.count(query.prefix):
            return _compare_matching(reader, matrix, query, query.matches)


def _compare_matching(reader: Reader, matrix: VectorMatrix, query: Query, matches: Fits) -> list[Scored]:
    """The same where few match: those are looked for first."""
    found = [
        (score, record)
        for record in reader.items(query.prefix, query.now, query.conditions)
        if (score := matrix.score(query.vector, record.version)) is not None
    ]
    matching = (entry for entry in sorted(found, key=_rank, reverse=True) if matches(entry[1]))
    return list(islice(matching, query.count))


def _ask(
    storage: Snapshots, index: VectorIndex, query: Query, before: int, pending: set[str], deletes: int
) -> list[Scored] | None:
    """What the index proposes and SQL confirms; None where that may not be all."""
    k = max(_FLOOR, query.count + 1 + deletes)
    while k <= _CEILING and (proposed := index.propose(query.vector, k, query.prefix)) is not None:
        if len(proposed) < k:
            return None  # it holds less than SQL does
        with storage.snapshot() as reader:
            pending.update(reader.pending_upserts(index.name), reader.vector_ids(index.name, after=before))
            rows = reader.vectors_by_id(index.name, index.model, [*pending.union(proposed)], query.now)
        rows = [row for row in rows if _under(row.record.namespace, query.prefix)]
        found = best(query.vector, rows, query.matches, query.count)
        if len(found) == query.count and found[-1][0] > _horizon(query.vector, rows, set(proposed)):
            return found
        k *= 2
    return None


def _ask_database(storage: Snapshots, index: VectorIndex, query: Query) -> list[Scored] | None:
    """What an index answers that the database keeps: it and the items are of one moment, so nothing else is asked.

    None where it is not there, or was built anew in the middle.
    """
    question = Nearest(
        index.name, index.model, to_bytes(query.vector), query.prefix, query.conditions, query.now,
        query.count + _SPARE,
    )  # fmt: skip
    with storage.snapshot() as reader:
        while (answer := reader.nearest(question)) is not None:
            found = best(query.vector, answer.rows, query.matches, query.count)
            if len(found) == query.count and found[-1][0] > _horizon(query.vector, answer.rows, answer.ids):
                return found
            if len(answer.ids) == question.count:
                question = replace(question, count=question.count * _WIDEN)
            elif answer.are_exact:
                return found
            else:  # a graph may lose sight of vectors, and gives up where a filter takes most of them away
                question = replace(question, exact=True)
    return None


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
