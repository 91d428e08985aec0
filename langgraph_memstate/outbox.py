"""Prepare, apply, settle: how a commit and its vectors land together.

Atomic mode runs a two-phase commit with SQL as the coordinator (Gray 1978): the decision record is in the log before
the index hears of the vectors, and the SQL commit decides. Deferred mode is a transactional outbox: the work is
committed with the step and applied afterwards. Either way a version that SQL does not show as current is invisible,
so a crash leaves only vectors that nobody can see, and the follower removes them, at the latest when the memory is
opened again. Vectors of an index that the database keeps itself are part of the commit, whichever the mode.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from langgraph_memstate import prepared
from langgraph_memstate.commit import Writer
from langgraph_memstate.errors import MemStateError, VectorSyncError
from langgraph_memstate.facts import Draft
from langgraph_memstate.follower import Follower, indexed
from langgraph_memstate.hooks.base import IndexState, Vector, VectorRecord
from langgraph_memstate.index import VectorIndex
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.operations import (
    Append,
    Commit,
    Prepare,
    PutEmbeddings,
    PutIndexed,
    PutVectors,
    Settle,
)
from langgraph_memstate.storage.values import EmbeddingRow, PreparedRow, VectorRow

logger = logging.getLogger("langgraph_memstate")

VectorSync = Literal["atomic", "deferred"]


@dataclass(slots=True)
class _Plan:
    """What a commit's drafts mean for every index."""

    rows: list[VectorRow] = field(default_factory=list)
    fresh: list[EmbeddingRow] = field(default_factory=list)
    upserts: dict[str, list[VectorRecord]] = field(default_factory=dict)
    kept: list[PutIndexed] = field(default_factory=list)
    """for indexes that the database keeps itself"""


class Outbox(Follower):
    """Commits drafts together with what they mean for the indexes; the follower applies what was deferred."""

    def __init__(self, storage: Storage, writer: Writer, mode: VectorSync, store_id: str) -> None:
        super().__init__(storage, writer, store_id)
        self.mode = mode

    def is_plain(self, drafts: Sequence[Draft]) -> bool:
        """Whether a commit of these drafts touches neither a model nor a vector database."""
        return not any(index.texts(draft) for index in self.indexes for draft in drafts)

    def plain(self, drafts: Sequence[Draft], before: Commit = (), after: Commit = ()) -> Commit:
        """The operations of a plain commit, to be submitted as they are."""
        if not drafts:
            return (*before, *after)
        names = tuple(index.name for index in self.indexes)
        return (*before, Append(tuple(drafts), names), *after)

    def commit(self, drafts: Sequence[Draft], before: Commit = (), after: Commit = ()) -> None:
        """Land drafts and their vectors with the operations around them, or nothing of it.

        Embeddings outlive a commit that failed, so that trying it again does not ask the model again.

        Raises:
            EmbeddingError: before anything was written.
            VectorSyncError: the vector database failed; the vectors were taken back.
        """
        if self.is_plain(drafts):
            self._writer.land(self.plain(drafts, before, after))
        else:
            plan = self._plan(drafts)
            atomic = [index for index in self.indexes if self._is_atomic(index) and plan.upserts.get(index.name)]
            deferred = frozenset(plan.upserts) - {index.name for index in atomic}
            # Vectors come before the log, so that a version superseded in this very commit gives its vector back.
            vectors = PutVectors(tuple(plan.rows), deferred)
            try:
                self._land(plan, atomic, self.plain(drafts, (*before, vectors), (*plan.kept, *after)))
            except VectorSyncError:
                if not self._is_taken(atomic):
                    raise
                self.commit(drafts, before, after)  # who has taken an index follows it: the commit leaves it the work
        if drafts and any(index.has_outbox for index in self.indexes):
            self._wake.set()

    def _is_atomic(self, index: VectorIndex) -> bool:
        if not index.has_outbox or self.mode == "deferred" or index.state is IndexState.BUSY:
            return False
        if index.state is None:
            raise VectorSyncError(f"index {index.name} is not open; nothing was written. Try memory.repair()")
        return True

    def _is_taken(self, indexes: Sequence[VectorIndex]) -> bool:
        """Whether another memory was found to have started one of these indexes anew."""
        with self._storage.snapshot() as reader:
            return any(not index.is_current(reader) and index.is_taken for index in indexes)

    def _plan(self, drafts: Sequence[Draft]) -> _Plan:
        plan = _Plan()
        for index in self.indexes:
            rows, fresh, vectors = index.embed(drafts, self._storage, plan.fresh)
            plan.rows += rows
            plan.fresh += fresh
            if index.is_kept:
                plan.kept.append(indexed(index, rows, vectors))
            elif index.hook is not None:
                plan.upserts[index.name] = _records(index, drafts, rows, vectors)
        return plan

    def _land(self, plan: _Plan, atomic: Sequence[VectorIndex], commit: Commit) -> None:
        embeddings = (PutEmbeddings(tuple(plan.fresh)),) if plan.fresh else ()
        if not atomic:
            self._writer.land((*embeddings, *commit))
            return
        rows = [prepared.begin(index.name, tuple(record.id for record in plan.upserts[index.name])) for index in atomic]
        try:
            self._writer.land((*embeddings, *map(Prepare, rows)))
            try:
                for index in atomic:
                    self._send(index, plan.upserts[index.name])
                self._writer.land((*commit, *(Settle(row.id) for row in rows)))
            except Exception:
                self._take_back(atomic, rows)
                raise
        finally:
            for row in rows:
                prepared.end(row)

    def _send(self, index: VectorIndex, records: Sequence[VectorRecord]) -> None:
        try:
            index.apply(records, ())
        except Exception as error:
            raise VectorSyncError(
                f"index {index.name} failed: {error!r}; the commit was taken back and can be tried again"
            ) from error

    def _take_back(self, atomic: Sequence[VectorIndex], rows: Sequence[PreparedRow]) -> None:
        """Undo the first phase: now, where the index answers, else as soon as it does."""
        try:
            for row in rows:
                self._settle(row)
            for index in atomic:
                if index.answers():
                    self._replay(index)
        except MemStateError as error:  # the record stays, and the follower settles it
            logger.warning("the vectors of a failed commit stay for now: %s", error)
        self._wake.set()


def _records(
    index: VectorIndex, drafts: Sequence[Draft], rows: Sequence[VectorRow], vectors: dict[str, Vector]
) -> list[VectorRecord]:
    by_version = {draft.version: draft for draft in drafts}
    records = []
    for row in rows:
        draft = by_version[row.version]
        assert draft.value is not None
        records.append(
            index.record(row.vector_id, row.ord, vectors[row.vector_id], draft.namespace, draft.value, draft.index)
        )
    return records
