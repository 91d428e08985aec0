"""What a reader sees: the committed state and, inside a graph step, what the running task has staged on top."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

from langgraph_memstate.errors import FilterError, SchemaError
from langgraph_memstate.facts import Draft, Namespace, Record, decode_value, encode_namespace, split_session
from langgraph_memstate.filters import Condition, Filter
from langgraph_memstate.index import VectorIndex, to_bytes, vector_id
from langgraph_memstate.merging import applied
from langgraph_memstate.moments import Moment
from langgraph_memstate.schemas import SchemaRegistry
from langgraph_memstate.search import Fits, Query, Scored, best, scan, semantic
from langgraph_memstate.storage.base import AsOf, Snapshots
from langgraph_memstate.storage.checks import makes_claim
from langgraph_memstate.storage.values import Claim, ScoredRow

if TYPE_CHECKING:
    from langgraph_memstate.opened import StepScope

Address = tuple[Namespace, str]


class View:
    """One caller's sight of the memory. Staged writes cover committed ones of the same address.

    A view of a moment of the past shows what was committed then. Values come in the present shape of their schemas.
    """

    def __init__(
        self,
        storage: Snapshots,
        index: VectorIndex | None,
        scope: StepScope | None,
        catch_up: Callable[[VectorIndex], None],
        schemas: SchemaRegistry,
        *,
        moment: Moment | None = None,
        pending: Sequence[Draft] = (),
    ) -> None:
        self._storage = storage if moment is None else AsOf(storage, moment.seq)
        self._index = index
        self._scope = scope if moment is None else None
        self._catch_up = catch_up
        self._schemas = schemas
        self._moment = moment
        self._pending = pending

    def over(self, drafts: Sequence[Draft]) -> View:
        """The same with further writes on top."""
        pending = (*self._pending, *drafts)
        return View(self._storage, self._index, self._scope, self._catch_up, self._schemas, pending=pending)

    def _now(self) -> float:
        return time.time() if self._moment is None else self._moment.at

    def _settled(self) -> Iterator[dict[Address, Draft]]:
        """Staged drafts by address, again and again until none of them lands while SQL is read.

        A write that lands in between would be seen by neither side, or its successor by none.
        """
        while True:
            drafts = self._scope.staged() if self._scope is not None else ()
            yield self._layered((*drafts, *self._pending))
            if not drafts or self._scope is None:
                return
            if not self._scope.has_landed(draft.version for draft in drafts):
                return

    def _layered(self, drafts: Sequence[Draft]) -> dict[Address, Draft]:
        """What each address holds after these writes. An update changes what was staged before it."""
        top: dict[Address, Draft] = {}
        for draft in drafts:
            if draft.patch is not None and (below := top.get(draft.address)) is not None:
                record = item_of(below)
                if record is None:
                    draft = below
                else:
                    with suppress(SchemaError):  # which its commit will meet
                        draft = applied(self._schemas, draft, record)
            top[draft.address] = draft
        return top

    def get(self, namespace: Namespace, key: str) -> Record | None:
        found = self.stored(namespace, key)
        return None if found is None else self._schemas.present(found)

    def stored(self, namespace: Namespace, key: str) -> Record | None:
        """The item as it was written."""
        found: Record | None = None
        for staged in self._settled():
            if (draft := staged.get((namespace, key))) is not None:
                found = item_of(draft)
            else:
                with self._storage.snapshot() as reader:
                    found = reader.item(namespace, key, self._now())
        return found

    def written(self, version: str) -> Draft | None:
        """The write that made a version."""
        found: Draft | None = None
        for staged in self._settled():
            found = next((draft for draft in staged.values() if draft.version == version), None)
            if found is None:
                with self._storage.snapshot() as reader:
                    found = reader.draft(version)
        return found

    def holders(self, claim: Claim) -> list[Record]:
        """The items that make a claim."""
        found: list[Record] = []
        for staged in self._settled():
            with self._storage.snapshot() as reader:
                found = [one for one in reader.holders(claim, time.time()) if (one.namespace, one.key) not in staged]
            pending = (record for draft in staged.values() if (record := item_of(draft)) is not None)
            found += [
                one
                for one in pending
                if claim.namespace in (None, one.namespace) and makes_claim(claim, one.namespace, one.type, one.value)
            ]
        return found

    def search(
        self,
        prefix: Namespace,
        *,
        matches: Filter | None,
        query: str | None,
        limit: int,
        offset: int,
        sessions: bool = True,
    ) -> list[tuple[Record, float | None]]:
        """Matching items: by similarity to `query` where an index can tell, else last written first.

        Without `sessions`, those that belong to a session are not seen from outside of it.
        """
        check_page(limit, offset)
        fits = self._fits(matches, hide_sessions=not (sessions or prefix))
        # Rows of older versions have other fields than the filter names.
        conditions = () if matches is None or self._schemas.versioned else matches.conditions
        found: list[tuple[Record, float | None]] = []
        for staged in self._settled():
            here = {address: draft for address, draft in staged.items() if address[0][: len(prefix)] == prefix}
            if query is None or self._index is None:
                found = [(record, None) for record in self._by_time(prefix, fits, conditions, here, offset + limit)]
            else:
                scored = self._by_meaning(self._index, prefix, fits, conditions, query, here, offset + limit)
                found = [(record, score) for score, record in scored]
        return [(self._schemas.present(record), score) for record, score in found[offset : offset + limit]]

    def _fits(self, matches: Filter | None, *, hide_sessions: bool) -> Fits | None:
        if matches is None and not hide_sessions:
            return None

        def fits(record: Record) -> bool:
            if hide_sessions and split_session(record.namespace)[0] is not None:
                return False
            return matches is None or matches(decode_value(self._schemas.present(record).value))

        return fits

    def _by_time(
        self,
        prefix: Namespace,
        matches: Fits | None,
        conditions: Sequence[Condition],
        staged: dict[Address, Draft],
        count: int,
    ) -> list[Record]:
        newest_first = sorted(staged.values(), key=lambda draft: draft.version, reverse=True)
        pending = [record for draft in newest_first if (record := item_of(draft)) is not None]
        with self._storage.snapshot() as reader:
            committed = (
                record
                for record in reader.items(prefix, self._now(), conditions)
                if (record.namespace, record.key) not in staged
            )
            both = (record for source in (pending, committed) for record in source)
            if matches is not None:
                both = (record for record in both if matches(record))
            return list(islice(both, min(count, sys.maxsize)))

    def _by_meaning(
        self,
        index: VectorIndex,
        prefix: Namespace,
        matches: Fits | None,
        conditions: Sequence[Condition],
        query: str,
        staged: dict[Address, Draft],
        count: int,
    ) -> list[Scored]:
        self._catch_up(index)
        vector = index.embedder.query(query)
        if vector is None:
            return []
        nearest = semantic if self._moment is None else scan  # an index knows the present alone
        committed = nearest(
            self._storage, index, Query(vector, prefix, matches, count + len(staged), self._now(), conditions)
        )
        kept = [entry for entry in committed if (entry[1].namespace, entry[1].key) not in staged]
        if not staged:
            return kept
        pending = best(vector, self._staged_rows(index, list(staged.values())), matches, count)
        return sorted([*kept, *pending], key=lambda entry: entry[0], reverse=True)[:count]

    def _staged_rows(self, index: VectorIndex, drafts: Sequence[Draft]) -> list[ScoredRow]:
        rows, _, vectors = index.embed(drafts, self._storage)
        records = {draft.version: record for draft in drafts if (record := item_of(draft)) is not None}
        return [
            ScoredRow(records[row.version], vector_id(row.version, row.ord), row.ord, to_bytes(vectors[row.vector_id]))
            for row in rows
        ]

    def namespaces(self, prefix: Namespace = (), limit: int | None = None) -> list[Namespace]:
        """Namespaces under a prefix that hold an item, in the order of `encode_namespace`."""
        found: list[Namespace] = []
        for staged in self._settled():
            now = self._now()
            with self._storage.snapshot() as reader:
                found = reader.namespaces(prefix, now, None if staged else limit)
                if not staged:
                    continue
                touched = {namespace for namespace, _ in staged if namespace[: len(prefix)] == prefix}
                kept = {
                    record.namespace
                    for namespace in touched
                    for record in reader.items(namespace, now)
                    if (record.namespace, record.key) not in staged
                }
            names = set(found) - touched | (kept & touched)
            names |= {address[0] for address, draft in staged.items() if draft.op == "put"} & touched
            found = sorted(names, key=encode_namespace)[:limit]
        return found


def check_page(limit: object, offset: object) -> None:
    """Raises: FilterError: one of them is not a number of results."""
    for name, number in (("limit", limit), ("offset", offset)):
        if not isinstance(number, int) or number < 0:
            raise FilterError(f"{name}={number!r} is not a number of results")


def item_of(draft: Draft) -> Record | None:
    """The item a staged draft will be; None for a delete."""
    if draft.value is None:
        return None
    return Record(
        draft.namespace, draft.key, draft.version, draft.value,
        created_at=draft.created_at or draft.ts, updated_at=draft.ts, ttl=draft.ttl, type=draft.type,
        schema=draft.schema, schema_version=draft.schema_version,
    )  # fmt: skip
